"""A stand-in for the runtime half of TensorRT and TensorRT-RTX, for tests: the builder is TensorRT-RTX's real one.

A plan that the real builder wrote is "deserialised" to the very ONNX that it was compiled from, and run by ONNX Runtime
on the CPU, on the memory that was bound by address. It refuses what the library refuses: plans that it did not build,
profile indices that there are not, shapes outside the profile, tensors without an address, a context without its
scratch memory, and work of its own that cannot be captured. Profiles are read back from the library's own objects, in
the order in which they were added.

TensorRT-RTX 1.7 builds no refittable engine without a GPU: of those its parser, its marks and its configuration are the
real ones, the plan that is compiled is the plain one, and what is stored of a stripped one is a name for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from fewstep.engines import machine
from fewstep.engines.backends import tensorrt, tensorrt_build
from standin_cuda import Driver, stand_in_cuda
from standin_refit import ParserRefitter, Refittable, Refitter, initialisers

GPU = machine.Gpu(index=0, name="stand-in for an RTX 4090", compute_capability="8.9", free_bytes=16 << 30, driver="0")
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_DTYPES = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(uint8)": torch.uint8}
_DTYPES |= {"tensor(bool)": torch.bool}


@dataclass
class Plan:
    """What a plan was built from."""

    graph: bytes
    folder: Path
    """Where the graph's weights lie."""
    profiles: list[dict[str, Shapes]]
    user_memory: bool
    refittable: frozenset[str] = frozenset()
    stripped: bool = False
    identical: bool = False


@dataclass
class Library:
    """The stand-in library: plans by their bytes' digest, and counters of what was asked of it."""

    real: Any
    driver: Driver
    form: str = "11"
    plans: dict[str, Plan] = field(default_factory=dict)
    contexts: list[Context] = field(default_factory=list)
    runs: int = 0
    refits: int = 0
    fails_at: int = -1
    """Which refit is broken off."""
    slow_runs: int = 0
    """Evaluations with kernels that were not compiled for their shapes, as with LAZY specialisation."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)

    def Refitter(self, engine: Engine, logger: Any) -> Refitter:
        return Refitter(engine, logger)

    def OnnxParserRefitter(self, refitter: Refitter, logger: Any) -> ParserRefitter:
        return ParserRefitter(refitter, logger)


class Runtime:
    def __init__(self, library: Library, logger: Any) -> None:
        self._library, self._logger, self.engine_host_code_allowed = library, logger, True

    def get_engine_validity(self, data: memoryview) -> tuple[Any, int]:
        return self._library.real.EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, data: memoryview) -> Engine | None:
        assert not self.engine_host_code_allowed, "an engine may bring code of the host"
        plan = self._library.plans.get(hashlib.sha256(data).hexdigest())
        if plan is None:
            self._say("the plan was built by another version")
            return None
        return Engine(self._library, plan, self)

    def _say(self, message: str) -> None:
        self._logger.log(self._library.real.ILogger.Severity.ERROR, message)


class Engine:
    def __init__(self, library: Library, plan: Plan, runtime: Runtime) -> None:
        self.library, self.plan, self.runtime = library, plan, runtime
        self.weights = Refittable(plan)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(plan.folder))
        shapes = self.weights.session or onnxruntime.InferenceSession(plan.graph, options)
        self.inputs = {n.name: n for n in shapes.get_inputs()}
        self.outputs = {n.name: n for n in shapes.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan.profiles)

    def get_tensor_profile_shape(self, name: str, index: int) -> Shapes:
        return self.plan.profiles[index][name]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 256 + sum(4 * int(np.prod(best)) for _, best, _ in self.plan.profiles[index].values())

    @property
    def device_memory_size_v2(self) -> int:
        return max(self.get_device_memory_size_for_profile_v2(i) for i in range(self.num_optimization_profiles))

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: inspection(self.plan.graph, self.library.form))

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: Any) -> Context | None:
        if self.library.driver.capturing() is not None:
            self.runtime._say("a context cannot be made while a stream is capturing")
            return None
        context = Context(self, config)
        self.library.contexts.append(context)
        return context


class RuntimeCache:
    def __init__(self) -> None:
        self.content = b"nothing was compiled"

    def deserialize(self, data: bytes) -> bool:
        self.content = bytes(data)
        return data.startswith(b"kernels")

    def serialize(self) -> bytes:
        return self.content


class RuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.allocation: Any = None
        self._cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> None:
        self._cache = cache

    def get_runtime_cache(self) -> RuntimeCache | None:
        return self._cache


class Context:
    """An execution context; see `IExecutionContext`."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self.engine, self._say, self._driver = engine, engine.runtime._say, engine.library.driver
        self.config = config
        strategies = engine.library.real.ExecutionContextAllocationStrategy
        self.user_managed = config.allocation == strategies.USER_MANAGED
        if engine.plan.user_memory and not self.user_managed:
            self._say("REQUIRE_USER_ALLOCATION: the context's memory must be the caller's")
        self.eager = str(config.dynamic_shapes_kernel_specialization_strategy).endswith("EAGER")
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._output_shapes: dict[tuple[tuple[int, ...], ...], dict[str, tuple[int, ...]]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < self.engine.num_optimization_profiles:
            self._say(f"there is no profile {index}")
            return False
        if stream in self._driver.captures:
            self._say("the profile cannot be changed while the stream is capturing")
            return False
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if name not in self.engine.inputs or self.profile is None:
            self._say(f"{name!r} is no input, or no profile is chosen")
            return False
        low, _, high = self.engine.plan.profiles[self.profile][name]
        if len(shape) != len(low) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            self._say(f"{name}: shape {tuple(shape)} is outside profile {self.profile}, {low} to {high}")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.inputs and name not in self.engine.outputs:
            self._say(f"there is no tensor {name!r}")
            return False
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        if self.profile is None or size < self.engine.get_device_memory_size_for_profile_v2(self.profile):
            self._say(f"{size} bytes are too few for profile {self.profile}")
            return
        self.memory = address

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.profile is not None, "the partition is invalidated"
        assert not self.infer_shapes(), "the partition is invalidated"
        return self.engine.get_device_memory_size_for_profile_v2(self.profile)

    def infer_shapes(self) -> list[str]:
        return [n for n in self.engine.inputs if n not in self.shapes]

    def is_stream_capturable(self, stream: int) -> bool:
        return self.user_managed or self.engine.library.real.__name__ != "tensorrt_rtx"

    def execute_async_v3(self, stream: int) -> bool:
        capturing = self._driver.captures.get(stream)
        missing = [n for n in (*self.engine.inputs, *self.engine.outputs) if not self.addresses.get(n)]
        if missing or self.infer_shapes():
            self._say(f"no address or shape for {', '.join(missing or self.infer_shapes())}")
            return False
        if self.engine.weights.session is None:
            self._say("the weights of a stripped engine are missing")
            return False
        if self.user_managed and not self.memory:
            self._say("no device memory was set")
            return False
        if capturing is not None and not self.is_stream_capturable(stream):
            capturing.invalid = True
            self._say("an allocation of the context's own in a capture")
            return False
        known = tuple(self.shapes.values())
        library = self.engine.library
        library.runs += 1
        library.slow_runs += not self.eager and known not in self._seen
        self._seen.add(known)
        if self.config._cache is not None:
            self.config._cache.content = b"kernels " + json.dumps(sorted(map(str, self._seen))).encode()
        index = library.contexts.index(self)
        tensors, generation = (self._tensors(self.engine.inputs), self._outputs()), self.engine.weights.generation
        torch.ops.fewstep_standin.execute(index, id(library), generation, *tensors)
        return True

    def _tensors(self, nodes: Mapping[str, Any]) -> list[torch.Tensor]:
        return [_view(self.addresses[n], self.shapes[n], _DTYPES[node.type]) for n, node in nodes.items()]

    def _outputs(self) -> list[torch.Tensor]:
        """Views of the outputs' memory, whose shapes are found by an evaluation where they are not known."""
        known = tuple(self.shapes.values())
        if known not in self._output_shapes:
            feed = {n: t.numpy() for n, t in zip(self.engine.inputs, self._tensors(self.engine.inputs), strict=True)}
            results = self.engine.weights.evaluate(list(self.engine.outputs), feed)
            self._output_shapes[known] = dict(zip(self.engine.outputs, (r.shape for r in results), strict=True))
        shapes = self._output_shapes[known]
        return [_view(self.addresses[n], shapes[n], _DTYPES[node.type]) for n, node in self.engine.outputs.items()]

    def evaluate(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        feed = {n: t.numpy() for n, t in zip(self.engine.inputs, inputs, strict=True)}
        results = self.engine.weights.evaluate(list(self.engine.outputs), feed)
        for target, value in zip(outputs, results, strict=True):
            target.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(target.shape))


def _view(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on memory that is somebody else's."""
    count = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=dtype).view(shape)


_LIBRARIES: dict[int, Library] = {}
_operators = torch.library.Library("fewstep_standin", "DEF")
_operators.define("execute(int context, int library, int generation, Tensor[] inputs, Tensor(a!)[] outputs) -> ()")


def _execute(
    context: int, library: int, generation: int, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> None:
    one = _LIBRARIES[library].contexts[context]
    if generation == one.engine.weights.generation:
        one.evaluate(inputs, outputs)
        return
    for target in outputs:  # recorded before a refit
        target.fill_(float("nan") if target.is_floating_point() else 0)


_operators.impl("execute", _execute, "CPU")


def inspection(graph: bytes, form: str) -> str:
    """What an inspector writes of an engine of this graph: in the form of 10.x, of 11.x, or names alone."""
    import onnx

    nodes = onnx.load_model_from_string(graph).graph.node
    if form == "names":
        return json.dumps({"Layers": [n.name for n in nodes]})
    layers = []
    for node in nodes:
        if node.op_type in ("Conv", "MatMul", "Gemm", "Attention"):
            tactic = "fmha_v2_flash_attention_fp32" if node.op_type == "Attention" else "sm80_xmma_gemm_f32f32"
            words = {"Format/Datatype": "Row major linear FP32"} if form == "10" else {"DataType": "Float"}
            outputs = [{"Name": o, **words, "Format": "Row major linear"} for o in node.output]
            layers.append({"Name": node.name, "LayerType": "kgen", "TacticName": tactic, "Outputs": outputs})
    return json.dumps({"Layers": layers})


@contextmanager
def stand_in_tensorrt(monkeypatch: pytest.MonkeyPatch, *, form: str = "11") -> Iterator[Library]:
    """TensorRT-RTX on a machine with a GPU, its runtime half and the GPU stood in for."""
    import tensorrt_rtx

    graphs: dict[int, tuple[bytes, Path]] = {}
    added: list[dict[str, Shapes]] = []
    parse, add_profiles, write_plan = tensorrt_build.parse, tensorrt_build.add_profiles, tensorrt_build.write_plan

    def watched_parse(module: Any, network: Any, graph: bytes, place: Path, log: Any) -> Any:
        graphs[id(network)] = graph, place.parent
        return parse(module, network, graph, place, log)

    def watched_profiles(builder: Any, config: Any, inputs: Any, profiles: Any) -> None:
        added.clear()

        def add(profile: Any) -> int:
            shapes = {s.name: tuple(tuple(c) for c in profile.get_shape(s.name)) for s in inputs}
            added.append(shapes)  # type: ignore[arg-type]
            return int(config.add_optimization_profile(profile))

        add_profiles(builder, SimpleNamespace(add_optimization_profile=add), inputs, profiles)  # type: ignore[arg-type]

    def watched_plan(module: Any, builder: Any, network: Any, config: Any, target: Path) -> bool:
        flags = tensorrt_rtx.BuilderFlag
        asked = [f for f in (flags.STRIP_PLAN, flags.REFIT_INDIVIDUAL, flags.REFIT_IDENTICAL) if config.get_flag(f)]
        graph, folder = graphs[id(network)]
        names = initialisers(graph, folder) if asked else ()
        if flags.REFIT_INDIVIDUAL in asked:
            names = [n for n in names if network.are_weights_marked_refittable(n)]
        for flag in asked:
            config.clear_flag(flag)
        done = write_plan(tensorrt_rtx, builder, network, config, target)
        if done:
            if flags.STRIP_PLAN in asked:
                target.write_bytes(b"a plan without weights " + os.urandom(1000))
            needs = config.get_flag(flags.REQUIRE_USER_ALLOCATION)
            digest = hashlib.sha256(target.read_bytes()).hexdigest()
            facts = frozenset(names), flags.STRIP_PLAN in asked, flags.REFIT_IDENTICAL in asked
            library.plans[digest] = Plan(graph, folder, list(added), needs, *facts)
        return done

    with stand_in_cuda(monkeypatch) as driver:
        library = Library(tensorrt_rtx, driver, form)
        _LIBRARIES[id(library)] = library
        for name, value in (("parse", watched_parse), ("add_profiles", watched_profiles), ("write_plan", watched_plan)):
            monkeypatch.setattr(tensorrt_build, name, value)
        for module in (tensorrt, tensorrt_build):
            monkeypatch.setattr(module, "import_tensorrt", lambda backend: library)
        monkeypatch.setattr(machine, "gpu", lambda index=0: GPU)
        monkeypatch.setattr(machine, "has_gpu_driver", lambda: True)
        tensorrt.logger.cache_clear()
        yield library
        tensorrt.logger.cache_clear()
        del _LIBRARIES[id(library)]
