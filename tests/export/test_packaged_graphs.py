"""Graphs of the standard architectures travel with the package, so that exporting such a checkpoint needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from fewstep.engines.graph.accounting import ATTENTION, count_operators
from fewstep.engines.graph.rewrite import rewrite_for_cpu
from fewstep.export.embedded import embedded_checkpoint
from fewstep.export.plan import PRECISIONS
from fewstep.export.trace.graphs import find_graph, graph_key
from fewstep.weights.layout import plan_layout

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from architectures import CLASSES, standard_configs  # noqa: E402
from package_graphs import PACKAGED, STANDARD, standard_components  # noqa: E402
from random_checkpoint import shapes_of  # noqa: E402

EXPORT = """
import sys, json
from fewstep.export import export_bundle
bundle = export_bundle(sys.argv[1], sys.argv[2], dtype=sys.argv[3], gate=False)
heavy = sorted({"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir"} & set(sys.modules))
import resource
print(json.dumps({"heavy": heavy, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def export_apart(checkpoint: Path, folder: Path, dtype: str) -> dict:
    """Export in a process of its own, with an empty cache; what it says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(checkpoint), str(folder), dtype],
        env={**os.environ, "FEWSTEP_CACHE_DIR": str(folder.parent / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", STANDARD)
def test_every_component_in_every_precision(name: str) -> None:
    for dtype in PRECISIONS:
        for kind, config in standard_components(name):
            graph = find_graph(graph_key(kind, {**config, "sample_size": 1}, dtype))
            assert graph is not None, f"run tools/package_graphs.py --standard {name}"
            assert (graph.kind, graph.dtype) == (kind, dtype)
            assert {p.dtype for p in graph.parameters} <= {dtype, "int64"}
            layout = plan_layout([(p.name, p.dtype, p.shape) for p in graph.parameters])
            assert layout.sha256 == graph.header_sha256


def test_every_graph_is_sound_onnx() -> None:
    """Types agree at every node: a runtime refuses a graph where float16 meets float32, and tracing does not."""
    for path in PACKAGED.glob("*.graph"):
        graph = find_graph(path.stem)
        assert graph is not None
        model = onnx.load_from_string(graph.onnx)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def sizes_asked(model: onnx.ModelProto, height: int, width: int) -> list[tuple[int, int]]:
    """To which heights and widths a UNet's graph has its upsamplers interpolate for a latent, deepest first."""
    makers = {o: n for n in model.graph.node for o in n.output}
    resizes = [n for n in model.graph.node if n.op_type == "Resize"]
    assert not any(n.input[2] for n in resizes), "a factor instead of a size"
    names = [makers[n.input[3]].input[1] for n in resizes]  # the first is rows and channels
    cut = onnx.utils.Extractor(model).extract_model(["sample"], names)
    for output in cut.graph.output:
        output.type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.INT64, [2]))
    session = onnxruntime.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    return [tuple(v.tolist()) for v in session.run(None, {"sample": np.zeros((2, 4, height, width), np.float32)})]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", [n for n in STANDARD if n != "taesd"])
def test_upsamplers_meet_their_skips_at_every_size(name: str, dtype: str) -> None:
    """Each halving rounds up, so level k has ceil(h / 2^k) cells, and that is what the way up asks for."""
    config = dict(standard_components(name))["unet"]
    graph = find_graph(graph_key("unet", config, dtype))
    assert graph is not None
    model = onnx.load_from_string(graph.onnx)
    levels = range(len(config["block_out_channels"]) - 2, -1, -1)
    for height, width in ((17, 17), (64, 65), (64, 114), (1, 2), (64, 64), (127, 33)):
        expected = [(-(-height >> k), -(-width >> k)) for k in levels]
        assert sizes_asked(model, height, width) == expected


@pytest.mark.parametrize("name", STANDARD)
def test_every_graph_is_sound_as_rewritten_for_the_cpu(name: str) -> None:
    """In float32, at the family's own size: types agree, no normalisation was missed, and every node is read."""
    for kind, config in standard_components(name):
        graph = find_graph(graph_key(kind, {**config, "sample_size": 1}, "float32"))
        assert graph is not None
        dims = {"rows": 1, "prompts": 1, "batch": 1, "height": 64, "width": 64, "tokens": 77}
        rewritten, counts = rewrite_for_cpu(graph.onnx, dims)
        before, after = count_operators(graph.onnx), count_operators(rewritten)
        assert kind != "unet" or counts["Attention"] == before["Attention"]
        assert after["GroupNormalization"] == 0
        assert after["InstanceNormalization"] == before["GroupNormalization"]
        assert sum(after[n] for n in ATTENTION) == before["Attention"]
        model = onnx.load_from_string(rewritten)
        onnx.shape_inference.infer_shapes(model, check_type=True)
        read = {i for n in model.graph.node for i in n.input} | {o.name for o in model.graph.output}
        assert all(read.intersection(n.output) for n in model.graph.node)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd1-lcm"])
def test_graphs_ask_for_the_weights_that_diffusers_has(name: str) -> None:
    """A UNet's and a VAE's graphs use every weight of the library's own class, under its name and in its shape."""
    theirs = {part: shapes_of(part, config) for part, config in standard_configs(name).items()}
    for part in CLASSES:
        kinds = ("vae_decoder", "vae_encoder") if part == "vae" else (part,)
        configs = dict(standard_components(name))
        if part not in theirs:
            continue
        found: dict[str, tuple[int, ...]] = {}
        for kind in kinds:
            graph = find_graph(graph_key(kind, configs[kind], "float16"))
            assert graph is not None
            found |= {p.key.removeprefix("text_model."): p.shape for p in graph.parameters}
        expected = {k.removeprefix("text_model."): s for k, s in theirs[part].items()}
        for key, shape in found.items():
            assert [d for d in expected[key] if d != 1] == [d for d in shape if d != 1], key
        assert part.startswith("text") or set(found) == set(expected)


def test_they_are_small() -> None:
    sizes = {p.name: p.stat().st_size for p in PACKAGED.glob("*.graph")}
    assert max(sizes.values()) < 120_000
    assert sum(sizes.values()) < 2_000_000


def test_an_export_from_packaged_graphs_imports_no_torch(tmp_path: Path) -> None:
    said = export_apart(embedded_checkpoint("base"), tmp_path / "b", "float32")
    assert said["heavy"] == []
    assert not (tmp_path / "cache" / "graphs").exists(), "something was traced"


@pytest.mark.skipif(not os.environ.get("FEWSTEP_FULL_SIZE"), reason="set FEWSTEP_FULL_SIZE to an architecture, as sd1")
def test_a_checkpoint_of_full_size(tmp_path: Path) -> None:
    """4 to 14 GB of random weights, and as much again: within 4 GiB of memory, and without torch."""
    from random_checkpoint import write_checkpoint

    write_checkpoint(os.environ["FEWSTEP_FULL_SIZE"], tmp_path / "checkpoint", "float16")
    said = export_apart(tmp_path / "checkpoint", tmp_path / "b", "float16")
    assert said["heavy"] == []
    assert said["peak"] < 4 * 2**30
