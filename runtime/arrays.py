"""The arrays that the runtime hands around, by their types."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Shape = tuple[int, ...]
"""(C, h, w) of a picture's latent, (F, C, h, w) of a clip's."""
