"""UniPC (Zhao et al. 2023, arXiv 2302.04867), x0 form, in VE coordinates."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np

from ..algebra import Form, Tape
from ..levels import Level, Path
from .sampler import sampler

_unipc = partial(
    sampler,
    space="ve",
    latent_space="vp",
    group="lambda",
    source="Zhao et al. 2023, arXiv 2302.04867",
    diffusers="UniPCMultistepScheduler",
)


@_unipc("unipc_1", order=2, presets={"order": 1})
@_unipc("unipc_2", order=3, presets={"order": 2}, aliases=["unipc"])
@_unipc(
    "unipc_3",
    order=4,
    presets={"order": 3},
    aliases={"uni_pc": {"solver_type": "bh1"}, "uni_pc_bh2": {"solver_type": "bh2"}},
)
def unipc(
    model: Tape,
    path: Path,
    x: Form,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> Form:
    """Algorithms 1 and 2 of the paper: predict, call the network, correct with its answer, predict on.

    The corrector needs no call of its own, and the network never sees the corrected state. `disable_corrector`
    names the steps of the whole schedule whose result is left uncorrected.
    """
    known: list[tuple[float, Form]] = []
    anchor, used = x, 0
    for i, (here, there) in enumerate(path.pairs):
        fresh = model(x, here).x0
        if i > 0 and path.skipped + i - 1 not in disable_corrector:
            x = update(anchor, known, path.pairs[i - 1][0], here, used, solver_type, fresh)
        known = [(here.lam, fresh), *known[:order]]
        left = len(path) - i if lower_order_final else order
        used = 1 if there.sigma in (0.0, here.sigma) else min(order, left, i + 1)
        anchor = model.hold(x)
        x = update(anchor, known, here, there, used, solver_type)
    return x


def update(
    x: Form,
    known: Sequence[tuple[float, Form]],
    here: Level,
    there: Level,
    order: int,
    solver_type: str,
    fresh: Form | None = None,
) -> Form:
    """One step by UniP, or by UniC if `fresh`, the x0 at its end, is given; known: (lambda, x0), newest first."""
    h = math.inf if there.sigma == 0.0 else math.log(here.sigma / there.sigma)
    l0, m0 = known[0]
    x = math.exp(-h) * x - math.expm1(-h) * m0
    if order == 1 and fresh is None:
        return x
    ratios = [(lam - l0) / h for lam, _ in known[1:order]]
    differences = [(m - m0) / r for r, (_, m) in zip(ratios, known[1:order], strict=True)]
    if fresh is not None:
        ratios, differences = [*ratios, 1.0], [*differences, fresh - m0]
    scale = -h if solver_type == "bh1" else math.expm1(-h)
    weights = [0.5] if len(ratios) == 1 else combination(ratios, -h, scale)
    for weight, difference in zip(weights, differences, strict=True):
        x = x - scale * weight * difference
    return x


def combination(ratios: Sequence[float], z: float, scale: float) -> list[float]:
    """The weights that make the differences agree with the exact solution's expansion, R w = b (eq. 9).

    R_ik = ratios_k^i and b_i = (i + 1)! phi_{i+2}(z) z / scale, with phi_k the exponential integrators' functions.
    """
    size = len(ratios)
    phi = math.expm1(z) / z - 1
    factorial = 1
    b = []
    for i in range(1, size + 1):
        b.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / z - 1 / factorial
    matrix = np.vander(np.array(ratios), size, increasing=True).T
    return [float(w) for w in np.linalg.solve(matrix, np.array(b))]
