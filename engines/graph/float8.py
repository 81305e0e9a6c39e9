"""Floats of eight bits, E4M3: a sign, four bits of exponent, three of mantissa, no infinities, the largest number 448.

Micikevicius et al. 2022, arXiv:2209.05433, table 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BIAS, FRACTIONS = 7, 8
CODES = 0x7F
"""Numbers without a sign; the code after them is not a number."""


def _numbers() -> npt.NDArray[np.float32]:
    """The numbers that are not negative, by their codes: 2^(e - 7) (1 + m / 8), and 2^-6 m / 8 where e is 0."""
    exponent, fraction = np.divmod(np.arange(CODES), FRACTIONS)
    normal = 2.0 ** (exponent - BIAS) * (1.0 + fraction / FRACTIONS)
    return np.where(exponent > 0, normal, 2.0 ** (1 - BIAS) * fraction / FRACTIONS).astype(np.float32)


NUMBERS = _numbers()
LARGEST = float(NUMBERS[-1])
_MIDDLES = (NUMBERS[:-1] + NUMBERS[1:]) / 2


def encode_float8(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The codes of the nearest numbers, the even code's of two that are as near; what is beyond the ends is at them."""
    size = np.minimum(np.abs(values), np.float32(LARGEST))
    below, above = (np.searchsorted(_MIDDLES, size, side=side) for side in ("left", "right"))
    code = np.where(below % 2 == 0, below, above)  # they differ where a value is in the middle, by 1
    return np.asarray(code | np.where(np.signbit(values), 0x80, 0), np.uint8)


def decode_float8(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The numbers of codes, none of which may be a NaN's."""
    size = NUMBERS[codes & CODES]
    return np.where(codes & 0x80, -size, size).astype(np.float32)
