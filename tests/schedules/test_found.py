"""Found schedules: the file by type and range, its programs, and fitted rows that are a sampler's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.errors import ArgumentError, CorruptError, FewstepError, MismatchError, MissingError, UnsupportedError
from fewstep.schedules import FoundSchedules, NoiseSchedule, Program, compile_program, load_schedules
from fewstep.schedules.fitted import FittedRow, fitted_program, kept_by, rows_of
from fewstep.schedules.found import FoundEntry, interpolate_levels, noise_digest, parse_schedules
from fewstep.schedules.names import SEARCHED, resolve_schedule
from fewstep.schedules.solvers.registry import SAMPLERS
from hostile import edits

NOISE = NoiseSchedule.scaled_linear()
SIGMAS = (14.6146, 6.1, 2.6, 1.1, 0.45, 0.15, 0.0)
OF = "ab" * 32


def entry(steps: int, **stated: Any) -> FoundEntry:
    levels = (*np.geomspace(14.6, 0.2, steps).tolist(), 0.0)
    return FoundEntry(**{"steps": steps, "method": "endpoint", "sigmas": levels, **stated})


def fitted(steps: int) -> FoundEntry:
    plain = entry(steps)
    rows = rows_of("dpmpp_2m", "x0", noise=NOISE, sigmas=plain.sigmas)
    moved = tuple(FittedRow(1.001 * r.a, r.b) for r in rows)
    return replace(plain, method="rows", kept="x0", rows=moved, between=plain.sigmas, figures={"psnr_db": 30.0})


def found(**stated: Any) -> FoundSchedules:
    fed = tuple(np.linspace(990.5, 20.25, 3).tolist())
    entries = (entry(3, fed=fed, options={"solver_type": "heun"}), entry(5), fitted(8))
    plain: dict[str, Any] = {"sampler": "dpmpp_2m", "model": OF, "noise_digest": noise_digest(NOISE), "guidance": 5.0}
    return FoundSchedules(**{**plain, "size": (64, 64), "entries": entries, "made": {"bundle": "b"}, **stated})


def network(x: Any, t: float) -> Any:
    """Not linear in anything."""
    return np.tanh(0.3 * x + 0.001 * t) + 0.1 * np.cos(x * (1.0 + t / 500.0))


def outcome(program: Program) -> Any:
    draw = np.random.default_rng(3)
    gaussian, latent = draw.standard_normal((2, 8)), draw.standard_normal((2, 8))

    def no_noise() -> Any:
        raise AssertionError("a sampler without noise drew some")

    return program.run(network, gaussian, no_noise, latent)


def fitting() -> list[str]:
    names = []
    for name in SAMPLERS:
        try:
            kept_by(name, noise=NOISE)
            names.append(name)
        except UnsupportedError:
            continue
    return names


def test_the_samplers_that_can_be_fitted_are_these() -> None:
    quiet = ("never", "with s_churn", "with eta > 0")
    drawing = {name for name, sampler in SAMPLERS.items() if sampler.draws not in quiet}
    assert set(fitting()) == SAMPLERS.keys() - drawing - {"edm_euler"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", fitting())
def test_a_samplers_own_rows_are_the_sampler(sampler: str, prediction: str) -> None:
    kept = kept_by(sampler, noise=NOISE)
    rows = rows_of(sampler, kept, noise=NOISE, sigmas=SIGMAS)
    other = [FittedRow(r.a, tuple(1.01 * b for b in r.b)) for r in rows]
    for start in (0, 2):
        asked: dict[str, Any] = {"noise": NOISE, "sigmas": SIGMAS, "prediction": prediction, "start": start}
        own = compile_program(sampler, **asked)
        fitted_as = fitted_program(sampler, rows, kept, **asked)
        for name in ("timesteps", "sigmas", "init_latent", "init_noise", "start", "steps", "prediction"):
            np.testing.assert_array_equal(getattr(fitted_as, name), getattr(own, name))
        for name in ("x0_x", "x0_out", "state_scale"):
            np.testing.assert_allclose(getattr(fitted_as, name), getattr(own, name), rtol=1e-12)
        np.testing.assert_allclose(outcome(fitted_as), outcome(own), rtol=1e-9, atol=1e-12)
        changed = np.abs(outcome(fitted_program(sampler, other, kept, **asked)) - outcome(own)).max()
        reads_before = all(len(r.b) > i + 1 for i, r in enumerate(rows[start:]))
        kept_own = start and (sampler == "plms" or reads_before)
        assert (changed == 0.0) if kept_own else (changed > 1e-4), "the rows are what is run"


def test_rows_that_do_not_fit_are_refused() -> None:
    rows = rows_of("dpmpp_2m", "x0", noise=NOISE, sigmas=SIGMAS)
    for wrong in (rows[:-1], [*rows, rows[0]], [FittedRow(1.0, ()), *rows[1:]], [FittedRow(1.0, (0.1,) * 6)] * 6):
        with pytest.raises(ArgumentError, match="fitted rows"):
            fitted_program("dpmpp_2m", wrong, "x0", noise=NOISE, sigmas=SIGMAS)
    with pytest.raises(UnsupportedError, match="draws noise"):
        kept_by("euler_ancestral", noise=NOISE)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    one = found()
    read = load_schedules(one.save(tmp_path / "f.json"))
    assert read == one
    assert read.digest == one.digest
    assert load_schedules(str(tmp_path / "f.json"), force=True) == replace(one, forced=True)
    assert fewstep.load_schedules is load_schedules
    with pytest.raises(MissingError):
        load_schedules(tmp_path / "none.json")
    with pytest.raises(MissingError):
        load_schedules(tmp_path)


def test_the_digest_is_of_what_decides_the_pictures() -> None:
    one = found()
    first, *others = one.entries
    assert found(made={}, guidance=1.0).digest == one.digest
    assert found(entries=(replace(first, figures={"psnr_db": 1.0}), *others)).digest == one.digest
    for changed in (replace(first, fed=None), replace(first, options={}), entry(4)):
        assert found(entries=(changed, *others)).digest != one.digest
    assert found(sampler="unipc_2").digest != one.digest


def test_programs_are_the_entries() -> None:
    one = found()
    assert one.steps == (3, 5, 8)
    three = one.program(3, noise=NOISE)
    assert three.schedule == SEARCHED
    np.testing.assert_array_equal(three.timesteps, one.entries[0].fed)
    plain = compile_program("dpmpp_2m", noise=NOISE, sigmas=one.entries[0].sigmas, solver_type="midpoint")
    assert not np.array_equal(three.b, plain.b), "the entry's options are used"
    eight, own = one.program(8, noise=NOISE), compile_program("dpmpp_2m", noise=NOISE, sigmas=one.entries[2].sigmas)
    assert np.abs(outcome(eight) - outcome(own)).max() > 1e-4
    for start in (0, 2):
        assert one.program(5, noise=NOISE, start=start).start == start
        between = one.program(6, noise=NOISE, start=start)
        assert (between.steps, between.schedule, between.evaluations) == (6, SEARCHED, 6 - start)
    for steps in (2, 9):
        with pytest.raises(ArgumentError, match=f"{steps} steps of a schedule"):
            one.program(steps, noise=NOISE)
    assert [one.nearest(n) for n in (1, 3, 6, 40)] == [3, 3, 6, 8]


def test_levels_between_searched_ones() -> None:
    assert interpolate_levels((10.0, 1.0, 0.1, 0.0), 3) == pytest.approx((10.0, 1.0, 0.1, 0.0))
    assert interpolate_levels((10.0, 1.0, 0.1, 0.0), 2) == pytest.approx((10.0, 0.1, 0.0))
    assert interpolate_levels((10.0, 1.0, 0.1), 4) == pytest.approx((10.0, 10**0.5, 1.0, 0.1**0.5, 0.1))
    assert interpolate_levels((10.0, 1.0, 0.0), 1) == (10.0, 0.0)


def test_it_is_for_one_model_one_sampler_and_one_noise_schedule() -> None:
    one, other = found(), NoiseSchedule.from_diffusers({"_class_name": "DDIMScheduler", "beta_schedule": "linear"})
    one.check(model=OF, sampler=None)
    one.check(model=OF, sampler="DPM++ 2M")
    with pytest.raises(MismatchError, match="another model"):
        one.check(model="cd" * 32, sampler=None)
    with pytest.raises(MismatchError, match="the sampler euler"):
        one.check(model=OF, sampler="euler")
    with pytest.raises(MismatchError, match="another noise schedule"):
        one.program(5, noise=other)
    forced = replace(one, forced=True)
    forced.check(model="cd" * 32, sampler="euler")
    assert forced.program(5, noise=other).evaluations == 5


def test_warnings_say_what_a_request_goes_against() -> None:
    one = found()
    assert one.warnings(guidance=5.0, size=(64, 64)) == []
    assert [w.split(",")[0] for w in one.warnings(guidance=7.5, size=(64, 96))] == [
        "the schedule was found at guidance 5",
        "the schedule was found at 64x64",
    ]
    assert found(guidance=1.0).warnings(guidance=0.0, size=(64, 64)) == [], "neither is guidance"


def test_the_name_needs_a_bundle() -> None:
    assert resolve_schedule("Searched") == SEARCHED
    for compat in (None, "diffusers"):
        with pytest.raises(ArgumentError, match="which no sampler has by itself"):
            compile_program("euler", schedule=SEARCHED, steps=4, noise=NOISE, compat=compat)


def test_no_edit_of_a_file_surprises() -> None:
    """1500 edits: typed errors, or schedules of which every number of steps is a program or a typed error."""
    data, refused, made = found().to_json(), 0, 0
    for name, changed in edits(data, 1500, seed=5):
        try:
            read = parse_schedules(json.dumps(changed), "it")
            for steps in {*read.steps, 4, 6}:
                read.program(steps, noise=NOISE)
                read.program(steps, noise=NOISE, start=2)
            read.check(model=OF, sampler="dpmpp_2m")
            read.warnings(guidance=2.0, size=(8, 8))
            made += 1
        except FewstepError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{name}: {error!r}"[:400])
    assert refused > 700
    assert made > 100


def test_no_cut_of_a_file_is_one() -> None:
    text = json.dumps(found().to_json())
    for at in range(0, len(text), 7):
        with pytest.raises(CorruptError):
            parse_schedules(text[:at], "it")
    for whole in (b"\xff" + text.encode(), text.encode("utf-16"), "[]", "null", "3"):
        with pytest.raises(CorruptError):
            parse_schedules(whole, "it")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[("options", {n: 1}) for n in ("noise", "start", "sigmas", "sampler", "schedule", "steps", "last_sigma", "x")],
        ("options", {"solver_type": "euler"}),
        ("options", {"lower_order_final": 1}),
        ("sigmas", [1.0, 2.0, 0.5, 0.0]),
        ("sigmas", [3.0, 2.0, 1.0, -1.0]),
        ("sigmas", [3.0, 2.0, 1e-9, 0.0]),
        ("fed", [1.0]),
        ("method", "guess"),
        ("steps", 4),
    ],
)
def test_an_entry_that_is_none_is_corrupt(place: str, value: Any) -> None:
    data = found().to_json()
    data["entries"][0][place] = value
    with pytest.raises(CorruptError):
        parse_schedules(json.dumps(data), "it")


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "sde-dpmsolver++ x", "eulr"])
def test_a_sampler_is_named_plainly(name: str) -> None:
    with pytest.raises(FewstepError):
        parse_schedules(json.dumps({**found().to_json(), "sampler": name}), "it")
