"""Linear multistep samplers on eps: LMS and DEIS in VE coordinates (dx/dsigma = eps), PLMS in VP ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from ..algebra import Form, Tape
from ..levels import Level, Path
from .dpmpp import orders
from .euler import K_DIFFUSION
from .sampler import sampler


def lagrange(nodes: Sequence[float], j: int) -> list[float]:
    """Coefficients, lowest power first, of the polynomial that is 1 at nodes[j] and 0 at the others."""
    polynomial = [1.0]
    for k, node in enumerate(nodes):
        if k != j:
            shifted, kept = [0.0, *polynomial], [*polynomial, 0.0]
            polynomial = [(low - node * c) / (nodes[j] - node) for low, c in zip(shifted, kept, strict=True)]
    return polynomial


@sampler(space="ve", group="sigma", order=4, source=K_DIFFUSION, diffusers="LMSDiscreteScheduler")
def lms(model: Tape, path: Path, x: Form, *, order: int = 4, restart: bool = True) -> Form:
    """Adams-Bashforth with variable steps in sigma (Katherine Crowson, k-diffusion): the interpolant, integrated.

    restart: after skipped steps the order builds up anew; False takes the coefficients of the full order over
    what little history there is, as diffusers does, and leaves noise behind.
    """
    slopes: list[Form] = []
    sigmas = [here.sigma for here, _ in path.pairs]
    before = [level.sigma for level in path.before] if not restart else []
    for i, (here, there) in enumerate(path.pairs):
        slopes = [model(x, here, keep="eps").eps, *slopes[: order - 1]]
        nodes = [sigma - here.sigma for sigma in [*before, *sigmas[: i + 1]][::-1][:order]]
        dt = there.sigma - here.sigma
        for j, slope in enumerate(slopes):
            weight = sum(c * dt ** (k + 1) / (k + 1) for k, c in enumerate(lagrange(nodes, j)))
            x = x + weight * slope
    return x


_deis = partial(
    sampler,
    space="ve",
    latent_space="vp",
    group="lambda",
    source="Zhang & Chen 2022, arXiv 2204.13902",
    diffusers="DEISMultistepScheduler",
    clips="eps",
)


@_deis("deis_1", order=1, presets={"order": 1})
@_deis("deis_2", order=2, presets={"order": 2})
@_deis("deis_3", order=3, presets={"order": 3}, aliases=["deis"])
def deis(model: Tape, path: Path, x: Form, *, order: int = 2, lower_order_final: bool = True) -> Form:
    """DEIS (Zhang & Chen 2022, arXiv 2204.13902), log-rho form: eps interpolated in ln(sigma), integrated in sigma.

    The weights sum to sigma' - sigma, so that a step is x0 + sigma' eps and weighted differences from the newest eps.
    """
    known: list[tuple[float, Form]] = []
    chosen = orders(path, order, lower_order_final=lower_order_final, euler_at_final=False)
    for i, (here, there) in enumerate(path.pairs):
        remembered = any(k > later for later, k in enumerate(chosen[i + 1 :], 1))
        at = model(x, here, keep="eps" if remembered else "out")
        known = [(-here.lam, at.eps), *known[: order - 1]]
        nodes = [log_sigma + here.lam for log_sigma, _ in known[: chosen[i]]]
        x = at.x0 + there.sigma * at.eps
        for j in range(1, len(nodes)):
            weight = here.sigma * _exponential_integral(lagrange(nodes, j), here.lam - there.lam)
            x = x + weight * (known[j][1] - at.eps)
    return x


def _exponential_integral(polynomial: Sequence[float], end: float) -> float:
    """The integral of polynomial(u) e^u from 0 to `end`; the k-th moment is u^k e^u minus k times the one before."""
    total, moment = 0.0, 0.0
    for k, c in enumerate(polynomial):
        moment = math.expm1(end) if k == 0 else end**k * math.exp(end) - k * moment
        total += c * moment
    return total


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def transfer(x: Form, eps: Form, here: Level, there: Level) -> Form:
    """DDIM's step for a given eps (PNDM's eq. 11)."""
    return there.alpha / here.alpha * x + (there.s - there.alpha * here.s / here.alpha) * eps


@sampler(
    space="vp",
    group="ddpm",
    order=2,
    source="Liu et al. 2022, arXiv 2202.09778",
    extra_evaluations=1,
    diffusers="PNDMScheduler",
    aliases=["pndm"],
)
def plms(model: Tape, path: Path, x: Form, *, mix_raw: bool = False) -> Form:
    """Liu et al. 2022 (PNDM, arXiv 2202.09778), pseudo linear multistep: Adams-Bashforth on eps, DDIM's transfer.

    The first step is done twice, the second time with the mean of eps at both of its ends, so there is one
    evaluation more than steps. mix_raw: combine raw outputs and turn the sum into eps after (diffusers; differs
    for v prediction).
    """

    def combined(terms: Sequence[tuple[float, Form]], state: Form, level: Level) -> Form:
        mix: Form = sum((w * term for w, term in terms[1:]), start=terms[0][0] * terms[0][1])
        if not mix_raw:
            return mix
        reading = model.precondition.at(level)
        return reading.eps_x * state + reading.eps_out * mix

    known: list[Form] = []
    anchor = x
    for count, (at, here, there) in enumerate(_plms_calls(path)):
        answer = model(x, at, keep="out" if mix_raw else "eps")
        value = answer.out if mix_raw else answer.eps
        if count == 1:
            x = transfer(anchor, combined([(0.5, value), (0.5, known[0])], anchor, here), here, there)
            continue
        known = [value, *known[:3]]
        x = transfer(x, combined(list(zip(ADAMS_BASHFORTH[len(known) - 1], known, strict=True)), x, here), here, there)
    return x


RUNGE_KUTTA = 12
"""Evaluations of the three Runge-Kutta steps with which PNDM begins."""


def pndm(model: Tape, path: Path, x: Form) -> Form:
    """Liu et al. 2022 (PNDM, arXiv 2202.09778), Algorithm 2: three pseudo Runge-Kutta steps, then `plms` of order 4.

    Each of the three takes four evaluations, every transfer from the state that the first of them saw, the last by
    (e1 + 2 e2 + 2 e3 + e4) / 6. Raw outputs are combined, as in diffusers. `path` has a pair an evaluation.
    """

    def transferred(state: Form, mix: Form, here: Level, there: Level) -> Form:
        reading = model.precondition.at(here)
        return transfer(state, reading.eps_x * state + reading.eps_out * mix, here, there)

    known: list[Form] = []
    stages: list[Form] = []
    anchor = x
    for count, (at, here, there) in enumerate(_plms_calls(path)):
        value = model(x, at, keep="out").out
        if count >= RUNGE_KUTTA:
            known = [value, *known[:3]]
            mix: Form = sum((w * term for w, term in zip(ADAMS_BASHFORTH[-1], known, strict=True)), start=0.0 * value)
            x = transferred(x, mix, here, there)
            continue
        if count % 4 == 0:
            anchor, stages, known = x, [], [value, *known]
        stages.append(value)
        first, *middle, last = stages if len(stages) == 4 else [value, value]
        mix = value if not middle else (first + 2.0 * (middle[0] + middle[1]) + last) / 6.0
        x = transferred(anchor, mix, here, there)
    return x


def _plms_calls(path: Path) -> list[tuple[Level, Level, Level]]:
    """(where the network is called, from where, to where) for each evaluation."""
    if path.calls is not None:
        return [(at, here, there) for at, (here, there) in zip(path.calls, path.pairs, strict=True)]
    calls = [(here, here, there) for here, there in path.pairs]
    if len(calls) > 1:
        _, here, there = calls[0]
        calls.insert(1, (there, here, there))
    return calls
