"""TensorRT and TensorRT-RTX, loaded: one path for both libraries, whose modules differ by name and by a few extras.

An engine file is code of one machine. It is deserialised from bytes that were checked, with host code forbidden. The
library's own objects are shared by all threads; each binding has an execution context and buffers of its own.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import FewstepError, MismatchError, MissingExtraError
from ..base import Binding, TensorSpec
from ..options import RunOptions
from ..profile import Profile, check_dims, select_profile
from ..scratch import Scratch
from .tensorrt_cache import read_cache, write_cache
from .tensorrt_inspect import check_precision, count_fused_attention

if TYPE_CHECKING:
    import tensorrt_rtx as trt

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 3)}
_log = logging.getLogger("fewstep.engines.tensorrt")
_said = threading.local()


def import_tensorrt(backend: str) -> Any:
    """The library's module. Raises `MissingExtraError`, or `MismatchError` for one that is too old."""
    try:
        module = importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise MissingExtraError(MODULES[backend], backend, purpose=f"the backend {backend!r}") from error
    version = tuple(int(p) for p in module.__version__.split(".")[:2])
    if version < OLDEST[backend]:
        raise MismatchError(
            f"{MODULES[backend]} has version {module.__version__}",
            expected=".".join(map(str, OLDEST[backend])) + " or newer",
            remedy=f"Upgrade it with: pip install -U 'fewstep[{backend}]'",
        )
    return module


@functools.cache
def logger(backend: str) -> trt.ILogger:
    """The process's only logger of this library: it hands lines to `logging` and keeps the last errors for messages."""
    module = import_tensorrt(backend)
    levels = {"INTERNAL_ERROR": 40, "ERROR": 40, "WARNING": 20, "INFO": 10, "VERBOSE": 5}

    class Lines(module.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity.name, 10)
            if level >= logging.ERROR:
                _said.__dict__.setdefault("errors", []).append(message)
            _log.log(min(level, logging.WARNING), "%s", message)

    lines: trt.ILogger = Lines()
    return lines


def errors_said() -> str:
    """What the library reported as errors on this thread since the last call, in one line."""
    lines = _said.__dict__.pop("errors", [])
    return "; ".join(" ".join(line.split())[:300] for line in lines[-3:])


class TensorRTEngine:
    """A deserialised engine; `MismatchError` when its tensors, profiles or precision are not the manifest's.

    attentions: how many its graph has. realised: what the built engine is, as its inspector tells.
    """

    def __init__(
        self,
        data: memoryview,
        *,
        backend: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        profiles: Sequence[Profile],
        run: RunOptions,
        dtype: str,
        attentions: int = 0,
        capturable: bool = False,
        cache: Path | None = None,
    ) -> None:
        from .ort_cuda import import_torch_cuda

        self._torch = import_torch_cuda()
        self._trt, self.backend, self._run, self._cache = import_tensorrt(backend), backend, run, cache
        self.inputs = {s.name: s for s in inputs}
        self.outputs = {s.name: s for s in outputs}
        self.profiles, self._capturable = tuple(profiles), capturable
        with self._torch.cuda.device(run.device):
            runtime: trt.Runtime = self._trt.Runtime(logger(backend))
            runtime.engine_host_code_allowed = False
            check_validity(self._trt, runtime, data)
            engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise MismatchError(
                f"{backend} refuses the engine: {errors_said()}", expected="an engine for this GPU and version"
            )
        # The engine dies with its runtime.
        self._runtime, self._engine = runtime, engine
        self._check_tensors()
        information = inspect(self._trt, engine)
        self.realised = {
            "precision": check_precision(information, dtype),
            "attention": f"{count_fused_attention(information)} fused of {attentions}" if attentions else "none",
        }
        self._config = self._make_config()

    @property
    def device(self) -> str:
        return "cuda"

    @property
    def capture(self) -> str:
        if self.backend == "tensorrt":
            return "whole_request"
        if self._run.graph_strategy == "whole-graph":
            return "own_graph"
        return "whole_request" if self._capturable else "none"

    def scratch_bytes(self, dims: Mapping[str, int]) -> int:
        """Device memory of one binding's execution context for these dimensions, its buffers apart."""
        return int(self._engine.get_device_memory_size_for_profile_v2(self._profile(dims)))

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """An execution context and torch buffers; `MismatchError` when no profile admits the dimensions.

        The context's scratch memory is torch's, of the size that these shapes need, and shared with every other binding
        on its stream: a context that allocates its own takes what the largest profile needs.
        """
        check_dims((*self.inputs.values(), *self.outputs.values()), dims)
        profile, managed = self._profile(dims), self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._torch.cuda.device(self._run.device):
            if self._config is not None:
                self._config.set_execution_context_allocation_strategy(managed)
            context = self._engine.create_execution_context(managed if self._config is None else self._config)
            if context is None:
                raise FewstepError(f"no execution context could be made: {errors_said()}", expected="enough GPU memory")
            return TensorRTBinding(
                self._torch,
                context,
                self.inputs,
                self.outputs,
                dims,
                profile=profile,
                device=self._run.device,
                scratch=self.scratch_bytes(dims),
                after_first=self._save_cache,
                engine=self,
            )

    @property
    def generation(self) -> int:
        return 0

    def using(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _profile(self, dims: Mapping[str, int]) -> int:
        profile = select_profile(self.profiles, dims)
        if profile is None:
            raise MismatchError(
                f"the engine has the profiles {'; '.join(map(str, self.profiles))}",
                expected=" ".join(f"{n}={v}" for n, v in sorted(dims.items())),
                remedy="Build one for this size with: fewstep build BUNDLE --size WxH --batch N",
            )
        return profile

    def _check_tensors(self) -> None:
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        expected = {*self.inputs, *self.outputs}
        if names != expected or self._engine.num_optimization_profiles != max(1, len(self.profiles)):
            raise MismatchError(
                f"the engine has the tensors {', '.join(sorted(names))} "
                f"and {self._engine.num_optimization_profiles} profiles",
                expected=f"{', '.join(sorted(expected))} and {len(self.profiles)}, as its manifest says",
                remedy="Rebuild it with: fewstep build BUNDLE --force",
            )
        for index, profile in enumerate(self.profiles):
            for spec in self.inputs.values():
                own = tuple(map(_sizes, self._engine.get_tensor_profile_shape(spec.name, index)))
                if own != profile.shapes(spec):
                    raise MismatchError(
                        f"profile {index} of the engine takes {spec.name!r} of the shapes {own}",
                        expected=f"{profile.shapes(spec)}, as its manifest says",
                        remedy="Rebuild it with: fewstep build BUNDLE --force",
                    )

    def _make_config(self) -> trt.IRuntimeConfig | None:
        """The runtime configuration: TensorRT-RTX's use of CUDA graphs, and the kernels it compiled before."""
        if not hasattr(self._engine, "create_runtime_config"):
            return None
        config = self._engine.create_runtime_config()
        if hasattr(config, "cuda_graph_strategy"):
            strategy = self._trt.CudaGraphStrategy
            whole = self._run.graph_strategy == "whole-graph"
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if whole else strategy.DISABLED
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # LAZY runs fallback kernels until others are compiled, and a recording would hold the fallbacks for good.
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if self._cache is not None and hasattr(config, "create_runtime_cache") and hasattr(config, "set_runtime_cache"):
            cache = config.create_runtime_cache()
            stored = read_cache(self._cache)
            if stored is not None and not cache.deserialize(stored):
                _log.info("the runtime cache is of another GPU or version: it is made anew")
            config.set_runtime_cache(cache)
        return config

    def _save_cache(self) -> None:
        """Keep the kernels that TensorRT-RTX compiled for the shapes of a first evaluation."""
        if self._cache is None or self._config is None or not hasattr(self._config, "get_runtime_cache"):
            return
        cache = self._config.get_runtime_cache()
        if cache is not None:
            write_cache(self._cache, bytes(memoryview(cache.serialize())))


class TensorRTBinding:
    """One execution context, its profile chosen and its tensors bound by name to torch tensors that never move."""

    def __init__(
        self,
        torch: Any,
        context: trt.IExecutionContext,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        dims: Mapping[str, int],
        *,
        profile: int,
        device: int,
        scratch: int,
        after_first: Callable[[], None],
        engine: TensorRTEngine,
    ) -> None:
        where = torch.device("cuda", device)
        self._torch, self._context, self._device = torch, context, where
        stream = torch.cuda.current_stream(where)
        _must(context.set_optimization_profile_async(profile, stream.cuda_stream), "choose the profile")
        stream.synchronize()
        self._after_first: Callable[[], None] | None = after_first
        self._engine, self.using = engine, engine.using
        self.inputs = {n: _buffer(torch, s, dims, where) for n, s in inputs.items()}
        self.outputs = {n: _buffer(torch, s, dims, where) for n, s in outputs.items()}
        for name, tensor in self.inputs.items():
            _must(context.set_input_shape(name, tuple(tensor.shape)), f"set the shape of {name!r}")
            _must(context.set_tensor_address(name, tensor.data_ptr()), f"bind {name!r}")
        for name, tensor in self.outputs.items():
            _must(context.set_tensor_address(name, tensor.data_ptr()), f"bind {name!r}")
        missing = context.infer_shapes()
        if missing:
            raise MismatchError(f"the engine lacks shapes for {', '.join(missing)}", expected="every input bound")
        if hasattr(context, "update_device_memory_size_for_shapes"):
            scratch = context.update_device_memory_size_for_shapes()
        self._scratch, self._settled = Scratch(torch, where, scratch), -1
        self._scratch.expect(stream.cuda_stream)

    @property
    def generation(self) -> int:
        return self._engine.generation

    def enqueue(self, stream: int | None = None) -> None:
        """Evaluate once on the CUDA stream with this handle (`None`: torch's current one); the host does not wait."""
        if stream is None:
            with self.using():
                self._run(self._torch.cuda.current_stream(self._device).cuda_stream)
            return
        with self._torch.cuda.stream(self._torch.cuda.ExternalStream(stream, device=self._device)), self.using():
            self._run(stream)

    def _run(self, handle: int) -> None:
        if handle != self._settled:
            block, self._settled = self._scratch.on(handle), handle
            self._context.set_device_memory(block.data_ptr(), self._scratch.length)
        _must(self._context.execute_async_v3(handle), "run the engine")
        if self._after_first is not None:
            after_first, self._after_first = self._after_first, None
            after_first()


def _buffer(torch: Any, spec: TensorSpec, dims: Mapping[str, int], device: str) -> Any:
    return torch.zeros(spec.resolve(dims), dtype=getattr(torch, spec.dtype), device=device)


def _sizes(shape: trt.Dims) -> tuple[int, ...]:
    return tuple(int(shape[i]) for i in range(len(shape)))


def _must(done: bool, what: str) -> None:
    if not done:
        raise FewstepError(f"TensorRT could not {what}: {errors_said()}")


def check_validity(module: Any, runtime: trt.Runtime, data: memoryview) -> None:
    """Ask TensorRT-RTX whether it would take the engine, before it is deserialised. Raises `MismatchError`."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, diagnostics = runtime.get_engine_validity(data)
    if validity == module.EngineValidity.INVALID:
        causes = [
            n for n, flag in module.EngineInvalidityDiagnostics.__members__.items() if int(flag) & int(diagnostics)
        ]
        raise MismatchError(
            f"TensorRT-RTX finds the engine invalid here: {', '.join(causes).casefold().replace('_', ' ')}",
            expected="an engine for this GPU, driver and version",
            remedy="Rebuild it with: fewstep build BUNDLE --backend tensorrt-rtx --force",
        )


def inspect(module: Any, engine: trt.ICudaEngine) -> str:
    """The engine's layers as the inspector tells them, in JSON."""
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    return str(text)
