"""ONNX Runtime on CUDA: torch tensors as buffers, a stream of the engine's own, its own CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ...errors import MissingError, MissingExtraError
from .. import machine
from ..base import Binding, Engine, TensorSpec
from ..graph.accounting import FUSED, Forms
from ..options import BuildOptions, RunOptions
from ..profile import check_dims
from ..streams import take_stream
from .ort import FATAL, OrtEngine, Provider, memory_told
from .ort_build import OrtBackend
from .ort_cuda_graph import rewrite_for_cuda
from .registry import BuildJob, OpenJob, register

_graph_ids = itertools.count(1)


def import_torch_cuda() -> Any:
    """The module `torch` with a CUDA device; `MissingError` when it sees none."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "cuda", purpose="device memory for a CUDA engine") from error
    if not torch.cuda.is_available():
        raise MissingError("torch sees no CUDA device", remedy="Use a backend for the CPU on this machine.")
    return torch


def make_stream(device: int) -> Any:
    """The stream on which all runs of one session are ordered; ONNX Runtime takes it when the session is made."""
    return take_stream(import_torch_cuda(), device)


class OrtCudaBinding:
    """Torch tensors bound to a session on CUDA.

    A session works on the stream it was made with. `enqueue(stream)` makes that stream wait for the caller's and the
    caller's for it, by events; the host waits for neither.
    """

    __slots__ = ("_io", "_options", "_session", "_stream", "_torch", "inputs", "outputs")

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        dims: Mapping[str, int],
        *,
        run: RunOptions,
        stream: Any,
    ) -> None:
        import onnxruntime

        torch = self._torch = import_torch_cuda()
        device = torch.device("cuda", run.device)
        self.inputs: dict[str, Any] = {
            n: torch.zeros(s.resolve(dims), dtype=getattr(torch, s.dtype), device=device) for n, s in inputs.items()
        }
        self.outputs: dict[str, Any] = {
            n: torch.zeros(s.resolve(dims), dtype=getattr(torch, s.dtype), device=device) for n, s in outputs.items()
        }
        self._session, self._stream, self._io = session, stream, session.io_binding()
        for name, tensor in self.inputs.items():
            self._io.bind_input(name, "cuda", run.device, _element_type(tensor), tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in self.outputs.items():
            self._io.bind_output(
                name, "cuda", run.device, _element_type(tensor), tuple(tensor.shape), tensor.data_ptr()
            )
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = FATAL
        # Without this entry each run ends with a synchronisation of the host.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # One graph for each set of addresses; -1 tells ONNX Runtime not to capture.
        self._options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)) if run.cuda_graph else "-1")

    def enqueue(self, stream: int | None = None) -> None:
        """Evaluate once in the order of the CUDA stream with this handle (`None`: torch's current one)."""
        torch = self._torch
        caller = torch.cuda.current_stream(self._stream.device)
        if stream is not None:
            caller = torch.cuda.ExternalStream(stream, device=self._stream.device)
        if caller != self._stream:
            self._stream.wait_stream(caller)
        with memory_told("an evaluation"):
            self._session.run_with_iobinding(self._io, self._options)
        if caller != self._stream:
            caller.wait_stream(self._stream)


def _element_type(tensor: Any) -> Any:
    """The element type as ONNX Runtime's bindings take it: a NumPy type, or ONNX's number for bfloat16."""
    import numpy as np

    name = str(tensor.dtype).removeprefix("torch.")
    return 16 if name == "bfloat16" else np.dtype(name).type


class OrtCudaEngine(OrtEngine):
    """A component on CUDA, its bindings torch tensors."""

    __slots__ = ("_run", "_stream")

    device = "cuda"

    def __init__(
        self,
        session: Any,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        run: RunOptions,
        stream: Any,
    ) -> None:
        super().__init__(session, inputs=inputs, outputs=outputs, provider=CUDA)
        self._run, self._stream = run, stream

    @property
    def capture(self) -> str:  # type: ignore[override]
        return "own_graph" if self._run.cuda_graph else "none"

    def bind(self, dims: Mapping[str, int]) -> Binding:
        check_dims((*self.inputs.values(), *self.outputs.values()), dims)
        return OrtCudaBinding(self._session, self.inputs, self.outputs, dims, run=self._run, stream=self._stream)


def provider_options(run: RunOptions, stream: int | None) -> dict[str, str]:
    options = {
        "device_id": str(run.device),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        "use_tf32": "0",
        "prefer_nhwc": "0",
        "enable_cuda_graph": "1" if run.cuda_graph else "0",
    }
    return options if stream is None else {**options, "user_compute_stream": str(stream)}


COMPUTING = frozenset(
    {
        *(
            "Attention",
            "MultiHeadAttention",
            "Conv",
            "FusedConv",
            "NhwcConv",
            "MatMul",
            "Gemm",
            "FusedMatMul",
            "Resize",
        ),
        *("GroupNormalization", "GroupNorm", "InstanceNormalization", "LayerNormalization", "SkipLayerNormalization"),
        *("Softmax", "Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Sigmoid", "ReduceMean", "Resize"),
    }
)
"""What works on feature maps and hidden states. The others may be arithmetic on shapes, which belongs on the CPU."""


def _find_libraries(onnxruntime: ModuleType) -> None:
    """Load CUDA's libraries from where wheels put them, as importing torch would have done."""
    onnxruntime.preload_dlls()


CUDA = Provider(
    backend="ort-cuda",
    name="CUDAExecutionProvider",
    package="onnxruntime-gpu",
    extra="cuda",
    options=provider_options,
    computing=COMPUTING,
    prepare=_find_libraries,
)


class OrtCuda(OrtBackend):
    """See the module."""

    provider, rewriting, device, rank = CUDA, 2, "cuda", 3

    def suits(self) -> str | None:
        return "a GPU, and ONNX Runtime was installed with CUDA"

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        gpu = machine.gpu()
        return gpu.name, gpu.compute_capability

    def rewrite(self, graph: bytes, job: BuildJob) -> tuple[bytes, dict[str, int]]:
        return rewrite_for_cuda(graph)

    def fusion(self, job: BuildJob) -> tuple[Forms, bool]:
        return FUSED, True

    def load(self, job: OpenJob, open_with: Callable[..., Any]) -> Engine:
        stream = make_stream(job.run.device)
        session = open_with(stream=stream.cuda_stream)
        specs = {"inputs": job.component.inputs, "outputs": job.component.outputs}
        return OrtCudaEngine(session, **specs, run=job.run, stream=stream)


register(OrtCuda())
