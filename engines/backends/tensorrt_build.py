"""Building with TensorRT and TensorRT-RTX: parse, check the network's types, set profiles, build into a file.

Precision is decided in the ONNX: the network is strongly typed. TensorRT-RTX builds for compute capabilities and needs
no GPU for it; TensorRT builds for the GPU it runs on, and measures there.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import LOWERED
from ...errors import CancelledError, CorruptError, FewstepError, MismatchError, UnsupportedError
from .. import machine
from ..base import Engine, TensorSpec
from ..graph.accounting import check_fusion
from ..graph.onnx_bytes import read_graph
from ..graph.symmetric import make_symmetric
from ..key import ANY_DEVICE
from ..options import BuildOptions
from ..profile import Profile
from ..weights import check_weights, checked_graph
from .registry import Backend, BuildJob, OpenJob, register
from .tensorrt import MODULES, TensorRTEngine, errors_said, import_tensorrt, logger
from .tensorrt_cache import read_cache, write_cache
from .tensorrt_refit import RefittableEngine, StrippedEngine, mark_refittable, set_refit_flags

if TYPE_CHECKING:
    import tensorrt_rtx as trt

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_COMPUTE = ("CONVOLUTION", "MATRIX_MULTIPLY", "ATTENTION_INPUT", "DECONVOLUTION")
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", **dict.fromkeys(LOWERED, "FLOAT")}
"""What a network states of computing layers; those in integers read what comes back from their grid."""


class TensorRT(Backend):
    """Builds and loads engines with TensorRT, for the GPU of this machine."""

    name = "tensorrt"
    device, suffix, uses_profiles, rank = "cuda", "plan", True, 2
    heeds: tuple[str, ...] = ("optimization_level", "workspace_bytes", "auxiliary_streams", "refittable", "stripped")

    def version(self) -> str:
        return str(import_tensorrt(self.name).__version__)

    def available(self) -> bool:
        return importlib.util.find_spec(MODULES[self.name]) is not None

    def suits(self) -> str | None:
        return "a GPU, and TensorRT is installed"

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        gpu = machine.gpu()
        return gpu.name, gpu.compute_capability

    def memory(self, job_bytes: int) -> int:
        return 4 * job_bytes + (1 << 30)

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """Parse, check and build. Raises `CorruptError`, `MismatchError`, `CancelledError`, `FewstepError`."""
        graph, options = checked_graph(job.bundle, job.component), job.options
        check_weights(job.bundle, job.component, job.store)
        if job.component.dtype == "int4-weights":
            raise UnsupportedError(
                f"the {job.name} has weights in four bits, which TensorRT takes of products of matrices alone",
                remedy="Quantize it with --precision int8-weights, and name that in the budget.",
            )
        graph, pairs = about_zero(graph) if job.component.dtype in LOWERED else (graph, 0)
        module = import_tensorrt(self.name)
        check_operators(module, job.name, job.component.operators)
        errors_said()
        builder: trt.Builder = module.Builder(logger(self.name))
        flags = module.NetworkDefinitionCreationFlag
        typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
        network: trt.INetworkDefinition = builder.create_network(typed)
        config: trt.IBuilderConfig = builder.create_builder_config()
        beside = job.bundle.path(job.component.weights).with_name(job.component.graph)
        parser = parse(module, network, graph, beside, logger(self.name))
        check_io(network, job.component.inputs, job.component.outputs)
        types = check_types(module, network, job.component.dtype)
        layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
        if layers["QUANTIZE"] < pairs:
            raise MismatchError(f"{layers['QUANTIZE']} of {pairs} tensors are rounded", expected="all of them")
        fused_layers = {"Attention": layers["ATTENTION_INPUT"]}
        fused = check_fusion(job.name, job.component.operators, fused_layers, strict=True)
        attentions = decompose_attention(module, network) if job.component.dtype in ("float32", *LOWERED) else 0
        self._configure(module, builder, config, job)
        marked = mark_refittable(network, graph, beside.with_name(job.component.weights)) if options.refittable else []
        add_profiles(builder, config, job.component.inputs, job.profiles)
        monitor = make_monitor(module, job)
        config.progress_monitor = monitor
        timing = self._timing_cache(job)
        if timing is not None:
            config.set_timing_cache(config.create_timing_cache(read_cache(timing) or b""), False)
        built = write_plan(module, builder, network, config, job.target)
        if job.cancel.is_set():
            raise CancelledError(f"the build of {job.name!r} was cancelled")
        if not built:
            raise FewstepError(
                f"{self.name} built no engine of {job.name!r}: {errors_said() or 'it gave no reason'}",
                remedy="Build refittable and stripped engines on a machine with a GPU: the library runs parts of them."
                if (options.refittable or options.stripped) and not machine.has_gpu_driver()
                else "For its full report run: fewstep build BUNDLE --verbose",
            )
        if timing is not None:
            write_cache(timing, bytes(memoryview(config.get_timing_cache().serialize())))
        del parser
        return {
            "layers": dict(sorted(layers.items())),
            "fused": fused,
            "compute_types": dict(types),
            "decomposed_attentions": attentions,
            "profiles": len(job.profiles),
            "refittable_weights": len(marked),
            "quantized": layers["QUANTIZE"],
        }

    def open(self, job: OpenJob) -> Engine:
        """Deserialise; needs the GPU, and asks for it before the library is touched: without one it may crash."""
        machine.gpu(job.run.device)
        options = job.entry.key.options
        stripped = bool(options.get("stripped"))
        kind = RefittableEngine if options.get("refittable") else StrippedEngine if stripped else TensorRTEngine
        engine = kind(
            job.data,
            backend=self.name,
            inputs=job.component.inputs,
            outputs=job.component.outputs,
            profiles=job.entry.key.profiles,
            run=job.run,
            dtype=job.component.dtype,
            attentions=job.component.operators.get("Attention", 0),
            capturable=bool(options.get("capturable")),
            cache=self._runtime_cache(job),
        )
        if isinstance(engine, RefittableEngine):
            engine.adopt(job, stripped=stripped)
        elif isinstance(engine, StrippedEngine):
            engine.fill(job)
        return engine

    def realised(self, engine: Engine) -> Mapping[str, Any]:
        return engine.realised if isinstance(engine, TensorRTEngine) else {}

    def _configure(self, module: Any, builder: trt.Builder, config: trt.IBuilderConfig, job: BuildJob) -> None:
        options = job.options
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.auxiliary_streams is not None:
            config.max_aux_streams = options.auxiliary_streams
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        config.clear_flag(module.BuilderFlag.TF32)
        set_refit_flags(module, config, options)
        if not (hasattr(config, "num_compute_capabilities") and hasattr(config, "set_compute_capability")):
            return
        if options.capturable:
            config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
        _, capability = self.target(options)
        capabilities = capability.split()
        config.num_compute_capabilities = len(capabilities)
        for index, one in enumerate(capabilities):
            member = getattr(module.ComputeCapability, f"SM{one.replace('.', '')}")
            if not config.set_compute_capability(member, index):
                raise UnsupportedError(f"TensorRT-RTX {module.__version__} refuses compute capability {one}")

    def _timing_cache(self, job: BuildJob) -> Path | None:
        gpu = machine.gpu()
        name = f"{self.version()}-{gpu.name}".casefold().replace(" ", "-")
        return job.store.root / f".timing.{''.join(c for c in name if c.isalnum() or c in '.-')}.cache"

    def _runtime_cache(self, job: OpenJob) -> Path | None:
        return None


class TensorRTRtx(TensorRT):
    """Builds with TensorRT-RTX, for any GPU of some compute capabilities and without one."""

    name = "tensorrt-rtx"
    rank = 1
    heeds = (*TensorRT.heeds, "compute_capabilities", "capturable")

    def suits(self) -> str | None:
        if machine.gpu().compute_capability not in RTX_CAPABILITIES:
            return None
        return "a GPU that TensorRT-RTX supports, and its module is installed"

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        """Any GPU of the compute capabilities asked for, or of this GPU's."""
        asked = tuple(sorted(set(options.compute_capabilities))) if options else ()
        asked = asked or (machine.gpu().compute_capability,)
        for capability in asked:
            if capability not in RTX_CAPABILITIES:
                raise UnsupportedError(
                    f"TensorRT-RTX builds nothing for compute capability {capability}",
                    expected=f"one of {', '.join(RTX_CAPABILITIES)}",
                    remedy="Use the backend 'tensorrt' or 'ort-cuda' on that GPU.",
                )
        return ANY_DEVICE, " ".join(asked)

    def _timing_cache(self, job: BuildJob) -> Path | None:
        return None

    def _runtime_cache(self, job: OpenJob) -> Path | None:
        return None if job.store.read_only else job.store.root / f".runtime.{job.entry.name}.cache"


register(TensorRT())
register(TensorRTRtx())


def about_zero(graph: bytes) -> tuple[bytes, int]:
    """A graph with layers in integers as the library reads it, and how many tensors are rounded in it."""
    read = read_graph(graph)
    pairs = make_symmetric(read)
    return read.to_bytes(), pairs


def parse(module: Any, network: trt.INetworkDefinition, graph: bytes, place: Path, log: trt.ILogger) -> trt.OnnxParser:
    """Parse a graph whose weights lie beside its place. Raises `CorruptError` with the parser's own words and the node.

    The parser is returned because the network points at the weights it holds.
    """
    parser: trt.OnnxParser = module.OnnxParser(network, log)
    done = parser.parse(graph, str(place))
    # Empty bytes parse as a network of nothing.
    if not done or network.num_outputs == 0:
        complaints = [describe(parser.get_error(i)) for i in range(parser.num_errors)]
        raise CorruptError(
            f"{place.name} cannot be parsed: {'; '.join(complaints) or errors_said() or 'it holds no outputs'}",
            expected="an ONNX graph of operators that the backend knows",
            remedy="Export the checkpoint again.",
        )
    return parser


def describe(error: trt.ParserError) -> str:
    """A parser's error in words: node, operator, code, description."""
    node = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_name() else f"node {error.node()}"
    return f"{node}: {error.code().name.casefold()}: {' '.join(error.desc().split())[:300]}"


def check_operators(module: Any, component: str, operators: Mapping[str, int]) -> None:
    """Raise `UnsupportedError` for a graph whose attention operators this version does not know (before 10.14)."""
    count = operators.get("Attention", 0)
    if count and not hasattr(module, "IAttentionInputLayer"):
        raise UnsupportedError(
            f"TensorRT {module.__version__} has no attention operator, and the graph of {component!r} holds {count}",
            expected="TensorRT 10.14 or newer",
            remedy="Upgrade it with: pip install -U 'fewstep[tensorrt]'",
        )


def check_io(network: trt.INetworkDefinition, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Raise `MismatchError` unless the network's tensors are the manifest's, by name and rank."""
    ranks = {network.get_input(i).name: len(network.get_input(i).shape) for i in range(network.num_inputs)}
    ranks |= {network.get_output(i).name: len(network.get_output(i).shape) for i in range(network.num_outputs)}
    expected = {s.name: len(s.shape) for s in (*inputs, *outputs)}
    if ranks != expected:
        raise MismatchError(
            f"the graph has the tensors {', '.join(f'{n} of rank {r}' for n, r in sorted(ranks.items()))}",
            expected=", ".join(f"{n} of rank {r}" for n, r in sorted(expected.items())),
            remedy="The manifest and the graph disagree: export the checkpoint again.",
        )


def check_types(module: Any, network: trt.INetworkDefinition, dtype: str) -> Counter[str]:
    """How many computing layers have each type; in a strongly typed network these are the types they will run in.

    Raises `MismatchError` when there are such layers and none has the asked precision.
    """
    counts: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name in _COMPUTE:
            counts[layer.get_input(0).dtype.name] += 1
    if counts and not counts[_DTYPES[dtype]]:
        raise MismatchError(
            f"the graph computes in {', '.join(sorted(counts)).casefold()}",
            expected=f"{dtype}, as the manifest says",
            remedy="Export the checkpoint again with the dtype you want.",
        )
    return counts


def decompose_attention(module: Any, network: trt.INetworkDefinition) -> int:
    """Allow every attention to be built from matrix products where no fused kernel takes it; returns their number."""
    count = 0
    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def add_profiles(
    builder: trt.Builder, config: trt.IBuilderConfig, inputs: tuple[TensorSpec, ...], profiles: tuple[Profile, ...]
) -> None:
    """Add each profile to the build. Raises `MismatchError` when the backend takes one of them for impossible."""
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for spec in inputs:
            low, best, high = sizes.shapes(spec)
            profile.set_shape(spec.name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise MismatchError(
                f"the backend refuses the profile {sizes}: {errors_said()}", expected="sizes that fit the graph"
            )


def make_monitor(module: Any, job: BuildJob) -> trt.IProgressMonitor:
    """A monitor that reports the outermost phases and stops the build once it is cancelled."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = max(1, num_steps)
                job.progress(job.name, phase_name, 0.0)

        def phase_finish(self, phase_name: str) -> None:
            if self.steps.pop(phase_name, 0):
                job.progress(job.name, phase_name, 1.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                job.progress(job.name, phase_name, min(1.0, (step + 1) / self.steps[phase_name]))
            return not job.cancel.is_set()

    monitor: trt.IProgressMonitor = Monitor()
    return monitor


def write_plan(
    module: Any, builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, target: Path
) -> bool:
    """Build into a file, streamed where the library can, so that the plan is never whole in memory twice."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            target.write_bytes(memoryview(plan))
        return plan is not None
    with target.open("wb") as file:

        class Writer(module.IStreamWriter):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.error: OSError | None = None

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:
                    self.error = error
                    return 0

        writer = Writer()
        done = bool(builder.build_serialized_network_to_stream(network, config, writer))
    if writer.error is not None:
        raise FewstepError(f"the engine cannot be written: {writer.error.strerror}", remedy="Free some disk space.")
    return done and target.stat().st_size > 0
