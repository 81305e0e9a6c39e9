"""ONNX Runtime's bindings on CUDA: torch tensors as buffers, a stream of the engine's own, its own CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ...errors import MissingError, MissingExtraError
from ..base import TensorSpec
from ..options import RunOptions

_graph_ids = itertools.count(1)


def import_torch_cuda() -> Any:
    """The module `torch` with a CUDA device; `MissingError` when it sees none."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "cuda", purpose="device memory for a CUDA engine") from error
    if not torch.cuda.is_available():
        raise MissingError("torch sees no CUDA device", remedy="Use the backend 'ort-cpu' on this machine.")
    return torch


def make_stream(device: int) -> Any:
    """The stream on which all runs of one session are ordered; ONNX Runtime takes it when the session is made."""
    torch = import_torch_cuda()
    return torch.cuda.Stream(device=device)


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
        self._session.run_with_iobinding(self._io, self._options)
        if caller != self._stream:
            caller.wait_stream(self._stream)


def _element_type(tensor: Any) -> Any:
    """The element type as ONNX Runtime's bindings take it: a NumPy type, or ONNX's number for bfloat16."""
    import numpy as np

    name = str(tensor.dtype).removeprefix("torch.")
    return 16 if name == "bfloat16" else np.dtype(name).type
