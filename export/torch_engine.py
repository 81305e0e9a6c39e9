"""The torch engine: a component's own modules, on the CPU or on CUDA, eager or compiled. A second opinion and the
baseline of every measurement, and the engine that any caller's CUDA graph can hold; never a fallback.

It has been run on the CPU, not on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from ..bundle import Bundle
from ..engines.base import TensorSpec
from ..engines.low_rank import AdaptedBundle
from ..engines.options import RunOptions
from ..engines.profile import check_dims
from ..engines.store import default_store
from ..engines.weights import check_weights
from ..errors import ArgumentError, CorruptError, MismatchError, MissingError
from .trace.clip_blocks import plain_clip_blocks
from .trace.modules import Traceable, build_model, wrap

OWN_GRAPHS = ("max-autotune", "reduce-overhead")
"""The modes of torch.compile in which it captures CUDA graphs itself."""


class TorchEngine:
    """A component as torch runs it, in the precision of its parameters.

    Buffers are NumPy arrays on the CPU and torch tensors on CUDA. Convolutions are laid out channels last on CUDA,
    where half precision needs it for its fast kernels, with group norms that keep that layout. Thread-safe: the module
    is only read.
    """

    backend = "torch"

    def __init__(
        self,
        traceable: Traceable,
        run: RunOptions | None = None,
        *,
        held: torch.nn.Module | None = None,
        names: Collection[str] = (),
        digest: str = "",
    ) -> None:
        """held: the module whose parameters have the bundle's names, of which `names` are the weights with `digest`."""
        options = run or RunOptions()
        self._held, self._names, self._loaded = held or traceable.module, frozenset(names), digest
        self.device = options.torch_device
        self.place = torch.device("cuda", options.device) if self.device == "cuda" else torch.device("cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MissingError("torch sees no CUDA device", remedy="Use torch_device='cpu' on this machine.")
        self.inputs: Mapping[str, TensorSpec] = {s.name: s for s in traceable.inputs}
        self.outputs: Mapping[str, TensorSpec] = {s.name: s for s in traceable.outputs}
        last = self.device == "cuda" if options.channels_last is None else options.channels_last
        layout = {"memory_format": torch.channels_last} if last else {}
        if fuses_norms(options, last):
            from .fused.group_norm import fuse_group_norms

            fuse_group_norms(traceable.module)
        module = traceable.module.eval().requires_grad_(False).to(self.place, **layout)
        self._owns_graph = self.device == "cuda" and options.compile in OWN_GRAPHS
        self._module: Any = module
        if options.compile:
            self._module = torch.compile(module, mode=options.compile, dynamic=False)

    @property
    def capture(self) -> str:
        return "own_graph" if self._owns_graph else "whole_request"

    @property
    def loaded(self) -> str:
        return self._loaded

    def load_weights(self, weights: Mapping[str, NDArray[Any]], digest: str) -> None:
        """See `Swappable`; parameters keep their addresses, which a CUDA graph may hold."""
        own = dict(self._held.named_parameters()) | dict(self._held.named_buffers())
        own = {n: p for n, p in own.items() if n in weights}
        missing = sorted(self._names - own.keys())
        if missing:
            raise MismatchError(f"the weights have no {', '.join(missing[:8])}", expected="every weight of the engine")
        for name, parameter in own.items():
            if tuple(parameter.shape) != weights[name].shape:
                raise MismatchError(
                    f"{name} is {list(weights[name].shape)}",
                    expected=f"{list(parameter.shape)}",
                    remedy="Take weights of the same architecture.",
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(_tensor(weights[name], parameter.dtype))
        self._loaded = digest

    def bind(self, dims: Mapping[str, int]) -> TorchBinding:
        check_dims((*self.inputs.values(), *self.outputs.values()), dims)
        return TorchBinding(self, dims)


class TorchBinding:
    """Buffers of one set of shapes; on the CPU torch and NumPy see the same memory."""

    def __init__(self, engine: TorchEngine, dims: Mapping[str, int]) -> None:
        self._module, self._place = engine._module, engine.place
        self._given = {n: _zeros(s, dims, self._place) for n, s in engine.inputs.items()}
        self._made = {n: _zeros(s, dims, self._place) for n, s in engine.outputs.items()}
        on_cpu = self._place.type == "cpu"
        self.inputs: Mapping[str, Any] = {n: t.numpy() if on_cpu else t for n, t in self._given.items()}
        self.outputs: Mapping[str, Any] = {n: t.numpy() if on_cpu else t for n, t in self._made.items()}

    def enqueue(self, stream: int | None = None) -> None:
        """Evaluate once: at once on the CPU; on CUDA on the stream with this handle (`None`: torch's current one)."""
        if stream is not None and self._place.type == "cpu":
            raise ArgumentError("a CUDA stream was given to an engine on the CPU", expected="no stream")
        with torch.no_grad(), _on_stream(stream, self._place):
            out = self._module(**self._given)
            for target, value in zip(self._made.values(), out if isinstance(out, tuple) else (out,), strict=True):
                target.copy_(value)


def fuses_norms(options: RunOptions, channels_last: bool) -> bool:
    """Whether group norms are to be kernels of Triton; torch.compile makes its own of them."""
    if options.fused_norms is not None:
        return options.fused_norms
    eager_on_cuda = options.torch_device == "cuda" and not options.compile
    return eager_on_cuda and channels_last and importlib.util.find_spec("triton") is not None


def _zeros(spec: TensorSpec, dims: Mapping[str, int], place: torch.device) -> torch.Tensor:
    return torch.zeros(spec.resolve(dims), dtype=getattr(torch, spec.dtype), device=place)


def _on_stream(stream: int | None, place: torch.device) -> Any:
    if stream is None:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=place))


def open_torch_engine(bundle: Bundle, name: str, run: RunOptions) -> TorchEngine:
    """Build a component's modules from its configuration and load the bundle's weights into them, once checked.

    On CUDA a VAE that its checkpoint says overflows float16 (`force_upcast`) runs in bfloat16 beside a UNet in half
    precision, unless `vae_float32` is set: its range is float32's. UNets that ask for attention in float32 are given
    torch's fused kernels, which keep the scores in it.
    """
    component = bundle.component(name)
    if run.threads:
        torch.set_num_threads(run.threads)
    on_cuda, dtype = run.torch_device == "cuda", run.torch_dtype or component.dtype
    beside_half = bundle.component("unet").dtype != "float32" and not run.torch_dtype and not run.vae_float32
    if on_cuda and beside_half and dtype == "float32" and component.config.get("force_upcast"):
        dtype = "bfloat16"
    model = build_model(name, component.config, dtype)
    traceable = wrap(name, model, component.config, dtype, bundle.model, exact_scores=on_cuda)
    if bundle.model.clips:
        plain_clip_blocks(traceable.module)
    check_weights(bundle, component, default_store())
    # What the bundle lacks its graph does not use: the last layer of a text encoder that is read before it, for one.
    held, stored = traceable.module, load_file(bundle.path(component.weights))
    result = held.load_state_dict(stored, strict=False)
    if result.unexpected_keys:
        raise CorruptError(
            f"{component.weights} holds weights that {name} does not know: {', '.join(result.unexpected_keys[:3])}",
            remedy="Export the checkpoint again.",
        )
    if isinstance(bundle, AdaptedBundle) and name in bundle.layers:
        from .low_rank import LowRankModule

        module = LowRankModule(traceable.module, bundle.layers[name], bundle.vocabularies.get(name))
        traceable = replace(traceable, module=module, inputs=component.inputs)
    return TorchEngine(traceable, run, held=held, names=stored, digest=component.weights_sha256)


def _tensor(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """An array as a tensor; bfloat16 comes as its bits."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor.to(dtype)
