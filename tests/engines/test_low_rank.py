"""Graphs with low-rank inputs: what they compute, against weights that were changed, and who builds them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fewstep.bundle import Bundle
from fewstep.engines import BuildOptions, Store, build_engines, open_engine
from fewstep.engines.graph.low_rank import DOWN, EXTRA_WORDS, UP, add_low_rank
from fewstep.engines.low_rank import RANKS, bucket, no_change, with_low_rank
from fewstep.engines.profile import profiles_for
from fewstep.errors import CorruptError, UnsupportedError

DIMS = {"unet": {"rows": 3, "height": 9, "width": 8, "tokens": 7}, "text_encoder": {"prompts": 3}}


def example(bundle: Bundle, name: str, dims: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    inputs = {}
    for spec in bundle.component(name).inputs:
        shape = spec.resolve(dims)
        floats = random.normal(size=shape).astype(np.float32)
        inputs[spec.name] = floats if spec.dtype == "float32" else random.integers(0, 500, shape).astype(spec.dtype)
    if "clip_skip" in inputs:
        inputs["clip_skip"][...] = 0
    return inputs


def run(engine: Any, inputs: dict[str, np.ndarray], dims: dict[str, int]) -> np.ndarray:
    binding = engine.bind(dims)
    for name, value in inputs.items():
        binding.inputs[name][...] = value
    binding.enqueue()
    return np.array(next(iter(binding.outputs.values())))


def with_weights(bundle: Bundle, name: str, folder: Path, changes: dict[str, np.ndarray]) -> Bundle:
    """The bundle with some weights of a component changed in its file."""
    part = bundle.component(name)
    data = bytearray(bundle.path(part.weights).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for key, change in changes.items():
        begin, end = header[key]["data_offsets"]
        value = np.frombuffer(bytes(data[start + begin : start + end]), np.float32) + change.reshape(-1)
        data[start + begin : start + end] = value.astype(np.float32).tobytes()
    (folder / part.weights).write_bytes(data)
    (folder / part.graph).write_bytes(bundle.read_graph(part))
    changed = replace(part, weights_sha256=hashlib.sha256(data).hexdigest())
    return replace(bundle, folder=folder, components={name: changed} | {
        n: c for n, c in bundle.components.items() if n != name
    })  # fmt: skip


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_each_rows_change_is_that_of_its_weights(sd1_bundle: Bundle, name: str, kernels: bool, tmp_path: Path) -> None:
    """A row of zeros is the plain graph's; another one that of the graph whose weights have the change added."""
    store, dims, rank = Store(tmp_path / "store"), DIMS[name], 5
    adapted = with_low_rank(sd1_bundle, name, kernels=kernels)
    layers = adapted.layers[name]
    inputs = example(adapted, name, {**dims, "rank": rank, "words": 1})
    random = np.random.default_rng(1)
    for packed in (DOWN, UP):
        inputs[packed] = random.normal(0.0, 0.1, inputs[packed].shape).astype(np.float32)
        inputs[packed][0] = 0.0
    engine = open_engine(adapted, name, backend="ort-cpu", store=store)
    ours = run(engine, inputs, {**dims, "rank": rank, "words": 1})
    plain_inputs = {n: v for n, v in inputs.items() if n not in (DOWN, UP, EXTRA_WORDS)}
    plain = run(open_engine(sd1_bundle, name, backend="ort-cpu", store=store), plain_inputs, dims)
    assert relative(ours[0], plain[0]) < 1e-5
    changes = {}
    for layer in layers:
        down = inputs[DOWN][2, layer.down : layer.down + layer.height]
        change = (down @ inputs[UP][2][:, layer.up : layer.up + layer.width]).T
        if len(layer.shape) == 4:
            out, width, *kernel = layer.shape
            change = change.reshape(out, *kernel, width).transpose(0, 3, 1, 2)
        changes[f"model.{layer.module}.weight"] = change
    folder = tmp_path / "changed"
    folder.mkdir()
    other = with_weights(sd1_bundle, name, folder, changes)
    for file in {c.weights for c in other.components.values()} | {c.graph for c in other.components.values()}:
        if not (folder / file).exists():
            (folder / file).write_bytes((sd1_bundle.folder / file).read_bytes())
    store = Store(tmp_path / "other")
    build_engines(other, backend="ort-cpu", components=[name], store=store, gate=False)
    expected = run(open_engine(other, name, backend="ort-cpu", store=store), plain_inputs, dims)
    assert relative(ours[2], expected[2]) < 2e-5
    assert relative(ours[2], plain[2]) > 1e-2, "the change shows"
    kinds = {len(layer.shape) == 4 and layer.shape[2:] != (1, 1) for layer in layers}
    assert (True in kinds) == (kernels and name == "unet")


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_words_beyond_the_table_are_rows_of_the_input(sd1_bundle: Bundle, tmp_path: Path) -> None:
    """An id of the table and a given word of the same vector are one."""
    adapted = with_low_rank(sd1_bundle, "text_encoder", kernels=False)
    size = adapted.vocabularies["text_encoder"]
    dims = {"prompts": 2, "rank": RANKS[0], "words": 2}
    inputs = example(adapted, "text_encoder", dims)
    engine = open_engine(adapted, "text_encoder", backend="ort-cpu", store=Store(tmp_path))
    layers = adapted.layers["text_encoder"]
    extent = layers[-1].down + layers[-1].height, layers[-1].up + layers[-1].width
    inputs |= {n: np.broadcast_to(a, (2, *a.shape)) for n, a in no_change(extent, RANKS[0]).items()}
    from safetensors.numpy import load_file

    weights = load_file(sd1_bundle.path(sd1_bundle.component("text_encoder").weights))
    table = next(v for k, v in weights.items() if k.endswith("token_embedding.weight"))
    inputs[EXTRA_WORDS] = table[[7, 11]]
    inputs["input_ids"][...] = 3
    inputs["input_ids"][:, 5], inputs["input_ids"][:, 9] = 7, 11
    known = run(engine, inputs, dims)
    inputs["input_ids"][:, 5], inputs["input_ids"][:, 9] = size, size + 1
    np.testing.assert_array_equal(run(engine, inputs, dims), known)
    inputs["input_ids"][:, 5] = size + 1
    assert np.abs(run(engine, inputs, dims) - known).max() > 1e-3


def test_tensorrt_rtx_builds_them_without_a_gpu(sd1_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    for name in ("unet", "text_encoder"):
        adapted = with_low_rank(sd1_bundle, name, kernels=True)
        built = build_engines(
            adapted,
            backend="tensorrt-rtx",
            components=[name],
            profiles={name: profiles_for(adapted, sizes=[(64, 64)])[name][:1]},
            options=BuildOptions(compute_capabilities=("8.9",)),
            store=Store(tmp_path),
            gate=False,
        )
        (profile,) = built[name].entry.key.profiles
        assert str(profile.spans["rank"]) == "1:16:128"


def test_ranks_go_by_buckets() -> None:
    assert [bucket(r) for r in (1, 4, 5, 16, 17, 64, 1024, 1025)] == [4, 4, 8, 16, 32, 64, 1024, 1025]


def test_what_has_no_layers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no rows"):
        add_low_rank(b"", kernels=False)
    with pytest.raises(CorruptError):
        add_low_rank(b"\x3a\xff\xff", kernels=False)
