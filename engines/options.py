"""What a caller may ask of a backend: options that shape the engine, and options of the session that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ArgumentError

SPINNING = ("run", "always", "off")
OPTIMIZATIONS = ("disabled", "basic", "extended", "all")
GRAPH_STRATEGIES = ("default", "whole-graph")

TORCH_DEVICES = ("cpu", "cuda")
TORCH_DTYPES = ("", "float32", "float16", "bfloat16")
COMPILE_MODES = ("", "default", "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{name} is {value!r}", expected=f"one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What decides the engine's bytes; all of it goes into the engine's key.

    `optimization` is ONNX Runtime's level, `optimization_level` TensorRT's (0 to 5, `None`: its default).
    `compute_capabilities` (`"8.9"`) are TensorRT-RTX's targets when it builds for other GPUs than this machine's.
    `workspace_bytes` and `auxiliary_streams` bound TensorRT's scratch memory and its side streams.
    `capturable` makes a TensorRT-RTX engine leave all memory to its caller, so that a caller's CUDA graph can hold it.
    `refittable` makes a TensorRT engine whose weights can be replaced where they lie, `stripped` one whose file holds
    none: they are the bundle's own, read when it is opened. Stripped alone, kernels may rely on the weights' values.
    `float16` converts a graph for ONNX Runtime on CUDA to half precision after fusion; TensorRT takes it as exported.
    """

    optimization: str = "all"
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    auxiliary_streams: int | None = 0
    compute_capabilities: tuple[str, ...] = ()
    capturable: bool = False
    refittable: bool = False
    stripped: bool = False
    float16: bool = False

    def __post_init__(self) -> None:
        _one_of("optimization", self.optimization, OPTIMIZATIONS)
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise ArgumentError(f"optimization_level is {self.optimization_level!r}", expected="an integer from 0 to 5")
        for name in ("workspace_bytes", "auxiliary_streams"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ArgumentError(f"{name} is {value!r}", expected="an integer, 0 or more")

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What decides how an engine runs, and not what it is; none of it goes into the key.

    `threads` is the size of ONNX Runtime's pool (0: one per core). `spinning` says whether its threads wait busily:
    while a run lasts (`"run"`), between runs too (`"always"`), or never (`"off"`, for busy machines).
    `device` is the CUDA device's index. `graph_strategy` is TensorRT-RTX's own use of CUDA graphs. `torch_device`,
    `torch_dtype`, `compile`, `channels_last` and `fused_norms` are the torch engine's: where it runs, in which
    precision (empty: the bundle's), the mode of `torch.compile` (empty: eager), the layout of its convolutions (`None`:
    channels last on CUDA), and whether group norms are kernels of Triton (`None`: with that layout, eagerly on CUDA,
    where Triton is installed). `vae_float32` keeps a VAE in float32 that it would run in bfloat16, because it overflows
    float16.
    """

    threads: int = 0
    spinning: str = "run"
    arena: bool = True
    device: int = 0
    cuda_graph: bool = False
    graph_strategy: str = "default"
    torch_device: str = "cpu"
    torch_dtype: str = ""
    compile: str = ""
    channels_last: bool | None = None
    fused_norms: bool | None = None
    vae_float32: bool = False

    def __post_init__(self) -> None:
        _one_of("spinning", self.spinning, SPINNING)
        _one_of("graph_strategy", self.graph_strategy, GRAPH_STRATEGIES)
        _one_of("torch_device", self.torch_device, TORCH_DEVICES)
        _one_of("torch_dtype", self.torch_dtype, TORCH_DTYPES)
        _one_of("compile", self.compile, COMPILE_MODES)
        for name in ("threads", "device"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ArgumentError(f"{name} is {value!r}", expected="an integer, 0 or more")


def relevant(options: BuildOptions, names: tuple[str, ...]) -> Mapping[str, Any]:
    """The options that a backend heeds, as JSON data; a set option that it would ignore raises `ArgumentError`."""
    default = BuildOptions()
    for field in fields(options):
        if field.name not in names and getattr(options, field.name) != getattr(default, field.name):
            raise ArgumentError(
                f"the option {field.name} means nothing to this backend",
                expected=f"only {', '.join(names)}",
                remedy="Leave it out, or name another backend.",
            )
    return {n: list(v) if isinstance(v := getattr(options, n), tuple) else v for n in names}
