"""TensorRT-RTX's real parser and builder, which need no GPU; and what fewstep says before a GPU is touched."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from fewstep.bundle import LOWERED, Bundle
from fewstep.engines import BuildOptions, BuiltEngine, Profile, Span, Store, build_engines, open_engine, profiles_for
from fewstep.engines.backends.tensorrt import import_tensorrt
from fewstep.engines.backends.tensorrt_build import check_operators
from fewstep.engines.backends.tensorrt_cache import read_cache, write_cache
from fewstep.engines.backends.tensorrt_inspect import check_precision, count_fused_attention
from fewstep.engines.plan import plan_build
from fewstep.errors import (
    ArgumentError,
    CancelledError,
    CorruptError,
    FewstepError,
    MismatchError,
    MissingError,
    MissingExtraError,
    UnsafeFileError,
    UnsupportedError,
)
from small_bundle import SPECS, weights_of, write_bundle

pytest.importorskip("tensorrt_rtx")

ADA = BuildOptions(compute_capabilities=("8.9",))
NO_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU")


def build(
    bundle: Bundle, store: Store, component: str = "unet", options: BuildOptions = ADA, **more: Any
) -> BuiltEngine:
    made = build_engines(
        bundle,
        backend="tensorrt-rtx",
        components=[component],
        store=store,
        options=options,
        **more,
    )
    return made[component]


@pytest.mark.parametrize("component", list(SPECS))
def test_every_component_builds_for_exact_sizes(bundle: Bundle, store: Store, component: str) -> None:
    built = build(bundle, store, component)
    assert built.entry.length > 100_000
    assert built.entry.facts["profiles"] == len(profiles_for(bundle)[component])
    assert built.entry.key.capability == "8.9"
    assert built.entry.key.device == "any"
    assert bytes(built.entry.read()[:4])
    assert build(bundle, store, component).reused


def test_several_exact_profiles_share_one_engine(bundle: Bundle, store: Store) -> None:
    one = build(bundle, store, profiles=profiles_for(bundle, sizes=[(64, 48)], guidance=False))
    five = build(bundle, store, profiles=profiles_for(bundle, sizes=[(64, 48), (32, 32), (48, 64)], batches=[1, 2]))
    assert (one.entry.facts["profiles"], five.entry.facts["profiles"]) == (1, 9)
    assert one.entry.name != five.entry.name


def test_a_dynamic_profile_builds(bundle: Bundle, store: Store) -> None:
    spans = {n: Span(minimum=4, optimum=16, maximum=32) for n in ("height", "width")}
    built = build(bundle, store, profiles=profiles_for(bundle, dynamic=spans))
    assert not any(p.is_exact for p in built.entry.key.profiles)
    assert built.entry.key.profiles[0].admits({"rows": 1, "height": 20, "width": 5, "tokens": 77})


@pytest.mark.parametrize("wanted", [("8.0",), ("12.0", "8.9", "8.6")])
def test_other_gpus_are_built_for_ahead_of_time(bundle: Bundle, store: Store, wanted: tuple[str, ...]) -> None:
    built = build(bundle, store, options=BuildOptions(compute_capabilities=wanted))
    assert built.entry.key.capability == " ".join(sorted(wanted))


def test_the_librarys_own_reason_is_passed_on(bundle: Bundle, store: Store) -> None:
    """TensorRT-RTX 1.7 has no float32 matrix product for compute capability 7.5, and finds out while it builds."""
    turing = BuildOptions(compute_capabilities=("7.5",))
    with pytest.raises(FewstepError, match=r"SM75.*FP32 GEMM is not supported"):
        build(bundle, store, options=turing)
    assert list(store.entries()) == []
    assert build(bundle, store, "text_encoder", turing).entry.key.capability == "7.5"


def test_capturable_engines_and_builder_options_reach_the_key(bundle: Bundle, store: Store) -> None:
    options = replace(ADA, capturable=True, optimization_level=1, workspace_bytes=1 << 28, auxiliary_streams=2)
    built = build(bundle, store, options=options)
    assert built.entry.key.options == {
        "optimization_level": 1,
        "workspace_bytes": 1 << 28,
        "auxiliary_streams": 2,
        "compute_capabilities": ["8.9"],
        "capturable": True,
        "refittable": False,
        "stripped": False,
    }


def test_attention_in_float32_may_be_decomposed(bundle: Bundle, store: Store) -> None:
    facts = build(bundle, store).entry.facts
    assert facts["decomposed_attentions"] == bundle.component("unet").operators["Attention"] == 1
    assert facts["compute_types"] == {"FLOAT": facts["compute_types"]["FLOAT"]}


def test_the_realised_precision_must_be_the_asked_one(tmp_path: Path, store: Store) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    component = replace(bundle.component("unet"), dtype="float16")
    lying = replace(bundle, components={**bundle.components, "unet": component})
    with pytest.raises(MismatchError, match="computes in float; expected float16"):
        build(lying, store)
    assert list(store.entries()) == []


@pytest.mark.parametrize("wanted", ["9.0", "10.0", "current", "6.1"])
def test_a_capability_that_it_does_not_support_is_refused(bundle: Bundle, store: Store, wanted: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"compute capability {wanted}; expected one of 7\.5"):
        build(bundle, store, options=BuildOptions(compute_capabilities=(wanted,)))


def broken(bundle: Bundle, tmp_path: Path, change: str) -> Bundle:
    """The bundle with a graph that is wrong in one way, its manifest true to it."""
    import hashlib
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(bundle.folder, folder)
    path = folder / "unet.onnx"
    if change == "empty":
        path.write_bytes(b"")
    elif change == "text":
        path.write_bytes(b"no graph at all")
    else:
        model = onnx.load(str(path), load_external_data=False)
        node = model.graph.node[0]
        if change == "unknown operator":
            node.op_type = "Confabulate"
        elif change == "unknown input":
            node.input[0] = "nothing"
        elif change == "unknown output name":
            model.graph.output[0].name = model.graph.node[-1].output[0] = "result"
        elif change == "weights elsewhere":
            for initialiser in model.graph.initializer:
                for item in initialiser.external_data:
                    if item.key == "location":
                        item.value = "absent.safetensors"
        path.write_bytes(model.SerializeToString())
    part = replace(bundle.component("unet"), graph_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return replace(bundle, folder=folder, components={**bundle.components, "unet": part})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("empty", CorruptError, "cannot be parsed"),
        ("text", CorruptError, "an ONNX model"),  # read before the parser is asked
        ("unknown operator", CorruptError, r"conv_0.*Confabulate"),
        ("unknown input", CorruptError, "cannot be parsed"),
        ("weights elsewhere", UnsafeFileError, r"lies in the file 'absent\.safetensors'"),
        ("unknown output name", MismatchError, "result of rank 4"),
    ],
)
def test_a_broken_graph_is_refused_in_the_parsers_words(
    bundle: Bundle, store: Store, tmp_path: Path, change: str, error: type[FewstepError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        build(broken(bundle, tmp_path, change), store)
    assert caught.value.exit_code == 4
    assert list(store.entries()) == []
    assert not list(store.root.rglob("*.part"))


def test_a_profile_that_the_graph_cannot_take_is_refused(bundle: Bundle, store: Store) -> None:
    """A tensor of 2^54 elements."""
    huge = Profile.exact({"rows": 1 << 20, "height": 1 << 15, "width": 1 << 15, "tokens": 77})
    with pytest.raises(FewstepError):
        build(bundle, store, profiles={"unet": (huge,)})
    assert list(store.entries()) == []


def test_progress_is_reported_and_a_cancelled_build_leaves_nothing(bundle: Bundle, store: Store) -> None:
    seen: list[tuple[str, str, float]] = []
    build(bundle, store, progress=lambda *step: seen.append(step))
    stages = [stage for component, stage, _ in seen if component == "unet"]
    assert any("Building" in s or "Engine" in s or "Network" in s for s in stages), stages
    assert max(fraction for _, _, fraction in seen) == 1.0
    cancel = threading.Event()
    reports = []

    def stop(component: str, stage: str, fraction: float) -> None:
        reports.append(stage)
        if stage != "waiting for the lock":
            cancel.set()

    with pytest.raises(CancelledError):
        build(bundle, store, options=BuildOptions(compute_capabilities=("8.6",)), progress=stop, cancel=cancel)
    assert len(list(store.entries())) == 1
    assert not list(store.root.rglob("*.part"))


def test_two_builds_of_one_graph_have_one_key(bundle: Bundle, store: Store, tmp_path: Path) -> None:
    """The plans differ byte by byte, so that a key made of outputs would never be found again."""
    one = build(bundle, store).entry
    other = build(bundle, Store(tmp_path / "other")).entry
    assert one.name == other.name


@NO_GPU
def test_without_a_gpu_it_builds_ahead_of_time_only_and_opens_nothing(bundle: Bundle, store: Store) -> None:
    with pytest.raises(MissingError, match="no NVIDIA driver"):
        build(bundle, store, options=BuildOptions())
    build(bundle, store)
    with pytest.raises(MissingError, match="no NVIDIA driver"):
        open_engine(bundle, "unet", backend="tensorrt-rtx", options=ADA, store=store, build="never")


@NO_GPU
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_plans_never_reach_the_library(bundle: Bundle, store: Store, damage: str) -> None:
    """Without a GPU the library would crash or refuse in words of its own: the error is ours, so it was not reached."""
    entry = build(bundle, store).entry
    content = bytearray(entry.path.read_bytes())
    content[len(content) // 2] ^= 1
    entry.path.write_bytes({"flip": content, "cut": content[:1000], "empty": b""}[damage])
    with pytest.raises(CorruptError, match=r"the engine unet.tensorrt-rtx"):
        open_engine(bundle, "unet", backend="tensorrt-rtx", options=ADA, store=store, build="never")


def test_sizes_that_no_profile_admits_are_explained(bundle: Bundle, store: Store) -> None:
    build(bundle, store)
    with pytest.raises(MismatchError) as caught:
        open_engine(
            bundle,
            "unet",
            backend="tensorrt-rtx",
            dims={"rows": 4, "height": 12, "width": 16, "tokens": 77},
            options=ADA,
            store=store,
            build="never",
        )
    assert "profiles height=12 rows=1 tokens=77 width=16; height=12 rows=2" in caught.value.found
    assert "(expected height=12 rows=4 tokens=77 width=16)" in caught.value.found
    assert "--backend tensorrt-rtx --size 64x48 --batch 4" in caught.value.remedy


def test_a_plan_needs_no_build(bundle: Bundle, store: Store) -> None:
    planned = plan_build(bundle, backend="tensorrt-rtx", store=store, options=ADA)
    assert [str(p) for p in planned[1].profiles] == [str(p) for p in profiles_for(bundle)["unet"]]
    assert planned[1].memory > 1 << 30
    with pytest.raises(ArgumentError, match="optimization means nothing"):
        plan_build(bundle, backend="tensorrt-rtx", store=store, options=replace(ADA, optimization="basic"))


def test_a_version_without_attention_refuses_graphs_that_hold_one() -> None:
    old = SimpleNamespace(__version__="10.12.0.36")
    check_operators(old, "vae_decoder", {"Conv": 3})
    with pytest.raises(UnsupportedError, match=r"10\.12\.0\.36 has no attention operator.*'unet' holds 32.*10\.14"):
        check_operators(old, "unet", {"Attention": 32})
    check_operators(import_tensorrt("tensorrt-rtx"), "unet", {"Attention": 32})


def test_a_missing_library_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"fewstep\[tensorrt\]"):
        import_tensorrt("tensorrt")


def test_caches_are_checked_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    assert read_cache(path) is None
    write_cache(path, b"timings")
    assert read_cache(path) == b"timings"
    threads = [threading.Thread(target=write_cache, args=(path, bytes([i]) * 100_000)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_cache(path)
    assert found is not None
    assert len(set(found)) == 1
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert read_cache(path) is None
    with pytest.raises(CorruptError):
        write_cache(path, b"")


def inspector(*formats: str, form: str = "Format/Datatype", tactic: str = "") -> str:
    """What the inspector writes with detailed verbosity: layers with the formats of their outputs."""
    outputs = [{"Name": str(i), "Format": "Row major linear (kLINEAR)", form: f} for i, f in enumerate(formats)]
    layer = {"Name": "conv", "Outputs": outputs, "TacticName": tactic}
    return json.dumps({"Layers": [layer, "a name alone"]})


def test_the_inspectors_precision_is_compared_with_the_asked_one() -> None:
    half = inspector("Row major linear FP16 format", "Half", "Row major linear FP32")
    none = {"float32": 0, "float16": 0, "bfloat16": 0, "int8": 0, "fp8": 0}
    assert check_precision(half, "float16") == {**none, "float32": 1, "float16": 2}
    split = inspector("Half", "Float", "BFloat16", form="DataType")
    assert check_precision(split, "float16") == {**none, "float32": 1, "float16": 1, "bfloat16": 1}
    lowered = inspector("Int8", "FP8", "Float", form="DataType")
    for precision in LOWERED:  # weights alone in fewer bits are multiplied as floats
        assert check_precision(lowered, precision) == {**none, "float32": 1, "int8": 1, "fp8": 1}
    for precision in ("int8", "fp8"):
        with pytest.raises(MismatchError, match=f"expected {precision}"):
            check_precision(inspector("Float", form="DataType"), precision)
    with pytest.raises(MismatchError, match="computes in float32; expected float16"):
        check_precision(inspector("Row major linear FP32", "Float"), "float16")
    for silent in ('{"Layers": ["names", "only"]}', "{}", "", inspector()):
        assert check_precision(silent, "float16") == "unknown"


def test_fused_attention_is_counted_by_its_kernels_or_unknown() -> None:
    assert count_fused_attention(inspector("Half", tactic="sm80_fmha_v2_flash_attention_fp16_S_q_kv")) == 1
    assert count_fused_attention(inspector("Half", tactic="sm89_xmma_gemm_f16f16")) == 0
    assert count_fused_attention('{"Layers": ["attention by name alone"]}') == "unknown"
    assert count_fused_attention("") == "unknown"


def test_the_plan_holds_the_weights(bundle: Bundle, store: Store) -> None:
    """A network points at the parser's weights: freed too early, they would be built in as noise."""
    plan = bytes(build(bundle, store, "text_encoder").entry.read())
    assert weights_of("text_encoder")["embedding.weight"].tobytes()[:256] in plan
