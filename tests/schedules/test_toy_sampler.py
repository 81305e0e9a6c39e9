"""A sampler is one function with its facts: one is added here, found, compiled, run, and taken away."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fewstep.errors import ArgumentError, UnknownNameError
from fewstep.schedules import NoiseSchedule, compile_program, resolve_sampler
from fewstep.schedules.algebra import Form, Tape
from fewstep.schedules.levels import Path
from fewstep.schedules.listing import list_samplers
from fewstep.schedules.solvers.sampler import SAMPLERS, sampler

NOISE = NoiseSchedule.scaled_linear()


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    @sampler(
        "toy_euler",
        space="ve",
        group="sigma",
        order=1,
        source="this test",
        presets={"pull": 1.0},
        aliases={"Toy Euler": {}, "toy_euler_slow": {"pause": 2}},
    )
    def toy_euler(model: Tape, path: Path, x: Form, *, pull: float = 1.0, pause: int = 0) -> Form:
        """Euler's step, written out."""
        for here, there in path.pairs:
            x = x + pull * (there.sigma - here.sigma) * model(x, here).eps
        return x

    yield
    del SAMPLERS["toy_euler"]


def test_it_is_found_listed_and_compiled() -> None:
    assert resolve_sampler("Toy Euler").name == "toy_euler"
    slow = resolve_sampler("toy_euler_slow karras")
    assert (slow.name, slow.schedule, dict(slow.options)) == ("toy_euler", "karras", {"pause": 2})
    listed = {s.name: s for s in list_samplers()}["toy_euler"]
    assert (listed.source, listed.summary, listed.options) == ("this test", "Euler's step, written out", {"pause": 0})
    names = list(SAMPLERS)
    assert names.index("toy_euler") < names.index("ddim"), "it stands at the end of its group"


@pytest.mark.parametrize("schedule", ["trailing", "karras", "ays"])
def test_its_program_is_eulers(schedule: str) -> None:
    ours, euler = (compile_program(n, schedule=schedule, steps=6, noise=NOISE) for n in ("Toy Euler", "euler"))
    gaussian = np.random.default_rng(0).standard_normal((3, 4))

    def run(program: object) -> np.ndarray:
        return program.run(lambda x, t: np.tanh(x + t / 1000), gaussian, lambda: gaussian)  # type: ignore[attr-defined]

    np.testing.assert_allclose(run(ours), run(euler), rtol=1e-12, atol=1e-12)


def test_a_name_is_taken_once_and_options_are_its_own() -> None:
    with pytest.raises(ArgumentError, match="two samplers named 'toy_euler'"):
        sampler("toy_euler", space="ve", group="sigma", order=1, source="")(lambda model, path, x: x)
    with pytest.raises((ArgumentError, UnknownNameError), match="pull"):
        compile_program("toy_euler", steps=2, noise=NOISE, pull=2.0)
