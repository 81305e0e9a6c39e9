"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), in VE coordinates, where e^-h = sigma' / sigma.

A step from sigma to sigma' solves dx/dlambda = x0 - x exactly for the linear part: with h = ln(sigma / sigma') and D
the estimate of x0, x' = e^-h x + (1 - e^-h) D + terms in D's derivatives. The SDE form takes 2h for h in those and adds
noise of variance sigma'^2 (1 - e^-2h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from ..algebra import Form, Tape
from ..levels import Level, Path
from .sampler import sampler

DPMPP = "Lu et al. 2022, arXiv 2211.01095"
_dpmpp = partial(sampler, space="ve", latent_space="vp", group="lambda", source=DPMPP)
_multistep = partial(_dpmpp, diffusers="DPMSolverMultistepScheduler")
_singlestep = partial(_dpmpp, diffusers="DPMSolverSinglestepScheduler")


def orders(path: Path, order: int, *, lower_order_final: bool, euler_at_final: bool) -> list[int]:
    """The order of each step: as much history as there is, and less at the end where steps are few.

    A last step to sigma 0 is infinitely long in lambda and must be of order 1; a step of no length may as well be.
    """
    few = lower_order_final and path.total < 15
    chosen = []
    for i, (here, there) in enumerate(path.pairs):
        left = len(path) - i
        limit = order
        if (left == 1 and (euler_at_final or few)) or there.sigma in (0.0, here.sigma):
            limit = 1
        elif left == 2 and few:
            limit = 2
        chosen.append(min(limit, i + 1, order))
    return chosen


def advance(
    x: Form,
    known: Sequence[tuple[float, Form]],
    here: Level,
    there: Level,
    *,
    order: int,
    solver_type: str,
    noise: Form | None,
    published: bool,
) -> Form:
    """One multistep step of the given order; known: (lambda, D) of the latest evaluations, newest first.

    Of the two second-order forms, "midpoint" extrapolates D to the middle and "heun" integrates it as a line.
    `published` keeps the third-order term as the authors' and diffusers' code has it: half of what integrating the
    parabola gives, and with a wrong sign under the SDE form. It costs an order of accuracy.
    """
    h = math.inf if there.sigma == 0.0 else math.log(here.sigma / there.sigma)
    e = 2 * h if noise else h
    phi = -math.expm1(-e)
    x = math.exp(-e) * x + phi * known[0][1]
    if noise:
        x = x + there.sigma * math.sqrt(phi) * noise
    if order == 1:
        return x
    (l0, d0), (l1, d1) = known[0], known[1]
    slope = (d0 - d1) * (h / (l0 - l1))
    if order == 2:
        return x + (phi / 2 if solver_type == "midpoint" else 1 - phi / e) * slope
    l2, d2 = known[2]
    r0, r1 = (l0 - l1) / h, (l1 - l2) / h
    bend = (slope - (d1 - d2) / r1) / (r0 + r1)
    curvature = 1 - 2 * (e - phi) / e**2
    if published:
        curvature = (phi - e) / e**2 - 0.5 if noise else 0.5 - (e - phi) / e**2
    return x + (1 - phi / e) * (slope + r0 * bend) + curvature * bend


@_multistep("dpmpp_1m", order=1, presets={"order": 1, "sde": False})
@_multistep("dpmpp_1m_sde", order=1, presets={"order": 1, "sde": True}, draws="always")
@_multistep("dpmpp_2m", order=2, presets={"order": 2, "sde": False}, aliases=["DPM++ 2M"])
@_multistep(
    "dpmpp_2m_sde",
    order=2,
    presets={"order": 2, "sde": True},
    draws="always",
    aliases={"DPM++ 2M SDE": {}, "DPM++ 2M SDE Heun": {"solver_type": "heun"}, "dpmpp_2m_sde_gpu": {}},
)
@_multistep("dpmpp_3m", order=3, presets={"order": 3, "sde": False}, aliases=["DPM++ 3M"])
@_multistep(
    "dpmpp_3m_sde",
    order=3,
    presets={"order": 3, "sde": True},
    draws="always",
    aliases=["DPM++ 3M SDE", "dpmpp_3m_sde_gpu"],
)
def dpmpp_multistep(
    model: Tape,
    path: Path,
    x: Form,
    *,
    order: int = 2,
    sde: bool = False,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    published: bool = False,
) -> Form:
    """Algorithm 2 of the paper (2M), its third-order extension (3M), and their SDE forms."""
    known: list[tuple[float, Form]] = []
    chosen = orders(path, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    for (here, there), k in zip(path.pairs, chosen, strict=True):
        known = [(here.lam, model(x, here).x0), *known[: order - 1]]
        noise = model.noise() if sde else None
        x = advance(x, known, here, there, order=k, solver_type=solver_type, noise=noise, published=published)
    return x


def block_orders(path: Path, order: int, *, lower_order_final: bool) -> list[int]:
    """The orders of singlestep sampling, 1, 2, 3, 1, 2, 3, ...: each block restarts from its first state.

    The last block is shortened so that every step is spent, and a last step to sigma 0 is of order 1.
    """
    blocks, rest = divmod(path.total, order)
    chosen = list(range(1, order + 1)) * blocks + list(range(1, rest + 1))
    if path.last.sigma == 0.0 or (lower_order_final and rest == 0):
        chosen[-1] = 1
    return chosen[path.skipped :]


@_singlestep("dpmpp_1s", order=1, presets={"order": 1, "sde": False})
@_singlestep("dpmpp_1s_sde", order=1, presets={"order": 1, "sde": True}, draws="always")
@_singlestep("dpmpp_2s", order=2, presets={"order": 2, "sde": False})
@_singlestep("dpmpp_2s_sde", order=2, presets={"order": 2, "sde": True}, draws="always")
@_singlestep("dpmpp_3s", order=3, presets={"order": 3, "sde": False})
@_singlestep("dpmpp_3s_sde", order=3, presets={"order": 3, "sde": True}, draws="always")
def dpmpp_singlestep(
    model: Tape,
    path: Path,
    x: Form,
    *,
    order: int = 2,
    sde: bool = False,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    published: bool = False,
) -> Form:
    """Algorithm 1 of the paper (2S) and its third-order form (3S), on the schedule's own levels as stages.

    At order k the step goes from the state k - 1 levels back, over all k evaluations since.
    """
    known: list[tuple[Level, Form]] = []
    anchor = x
    chosen = block_orders(path, order, lower_order_final=lower_order_final)
    for (here, there), k in zip(path.pairs, chosen, strict=True):
        known = [(here, model(x, here).x0), *known[: order - 1]]
        k = min(k, len(known))
        if k == 1:
            anchor = x
        noise = model.noise() if sde else None
        stages = known[:k][::-1]
        x = block_step(anchor, stages, there, solver_type=solver_type, noise=noise, published=published)
    return x


def block_step(
    x: Form,
    stages: Sequence[tuple[Level, Form]],
    there: Level,
    *,
    solver_type: str,
    noise: Form | None,
    published: bool,
) -> Form:
    """One singlestep step over its stages, oldest first; the step starts at the first stage's level.

    `published` keeps the sign that diffusers gives the second derivative under the SDE form.
    """
    here, d0 = stages[0]
    h = math.inf if there.sigma == 0.0 else math.log(here.sigma / there.sigma)
    e = 2 * h if noise else h
    phi = -math.expm1(-e)
    x = math.exp(-e) * x + phi * d0
    if noise:
        x = x + there.sigma * math.sqrt(phi) * noise
    if len(stages) == 1:
        return x
    r1 = (stages[1][0].lam - here.lam) / h
    slope1 = (stages[1][1] - d0) / r1
    if len(stages) == 2:
        return x + (phi / 2 if solver_type == "midpoint" else 1 - phi / e) * slope1
    r2 = (stages[2][0].lam - here.lam) / h
    slope2 = (stages[2][1] - d0) / r2
    if solver_type == "midpoint":
        return x + (1 - phi / e) * slope2
    first = (r2 * slope1 - r1 * slope2) / (r2 - r1)
    second = 2 * (slope2 - slope1) / (r2 - r1)
    sign = -1 if noise and published else 1
    return x + (1 - phi / e) * first + (sign * 0.5 - (e - phi) / e**2) * second
