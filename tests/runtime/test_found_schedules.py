"""Found schedules at the runtime's doors: whose they are, what they are asked with, what pictures record of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.bundle import Bundle, add_schedules, read_bundle, write_manifest
from fewstep.errors import ArgumentError, CorruptError, FewstepError, MismatchError, MissingError, UnsafeFileError
from fewstep.export.embedded import embedded_bundle
from fewstep.export.swap import swap_parts
from fewstep.runtime.pictures.parameters import check_parameters, command_line
from fewstep.runtime.programs import choose_program, choose_sampling
from fewstep.runtime.request import Request, make_request
from fewstep.schedules import FoundSchedules, NoiseSchedule, compile_program
from fewstep.schedules.fitted import FittedRow, rows_of
from fewstep.schedules.found import FoundEntry, noise_digest
from fewstep.values import Reader
from hostile import edits

SIZE = (64, 64)


@pytest.fixture(scope="module")
def base() -> Bundle:
    return embedded_bundle("base")[0]


@pytest.fixture(scope="module")
def student() -> Bundle:
    return embedded_bundle("student")[0]


@pytest.fixture(scope="module")
def pipe(base: Bundle) -> fewstep.Pipeline:
    return fewstep.load(base, backend="ort-cpu")


@pytest.fixture
def copied(base: Bundle, tmp_path: Path) -> Path:
    """The base bundle in a folder of the test's own."""
    return Path(shutil.copytree(base.folder, tmp_path / "base"))


def found_for(bundle: Bundle, sampler: str = "dpmpp_2m", **stated: Any) -> FoundSchedules:
    """Of 4 and 6 steps; those of 6 with rows that are not the sampler's own."""
    noise = NoiseSchedule.from_diffusers(bundle.noise_config)
    top = float(noise.sigma_at(len(noise) - 1))
    levels = {n: (*np.geomspace(0.98 * top, 0.15, n).tolist(), 0.0) for n in (4, 6)}
    rows = rows_of(sampler, "x0", noise=noise, sigmas=levels[6])
    changed = tuple(FittedRow(r.a, (1.02 * r.b[0], *r.b[1:])) for r in rows)
    entries = (
        FoundEntry(steps=4, method="endpoint", sigmas=levels[4], figures={"psnr_db": 31.5}),
        FoundEntry(steps=6, method="rows", sigmas=levels[6], kept="x0", rows=changed),
    )
    plain = {"sampler": sampler, "model": bundle.unet_digest, "noise_digest": noise_digest(noise), "entries": entries}
    return FoundSchedules(**{**plain, "guidance": 3.0, "size": SIZE, "made": {"bundle": bundle.name}, **stated})


def asked(bundle: Bundle, **given: Any) -> Request:
    return make_request(bundle, "a red circle", seed=1, **{"guidance": 3.0, "size": SIZE, **given})


def test_the_digest_of_a_network_is_of_its_graph_and_weights(base: Bundle, student: Bundle) -> None:
    unet = base.component("unet")
    assert len(base.unet_digest) == 64
    assert base.unet_digest != student.unet_digest
    for changed in (replace(unet, weights_sha256="0" * 64), replace(unet, graph_sha256="0" * 64)):
        assert replace(base, components={**base.components, "unet": changed}).unet_digest != base.unet_digest
    decoder = replace(base.component("vae_decoder"), weights_sha256="0" * 64)
    assert replace(base, components={**base.components, "vae_decoder": decoder}).unet_digest == base.unet_digest


def test_schedules_as_such_and_by_path_make_the_same_picture(pipe: fewstep.Pipeline, tmp_path: Path) -> None:
    found = found_for(pipe.bundle)
    path = found.save(tmp_path / "f.json")
    call: dict[str, Any] = {"seed": 3, "guidance": 3.0, "steps": 4}
    one, two = pipe("a red circle", schedule=found, **call), pipe("a red circle", schedule=path, **call)
    own = pipe("a red circle", sampler="dpmpp_2m", sigmas=found.entries[0].sigmas, seed=3, guidance=3.0)
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.images, own.images)
    (parameters,) = one.parameters
    assert {k: parameters[k] for k in ("sampler", "schedule", "sampler_name", "schedule_name")} == {
        **{"sampler": "dpmpp_2m", "schedule": "searched"},
        **{"sampler_name": "dpmpp_2m", "schedule_name": "searched"},
    }
    assert (parameters["schedule_digest"], parameters["schedule_method"]) == (found.digest[:12], "endpoint")
    assert "schedule_digest" not in own.parameters[0]
    fitted = pipe("a red circle", schedule=found, **{**call, "steps": 6})
    plain = pipe("a red circle", sampler="dpmpp_2m", sigmas=found.entries[1].sigmas, seed=3, guidance=3.0)
    assert fitted.parameters[0]["schedule_method"] == "rows"
    assert np.abs(fitted.latents - plain.latents).max() > 1e-3, "fitted rows are what is run"


def test_a_text_opens_no_file(base: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = found_for(base).save(tmp_path / "f.json")
    monkeypatch.chdir(tmp_path)
    for text in (str(path), "f.json", "F.JSON", "./f.json"):
        with pytest.raises(ArgumentError, match=r"a text opens no file.*pathlib\.Path"):
            asked(base, schedule=text)
    (tmp_path / "karras").write_bytes(path.read_bytes())
    assert asked(base, schedule="karras", sampler="euler", steps=4).schedule == "karras"
    for other in (3, b"f.json", ["karras"], {"a": 1}):
        with pytest.raises(ArgumentError):
            asked(base, schedule=other)
    with pytest.raises(MissingError):
        asked(base, schedule=Path("none.json"))
    Path("cut.json").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CorruptError):
        asked(base, schedule=Path("cut.json"))


def test_the_sampler_is_the_schedules_own(base: Bundle, student: Bundle) -> None:
    preset = replace(student.defaults, sampler="euler", schedule="trailing", options={"s_noise": 1.0})
    for bundle in (base, student, replace(student, defaults=preset)):
        found = found_for(bundle)
        request = asked(bundle, schedule=found, steps=4)
        assert (request.sampler, request.program.sampler) == ("dpmpp_2m", "dpmpp_2m")
        assert (request.schedule, request.program.schedule) == ("searched", "searched")
        assert not any("schedule" in w or "timesteps" in w for w in request.warnings)
        assert asked(bundle, schedule=found, sampler="DPM++ 2M", steps=4).program is request.program
        with pytest.raises(MismatchError, match="with the sampler euler"):
            asked(bundle, schedule=found, sampler="euler", steps=4)
    with pytest.raises(MismatchError, match="another model"):
        asked(student, schedule=found_for(base), steps=4)
    forced = replace(found_for(base), forced=True)
    assert asked(student, schedule=forced, sampler="euler", steps=4).program.sampler == "dpmpp_2m"


@pytest.mark.parametrize(
    "beside",
    [
        {"compat": "diffusers"},
        {"timesteps": [999, 500, 100, 20]},
        {"sigmas": [10.0, 4.0, 1.0, 0.3, 0.0]},
        {"lower_order_final": False},
        {"options": {"solver_type": "heun"}},
        {"options": {"rho": 7}},
        {"sampler": "DPM++ 2M Karras"},
    ],
    ids=str,
)
def test_what_cannot_stand_beside_them(base: Bundle, beside: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="beside a found schedule"):
        asked(base, schedule=found_for(base), **beside)


def test_steps_that_are_not_asked_for(base: Bundle) -> None:
    found = found_for(base)
    for stated, used in ((5, 5), (4, 4), (1, 4), (40, 6)):
        bundle = replace(base, defaults=replace(base.defaults, steps=stated))
        request = asked(bundle, schedule=found)
        assert (request.steps, request.program.steps, request.program.evaluations) == (used, used, used)
    with pytest.raises(ArgumentError, match="7 steps of a schedule that was found for 4, 6"):
        asked(base, schedule=found, steps=7)


def test_programs_are_kept_by_what_decides_them(base: Bundle) -> None:
    found = found_for(base)
    again = replace(found_for(base), made={"else": 1}, guidance=1.0)
    program = asked(base, schedule=found, steps=4).program
    assert asked(base, schedule=again, steps=4).program is program
    other = replace(found, entries=(replace(found.entries[0], options={"solver_type": "heun"}), found.entries[1]))
    assert asked(base, schedule=other, steps=4).program is not program
    assert asked(base, schedule=found, steps=6).program is not program
    with pytest.raises(MismatchError, match="another noise schedule"):
        asked(base, schedule=replace(found, noise_digest="0" * 64), steps=4)


def test_a_picture_is_entered_where_its_strength_says(base: Bundle, pipe: fewstep.Pipeline) -> None:
    found, picture = found_for(base), np.full((64, 64, 3), 90, np.uint8)
    for steps in (4, 5, 6):
        request = asked(base, schedule=found, steps=steps, image=picture, strength=0.5)
        skipped = steps - int(0.5 * steps)
        assert (request.program.start, request.program.evaluations) == (skipped, steps - skipped)
        noise = NoiseSchedule.from_diffusers(base.noise_config)
        np.testing.assert_array_equal(request.program.a, found.program(steps, noise=noise, start=skipped).a)
    result = pipe("a red circle", image=picture, strength=0.5, schedule=found, steps=6, seed=1, guidance=3.0)
    assert result.parameters[0]["strength"] == 0.5
    with pytest.raises(ArgumentError, match="leaves no step"):
        asked(base, schedule=found, steps=4, image=picture, strength=0.1)


def test_warnings_say_how_it_was_found(base: Bundle) -> None:
    found = found_for(base)
    assert asked(base, schedule=found).warnings == ()
    words = " ".join(asked(base, schedule=found, guidance=7.0, size=(64, 96)).warnings)
    assert "found at guidance 3" in words
    assert "found at 64x64" in words


def test_other_weights_are_another_model(base: Bundle, copied: Path) -> None:
    add_schedules(copied, found_for(base))
    pipe = fewstep.load(copied, backend="ort-cpu", swappable=True)
    call: dict[str, Any] = {"steps": 4, "seed": 1, "guidance": 3.0}
    before = pipe("x", schedule="searched", sampler="dpmpp_2m", **call)
    digest = pipe.bundle.unet_digest
    pipe.load_weights(embedded_bundle("student")[0], gate=False)
    assert pipe.bundle.unet_digest != digest
    with pytest.raises(MismatchError, match="another model"):
        pipe("x", schedule=found_for(base), **call)
    with pytest.raises(ArgumentError, match="holds no searched schedule"):
        pipe("x", schedule="searched", sampler="dpmpp_2m", **call)
    merged = replace(pipe.bundle.component("unet"), weights_sha256="0" * 64)
    changed = replace(read_bundle(copied), components={**pipe.bundle.components, "unet": merged})
    with pytest.raises(ArgumentError, match="with other weights than it was found for"):
        asked(changed, schedule="searched", sampler="dpmpp_2m", steps=4)
    pipe.load_weights()
    assert pipe.bundle.unet_digest == digest
    np.testing.assert_array_equal(pipe("x", schedule="searched", sampler="dpmpp_2m", **call).images, before.images)


def test_a_bundle_holds_them(base: Bundle, copied: Path) -> None:
    found, single = found_for(base), found_for(base, "euler")
    plain = json.loads((copied / "bundle.json").read_text())
    assert "schedules" not in plain
    bundle = add_schedules(copied, found)
    assert [s.sampler for s in bundle.schedules] == ["dpmpp_2m"]
    bundle = add_schedules(copied, replace(single, forced=True))
    assert bundle == read_bundle(copied)
    assert [(s.sampler, s.file) for s in bundle.schedules] == [
        ("dpmpp_2m", "searched_dpmpp_2m.json"),
        ("euler", "searched_euler.json"),
    ]
    stated = json.loads((copied / "bundle.json").read_text())
    assert {k: v for k, v in stated.items() if k != "schedules"} == plain
    assert bundle.searched("dpmpp_2m") == found
    assert bundle.searched("euler") == single
    for sampler in ("dpmpp_2m", "euler"):
        request = asked(bundle, schedule="Searched", sampler=sampler, steps=4)
        assert (request.schedule, request.program.sampler, request.program.schedule) == (
            *("searched", sampler, "searched"),
        )
    moved = replace(found, entries=(found.entries[0],))
    assert add_schedules(copied, moved).searched("dpmpp_2m") == moved
    assert sorted(p.name for p in copied.iterdir() if "searched" in p.name or p.name.startswith(".")) == [
        "searched_dpmpp_2m.json",
        "searched_euler.json",
    ]


def test_the_bundles_own_are_those_of_its_sampler(base: Bundle, copied: Path) -> None:
    with pytest.raises(ArgumentError, match="holds no searched schedule;"):
        asked(base, schedule="searched")
    bundle = add_schedules(copied, found_for(base))
    with pytest.raises(ArgumentError, match="no searched schedule for lms; expected sampler dpmpp_2m"):
        asked(bundle, schedule="searched", sampler="lms")
    for sampler, schedule in (("DPM++ 2M Karras", None), ("dpmpp_2m", "karras")):
        defaults = replace(bundle.defaults, sampler=sampler, schedule=schedule, steps=4)
        assert asked(replace(bundle, defaults=defaults), schedule="searched").program.schedule == "searched"
    named = replace(bundle, defaults=replace(bundle.defaults, sampler="dpmpp_2m", schedule="searched", steps=4))
    request = asked(named)
    assert (request.schedule, request.program.schedule, request.found) == ("searched", "searched", found_for(base))
    assert asked(named, sampler="euler").program.schedule != "searched"
    scheduler = {**bundle.scheduler, "_class_name": "DPMSolverMultistepScheduler"}
    plain = replace(bundle, scheduler=scheduler, defaults=replace(bundle.defaults, sampler=None, schedule=None))
    assert asked(plain, schedule="searched", steps=4).sampler == "dpmpp_2m"


def test_another_models_are_not_stored(base: Bundle, student: Bundle, copied: Path) -> None:
    before = (copied / "bundle.json").read_bytes()
    wrong = found_for(student)
    high = FoundEntry(steps=2, method="known", sigmas=(1e5, 1.0, 0.0))
    for found, error in (
        (wrong, MismatchError),
        (replace(wrong, forced=True), MismatchError),
        (replace(found_for(base), noise_digest="0" * 64), MismatchError),
        (replace(found_for(base), entries=(high,)), ArgumentError),
    ):
        with pytest.raises(error):
            add_schedules(copied, found)
    assert (copied / "bundle.json").read_bytes() == before
    assert not list(copied.glob("*searched*"))


def test_they_go_with_the_network_where_parts_are_replaced(base: Bundle, student: Bundle, copied: Path) -> None:
    bundle = add_schedules(copied, found_for(base))
    kept = swap_parts(bundle, {"vae": student})
    assert kept.searched("dpmpp_2m") == found_for(base)
    assert asked(kept, schedule="searched", sampler="dpmpp_2m").found == found_for(base)
    other = swap_parts(bundle, {"unet": student})
    assert other.schedules == ()
    assert not (other.folder / bundle.schedules[0].file).exists()


@pytest.mark.parametrize("place", ["manifest", "file"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_write_that_fails_leaves_the_bundle_as_it_was(base: Bundle, copied: Path, place: str, stored: bool) -> None:
    """The names that are written to first are folders, as no file can be put over one."""
    import os

    found = found_for(base)
    if stored:
        add_schedules(copied, found)
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    blocked = "searched_dpmpp_2m.json" if place == "file" else "bundle.json"
    part = copied / f".{blocked}.{os.getpid()}.part"
    part.mkdir()
    with pytest.raises((FewstepError, OSError)):
        add_schedules(copied, replace(found, entries=(found.entries[0],)))
    part.rmdir()
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
    assert add_schedules(copied, found).searched("dpmpp_2m") == found


def test_a_stored_file_is_the_one_that_is_stated(base: Bundle, copied: Path) -> None:
    file = copied / "searched_dpmpp_2m.json"
    text = found_for(base).to_text()

    def stated(**changes: Any) -> Bundle:
        write_manifest(replace(base, folder=copied))
        bundle = add_schedules(copied, found_for(base))
        (one,) = bundle.schedules
        write_manifest(replace(bundle, schedules=(replace(one, **changes),)))
        return read_bundle(copied)

    def refused(error: type[FewstepError], match: str, bundle: Bundle, sampler: str = "dpmpp_2m") -> None:
        with pytest.raises(error, match=match):
            asked(bundle, schedule="searched", sampler=sampler)

    bundle = stated()
    file.write_text(text.replace("endpoint", "klub"))
    refused(CorruptError, "is not the file that bundle.json states", bundle)
    file.unlink()
    refused(MissingError, "has no file", bundle)
    (copied / "elsewhere.json").write_text(text)
    file.symlink_to(copied / "elsewhere.json")
    refused(UnsafeFileError, "is a link", bundle)
    file.unlink()
    refused(CorruptError, "holds schedules for dpmpp_2m", stated(sampler="euler"), "euler")
    refused(UnsafeFileError, "plain name", stated(file="../x.json"))


def test_edited_manifests_are_corrupt_or_bundles(base: Bundle, copied: Path) -> None:
    add_schedules(copied, found_for(base, "euler"))
    add_schedules(copied, found_for(base))
    data = json.loads((copied / "bundle.json").read_text())
    of_each = [("schedules", i, k) for i in (0, 1) for k in ("sampler", "file", "sha256")]
    among: list[tuple[str | int, ...]] = [*of_each, ("schedules", 0), ("schedules", 1), ("schedules",)]
    refused, read = 0, 0
    for name, changed in edits(data, 400, seed=3, among=among):
        (copied / "bundle.json").write_text(json.dumps(changed))
        try:
            asked(read_bundle(copied), schedule="searched", sampler="euler", steps=4)
            read += 1
        except FewstepError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{name}: {error!r}"[:300])
    assert refused > 200
    assert read > 10
    twice = {**data, "schedules": [data["schedules"][0]] * 2}
    (copied / "bundle.json").write_text(json.dumps(twice))
    with pytest.raises(CorruptError, match="one for each sampler"):
        read_bundle(copied)


def test_a_digest_is_that_of_what_is_asked_for(base: Bundle, copied: Path) -> None:
    found = found_for(base)
    digest = found.digest[:12]
    for asking in (digest, found.digest):
        assert asked(base, schedule=found, steps=4, schedule_digest=asking).found == found
    with pytest.raises(MismatchError, match="expected the one of digest 000000000000"):
        asked(base, schedule=found, steps=4, schedule_digest="0" * 12)
    with pytest.raises(ArgumentError, match=f"the one of digest {digest} is asked for"):
        asked(base, schedule="searched", sampler="dpmpp_2m", schedule_digest=digest)
    for schedule in (None, "karras"):
        with pytest.raises(ArgumentError, match=f"the digest {digest}"):
            asked(base, sampler="euler", schedule=schedule, schedule_digest=digest)
    for wrong in ("", "x" * 12, digest.upper() + "A", 3, "0" * 65):
        with pytest.raises(ArgumentError, match="hexadecimal"):
            asked(base, schedule=found, steps=4, schedule_digest=wrong)
    bundle = add_schedules(copied, found)
    assert asked(bundle, schedule="searched", sampler="dpmpp_2m", schedule_digest=digest).found == found
    with pytest.raises(MismatchError, match="digest 000000000000"):
        asked(bundle, schedule="searched", sampler="dpmpp_2m", schedule_digest="0" * 12)


def test_the_command_of_a_picture_names_the_digest(pipe: fewstep.Pipeline) -> None:
    found = found_for(pipe.bundle)
    (parameters,) = pipe("a red circle", schedule=found, steps=4, seed=3, guidance=3.0).parameters
    check_parameters(json.loads(json.dumps(parameters)), Reader(place="it"))
    words = command_line(parameters, "x.png").split()
    assert "--schedule=searched" in words
    assert "--sampler=dpmpp_2m" in words
    assert f"--schedule-digest={found.digest[:12]}" in words
    for key, value in (("schedule_digest", "; rm"), ("schedule_digest", 3), ("schedule_method", "magic")):
        with pytest.raises(CorruptError):
            check_parameters({**parameters, key: value}, Reader(place="it"))


def test_choosing_by_name_finds_them_too(base: Bundle, copied: Path) -> None:
    bundle = add_schedules(copied, found_for(base))
    chosen = choose_sampling(bundle, sampler="dpmpp_2m", schedule="searched", steps=4, options={})
    assert (chosen.found, chosen.schedule, chosen.spaces_anew) == (found_for(base), "searched", False)
    program = choose_program(bundle, sampler="dpmpp_2m", schedule="searched", steps=5, options={})
    noise = NoiseSchedule.from_diffusers(base.noise_config)
    longer = found_for(base).entries[1]
    inner = np.interp(np.linspace(0, 5, 5), np.arange(6), np.log(longer.sigmas[:-1]))
    expected = compile_program("dpmpp_2m", noise=noise, sigmas=[*np.exp(inner), 0.0])
    np.testing.assert_allclose(program.sigmas, expected.sigmas, rtol=1e-12)
