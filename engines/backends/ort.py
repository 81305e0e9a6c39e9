"""ONNX Runtime: one session shared by all threads, buffers that never move for each binding."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import (
    ArgumentError,
    CorruptError,
    MismatchError,
    MissingExtraError,
    OutOfMemoryError,
    UnsupportedError,
)
from ..base import Binding, TensorSpec
from ..machine import has_vnni
from ..options import RunOptions
from ..profile import check_dims

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALIGNMENT = 64
_NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "out of memory", "ALLOC_FAILED")
"""What ONNX Runtime, C++ and CUDA say where memory does not suffice."""
_ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An execution provider of ONNX Runtime: its name there, the backend that uses it, and the package that holds it.

    options: what it is asked for with, given the run's options and a CUDA stream's handle. Others than the CPU's are
    followed by that one, for shape arithmetic and for what they do not take. computing: operators that must be on this
    provider; a graph that has one of them elsewhere is refused. prepare: what is done with the module before its first
    session.
    """

    backend: str
    name: str
    package: str
    extra: str
    options: Callable[[RunOptions, int | None], dict[str, str]] = lambda run, stream: {}
    computing: frozenset[str] = frozenset()
    prepare: Callable[[ModuleType], None] = lambda onnxruntime: None

    def requested(self, run: RunOptions, stream: int | None = None) -> list[tuple[str, dict[str, str]]]:
        """The providers to ask for, with explicit options."""
        own = (self.name, self.options(run, stream))
        return [own] if self.name == CPU.name else [own, (CPU.name, {})]

    @property
    def available(self) -> bool:
        try:
            import onnxruntime
        except ImportError:
            return False
        return self.name in onnxruntime.get_available_providers()


CPU = Provider(backend="ort-cpu", name="CPUExecutionProvider", package="onnxruntime", extra="cpu")


def import_onnxruntime(provider: Provider) -> ModuleType:
    """The module `onnxruntime`, able to run this provider; `MissingExtraError` if it is not installed."""
    if not provider.available:
        raise MissingExtraError(provider.package, provider.extra, purpose=f"the backend {provider.backend!r}")
    import onnxruntime

    provider.prepare(onnxruntime)
    return onnxruntime  # type: ignore[no-any-return]


def session_options(onnxruntime: ModuleType, run: RunOptions, optimization: str) -> Any:
    """Session options with nothing left to chance: threads, spinning, arena, optimisation level."""
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = {
        "disabled": level.ORT_DISABLE_ALL,
        "basic": level.ORT_ENABLE_BASIC,
        "extended": level.ORT_ENABLE_EXTENDED,
        "all": level.ORT_ENABLE_ALL,
    }[optimization]
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = run.threads
    if places := _places(run.threads):
        options.add_session_config_entry("session.intra_op_thread_affinities", places)
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = run.arena
    options.enable_mem_pattern = True
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if run.spinning == "off" else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1" if run.spinning == "run" else "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    # without VNNI pairs of integer products would be cut off at 16 bits, another picture; with it this only takes time
    options.add_session_config_entry("session.x64quantprecision", "0" if has_vnni() else "1")
    # products by weights of few bits sum floats: the default rounds what is multiplied too, and is no faster
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def _places(threads: int) -> str:
    """Processors, counted from 1, for all threads but the caller's, where every processor gets a thread; else nothing.

    ONNX Runtime ties its threads so when it is left to count them. A thread that wakes may else be put where its caller
    runs, and both take turns spinning: 16 ms instead of 8 for a request of one step after a pause.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return ";".join(str(c + 1) for c in allowed[1:]) if 1 < threads == len(allowed) else ""


def open_session(
    model: Path | bytes,
    *,
    provider: Provider = CPU,
    run: RunOptions,
    optimization: str = "all",
    external: Mapping[str, Any] | None = None,
    external_folder: Path | None = None,
    stream: int | None = None,
    dims: Mapping[str, int] | None = None,
    configure: Callable[[Any], None] | None = None,
) -> Any:
    """Make a session and check that it runs where it was asked to.

    `external` maps the names of external data files to their bytes, `external_folder` says where they lie when they are
    too large for that. `dims` fixes named dimensions. `configure` may change the session options before they are used.
    """
    onnxruntime = import_onnxruntime(provider)
    options = session_options(onnxruntime, run, optimization)
    if external:
        names = list(external)
        options.add_external_initializers_from_files_in_memory(
            names, [external[n] for n in names], [len(external[n]) for n in names]
        )
    elif external_folder is not None and isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(external_folder))
    for dimension, size in (dims or {}).items():
        options.add_free_dimension_override_by_name(dimension, size)
    if provider.computing:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if configure is not None:
        configure(options)
    source = model if isinstance(model, bytes) else str(model)
    try:
        with memory_told("opening an engine"):
            session = onnxruntime.InferenceSession(source, options, providers=provider.requested(run, stream))
    except OutOfMemoryError:
        raise
    except Exception as error:
        raise CorruptError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the model: {_brief(error, model)}",
            expected="a model that it can load",
            remedy="Export the checkpoint again, or rebuild the engine with: fewstep build BUNDLE --force",
        ) from error
    check_provider(session, provider)
    check_placement(session, provider)
    return session


def leave_pairs(options: Any) -> None:
    """Have pairs of float8 stay as they are: they would be fused like pairs of integers, and refused then."""
    options.add_session_config_entry("session.disable_quant_qdq", "1")


@contextmanager
def memory_told(doing: str) -> Iterator[None]:
    """Turn what NumPy and ONNX Runtime raise where memory does not suffice into `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise OutOfMemoryError(
            f"memory does not suffice for {doing}",
            expected="less at once",
            remedy="Ask for fewer images or a smaller size at once; `fewstep memory BUNDLE` says what fits.",
        ) from error


def check_provider(session: Any, provider: Provider) -> None:
    """Raise `MismatchError` when ONNX Runtime put the model elsewhere than asked, which it does without a word."""
    got = session.get_providers()
    if not got or got[0] != provider.name:
        raise MismatchError(
            f"ONNX Runtime runs the model on {', '.join(got) or 'nothing'}",
            expected=f"{provider.name} for the backend {provider.backend!r}",
            remedy="Check that the GPU, its driver and the CUDA libraries are there, or use a backend for the CPU.",
        )


def check_placement(session: Any, provider: Provider) -> Counter[str]:
    """The operators that ONNX Runtime put on other providers than this one, which it does without a word.

    Raises `MismatchError` where they are among those that must not be, or where this version cannot tell.
    """
    if not provider.computing:
        return Counter()
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise MismatchError(
            f"this version of {provider.package} does not tell where it runs what",
            expected="1.27 or newer",
            remedy=f"Upgrade it with: pip install -U 'fewstep[{provider.extra}]'",
        )
    parts = session.get_provider_graph_assignment_info()
    elsewhere = Counter(n.op_type for p in parts if p.ep_name != provider.name for n in p.get_nodes())
    lost = sorted(provider.computing & elsewhere.keys())
    if lost:
        raise MismatchError(
            f"ONNX Runtime runs {', '.join(f'{elsewhere[n]} {n}' for n in lost)} on another provider",
            expected=f"all of them on {provider.name}",
            remedy=f"Upgrade it with: pip install -U 'fewstep[{provider.extra}]', or use another backend.",
        )
    return elsewhere


def _brief(error: Exception, model: Path | bytes) -> str:
    """The last part of ONNX Runtime's message, with the model's name in place of its path."""
    text = " ".join(str(error).split())
    if isinstance(model, Path):
        text = text.replace(str(model), model.name).replace(f"{model.parent}/", "")
    return text.rpartition(" : ")[2][:300]


def aligned_array(shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """A zeroed NumPy array whose first byte lies on a multiple of 64."""
    if dtype == "bfloat16":
        raise UnsupportedError(
            "NumPy has no bfloat16", expected="float32 inputs and outputs", remedy="Export the checkpoint again."
        )
    element = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * element.itemsize
    raw = np.zeros(count + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(element).reshape(tuple(shape))


FATAL = 4
"""ONNX Runtime's level of a log that says no more than what is raised anyway: an evaluation's errors are."""


class OrtBinding:
    """NumPy buffers bound to a session on the CPU."""

    __slots__ = ("_io", "_lock", "_options", "_session", "_values", "inputs", "outputs")

    def __init__(
        self, session: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], dims: Mapping[str, int]
    ) -> None:
        from onnxruntime import OrtValue
        from onnxruntime import RunOptions as OrtRunOptions

        with memory_told("an engine's inputs and outputs"):
            own = [{n: aligned_array(s.resolve(dims), s.dtype) for n, s in of.items()} for of in (inputs, outputs)]
        self.inputs: dict[str, NDArray[Any]] = own[0]
        self.outputs: dict[str, NDArray[Any]] = own[1]
        self._session, self._io, self._lock = session, session.io_binding(), threading.Lock()
        self._options = OrtRunOptions()
        self._options.log_severity_level = FATAL
        # The values alias the arrays; they are kept because the binding holds only their addresses.
        self._values = {n: OrtValue.ortvalue_from_numpy(a) for n, a in (*self.inputs.items(), *self.outputs.items())}
        for name in self.inputs:
            self._io.bind_ortvalue_input(name, self._values[name])
        for name in self.outputs:
            self._io.bind_ortvalue_output(name, self._values[name])

    def enqueue(self, stream: int | None = None) -> None:
        """Evaluate once; returns when the outputs are there. `ArgumentError` if a CUDA stream is given."""
        if stream is not None:
            raise ArgumentError("a CUDA stream was given to an engine on the CPU", expected="no stream")
        if not self._lock.acquire(blocking=False):
            raise ArgumentError(
                "two threads use one binding", expected="a binding for each thread", remedy="Call engine.bind in each."
            )
        try:
            self._prepare()
            with memory_told("an evaluation"):
                self._session.run_with_iobinding(self._io, self._options)
        finally:
            self._lock.release()

    def _prepare(self) -> None:
        """What else is bound before an evaluation."""


class OrtEngine:
    """A component on ONNX Runtime on the CPU. All threads may use the session; each makes a binding of its own."""

    __slots__ = ("_session", "backend", "inputs", "outputs")

    device, capture = "cpu", "none"

    def __init__(
        self,
        session: Any,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        provider: Provider = CPU,
    ) -> None:
        self._session, self.backend = session, provider.backend
        self.inputs: dict[str, TensorSpec] = {s.name: s for s in inputs}
        self.outputs: dict[str, TensorSpec] = {s.name: s for s in outputs}
        self._check(session)

    def _check(self, session: Any) -> None:
        check_tensors("input", self.inputs, session.get_inputs())
        check_tensors("output", self.outputs, session.get_outputs())

    @classmethod
    def from_onnx(
        cls,
        model: Path | bytes,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        folder: Path | None = None,
        run: RunOptions | None = None,
        optimization: str = "all",
    ) -> OrtEngine:
        """Load a graph whose external data lie beside it, or in `folder`, on the CPU, and optimise it now."""
        session = open_session(model, external_folder=folder, run=run or RunOptions(), optimization=optimization)
        return cls(session, inputs=inputs, outputs=outputs)

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self._session.get_providers())

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """NumPy buffers for these dimensions."""
        check_dims((*self.inputs.values(), *self.outputs.values()), dims)
        return OrtBinding(self._session, self.inputs, self.outputs, dims)


def check_tensors(kind: str, specs: Mapping[str, TensorSpec], nodes: Sequence[Any]) -> None:
    """Raise `MismatchError` unless the session's tensors are the manifest's, by name, dtype and rank."""
    tensors = {n.name: (_ONNX_TYPES.get(n.type, n.type), len(n.shape)) for n in nodes}
    expected = {n: (s.dtype, len(s.shape)) for n, s in specs.items()}
    if tensors == expected:
        return
    names = sorted(n for n in tensors.keys() | expected.keys() if tensors.get(n) != expected.get(n))
    raise MismatchError(
        f"{kind} {names[0]!r} of the model is {_tensor_words(tensors.get(names[0]))}",
        expected=_tensor_words(expected.get(names[0])),
        remedy="The manifest and the graph disagree: export the checkpoint again.",
    )


def _tensor_words(tensor: tuple[str, int] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} with {tensor[1]} dimensions"
