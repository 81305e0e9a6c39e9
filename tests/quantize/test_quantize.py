"""Layers in integers under a budget: on the embedded student, judged by pictures that this file makes itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.bundle import Bundle, read_bundle
from fewstep.errors import ArgumentError, CorruptError, GateError, MismatchError, MissingError, UnsupportedError
from fewstep.export.embedded import embedded_bundle
from fewstep.precision import mean_square_of, psnr_of, read_budget
from fewstep.quantize import quantize_bundle
from fewstep.search.sets import Counts, read_prompts, share_prompts
from fewstep.weights.stored import open_tensors

PROMPTS = read_prompts(Path(__file__).parents[2] / "examples" / "shapes.txt")
FEW: dict[str, Any] = {
    **{"prompts": PROMPTS, "pairs": 1, "choose": 4, "held_out": 8, "by": "block", "threads": 1},
    "calls": {"steps": 2},
}
DECODER: dict[str, Any] = {**FEW, "components": ["vae_decoder"], "by": "layer"}
BUDGET = "psnr>=25"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "student"
    return Path(shutil.copytree(embedded_bundle("student")[0].folder, folder))


@pytest.fixture(scope="module")
def lowered(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("lowered") / "student"))
    return quantize_bundle(read_bundle(folder), budget=BUDGET, **FEW)


def table_of(bundle: Bundle) -> dict[str, Any]:
    (stored,) = bundle.precisions
    data: dict[str, Any] = json.loads((bundle.folder / stored.file).read_text())
    return data


def test_held_out_pictures_are_within_the_budget(lowered: Bundle) -> None:
    """Made again here by two pipelines, for the prompts and seeds that the table names."""
    table, (stored,) = table_of(lowered), lowered.precisions
    counts = Counts(search=1, choose=4, held_out=8)
    prompts = share_prompts(PROMPTS, counts, 0)[2]
    first, last = table["seeds"]["held_out"]
    seeds = [*range(first, last + 1)]
    squares = []
    pipes = [fewstep.load(lowered.folder, backend="ort-cpu", budget=b, threads=1) for b in (None, BUDGET)]
    for prompt, seed in zip(prompts, seeds, strict=True):
        one, other = (p(prompt, seed=seed, steps=2).images[0].astype(float) for p in pipes)
        squares.append(np.mean((one - other) ** 2))
    assert psnr_of(float(np.mean(squares))) == pytest.approx(stored.psnr, abs=0.5)
    assert psnr_of(max(squares)) == pytest.approx(stored.worst, abs=0.5)
    assert stored.psnr >= 25
    assert not {s for name, (a, b) in table["seeds"].items() if name != "held_out" for s in range(a, b + 1)} & {*seeds}


def test_nothing_is_lowered_without_a_budget(lowered: Bundle, plain: Path) -> None:
    own, before = read_bundle(lowered.folder), read_bundle(plain)
    assert own.components == before.components
    assert {c.dtype for c in own.components.values()} == {"float32"}
    within = own.within(BUDGET)
    assert within.components["unet"].dtype == within.components["vae_decoder"].dtype == "int8"
    assert within.components["text_encoder"] == before.components["text_encoder"]
    with pytest.raises(MissingError, match=r"int8 at .* dB.*fewstep quantize student"):
        own.within("psnr>=90")
    with pytest.raises(MissingError, match="it has none"):
        before.within(BUDGET)


def test_weights_are_integers_and_every_other_is_as_it_was(lowered: Bundle, plain: Path) -> None:
    part = lowered.within(BUDGET).component("unet")
    stored = open_tensors([lowered.folder / part.weights])
    before = open_tensors([plain / read_bundle(plain).component("unet").weights])
    whole = {n: t for n, t in stored.items() if n in before}
    assert all(t.dtype == before[n].dtype and np.array_equal(t.data, before[n].data) for n, t in whole.items())
    integers = {n.removesuffix("_integers") for n, t in stored.items() if t.dtype == "I8"}
    modules = {m for g in table_of(lowered)["groups"] if g["lowered"] for m in g["layers"]}
    small = {n for n in before if before[n].data.nbytes < 4096}
    assert integers | small >= {n for n in before if n.removeprefix("model.").removesuffix(".weight") in modules}
    assert not integers & whole.keys(), "no weight is there twice"
    assert (lowered.folder / part.weights).stat().st_size < (plain / "unet.safetensors").stat().st_size


def test_the_table_says_what_was_done(lowered: Bundle) -> None:
    table = table_of(lowered)
    assert table["budget"] == BUDGET
    assert table["reached"]["pictures"] == 8
    assert {g["form"] for g in table["groups"]} == {"int8"}
    assert all(g["multiplications"] > 0 and g["psnr_alone"] > 20 for g in table["groups"])
    low = [g for g in table["groups"] if g["lowered"]]
    assert low
    assert all(times["plain_ms"] > 0 and times["ms"] > 0 for times in table["evaluations"].values())


def test_engines_are_gated_by_their_own_error(lowered: Bundle) -> None:
    from fewstep.engines.gate.verify import judged_by_own, load_cases, verify_graph

    within = lowered.within(BUDGET)
    cases = load_cases(within)
    assert all(verify_graph(within, name, cases).passed for name in within.components)
    error = within.components["unet"].source["relative_l2"]
    assert 1e-3 < error < 0.5
    strict = replace(within.components["unet"], source={**within.components["unet"].source, "relative_l2": error / 4})
    worse = replace(within, components={**within.components, "unet": strict})
    assert not verify_graph(worse, "unet", cases).passed
    part = within.components["unet"]
    mixed = judged_by_own(part, [c for c in cases if c.component == "unet"], "bfloat16")
    assert mixed
    for case in mixed:  # an engine whose floats are bfloat16 errs by both
        assert case.torch_error[part.dtype] == pytest.approx(error + case.torch_error["bfloat16"])


def test_a_budget_that_cannot_be_met_says_what_was_reached(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "student"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(GateError, match=r"psnr>=100: .* dB"):
        quantize_bundle(read_bundle(folder), budget="100dB", **DECODER)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_layers(plain: Path, tmp_path: Path) -> None:
    """Killed at each of its stages in turn, beside one that was left alone."""
    alone, folder, work = tmp_path / "alone" / "student", tmp_path / "killed" / "student", tmp_path / "work"
    for place in (alone, folder):
        shutil.copytree(plain, place)
    left = quantize_bundle(read_bundle(alone), budget="45dB", **DECODER)

    def until(limit: float) -> Callable[[str, float], None]:
        def progress(stage: str, share: float) -> None:
            if share >= limit:
                raise Killed

        return progress

    for limit in (0.3, 0.85, 0.98):
        with pytest.raises(Killed):
            quantize_bundle(read_bundle(folder), budget="45dB", work=work, progress=until(limit), **DECODER)
        assert {p.name for p in folder.iterdir()} == {p.name for p in plain.iterdir()}
    with pytest.raises(MismatchError, match="other settings"):
        quantize_bundle(read_bundle(folder), budget="35dB", work=work, **DECODER)
    bundle = quantize_bundle(read_bundle(folder), budget="45dB", work=work, **DECODER)
    one, other = table_of(bundle), table_of(left)
    assert one["groups"] == other["groups"]
    assert {g["lowered"] for g in one["groups"]} == {True, False}
    assert one["reached"] == other["reached"]
    digests = [b.precisions[0].components["vae_decoder"].weights_sha256 for b in (bundle, left)]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_another_search_takes_the_place_of_the_same_budgets(lowered: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lowered.folder, tmp_path / "student"))
    again = quantize_bundle(read_bundle(folder), budget=BUDGET, seed=7, **DECODER)
    (stored,) = again.precisions
    assert [*stored.components] == ["vae_decoder"]
    named = {stored.file, *(f for c in stored.components.values() for f in (c.graph, c.weights))}
    assert {p.name for p in folder.iterdir() if "int8" in p.name} == named, "what nobody names is gone"
    assert read_bundle(folder) == again


def test_a_changed_component_is_refused(lowered: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lowered.folder, tmp_path / "student"))
    place = folder / lowered.precisions[0].components["unet"].weights
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    with pytest.raises(CorruptError, match="SHA-256"):
        fewstep.load(folder, backend="ort-cpu", budget=BUDGET)
    fewstep.load(folder, backend="ort-cpu")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"budget": "psnr"}, ArgumentError),
        ({"budget": "psnr>=5"}, ArgumentError),
        ({"precision": "int3"}, ArgumentError),
        ({"components": ["text_encoder"]}, ArgumentError),
        ({"prompts": ["one", "two"]}, ArgumentError),
        ({"pairs": 0}, ArgumentError),
        ({"size": (30, 30)}, ArgumentError),
    ],
)
def test_wrong_input_is_typed(plain: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        quantize_bundle(read_bundle(plain), **{**FEW, **changes})


def test_a_half_precision_component_is_refused(plain: Path) -> None:
    bundle = read_bundle(plain)
    half = replace(bundle.components["unet"], dtype="float16")
    with pytest.raises(UnsupportedError, match="float16"):
        quantize_bundle(replace(bundle, components={**bundle.components, "unet": half}), **FEW)


@pytest.mark.parametrize("text", ["psnr>=30", "psnr >= 30.0", "30", "30dB", " 30 db ", "PSNR>30"])
def test_budgets_are_read(text: str) -> None:
    assert read_budget(text) == 30.0


@pytest.mark.parametrize("psnr", [10.0, 30.0, 47.3])
def test_decibels_and_levels(psnr: float) -> None:
    assert psnr_of(mean_square_of(psnr)) == pytest.approx(psnr)
    assert psnr_of(255.0**2) == 0.0
    assert psnr_of(0.0) == math.inf


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_tensorrt_rtx_builds_it_without_a_gpu(lowered: Bundle, tmp_path: Path, component: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    from fewstep.engines import BuildOptions, Store, build_engines

    built = build_engines(
        lowered.within(BUDGET),
        backend="tensorrt-rtx",
        components=[component],
        options=BuildOptions(compute_capabilities=("8.9",)),
        store=Store(tmp_path / "store"),
    )[component]
    assert built.entry.facts["quantized"] > 0
    assert built.entry.length > 100_000
    assert built.entry.key.dtype == "int8"
