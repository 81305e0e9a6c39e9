"""Cases of an engine's own sizes, where the bundle's reference has none that its profiles admit.

An exact profile admits one size, and a reference is made for a few small ones. A case is then made for the profile's
own size: a stored case's inputs tiled to it, and outputs by torch in float32 with TF32 off where the torch backend is
loaded, else by the exported graph on ONNX Runtime. The graph has an error of its own, which the gate of the export
measured; it is added to what the engine is allowed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import Bundle
from ...errors import MissingError
from ..backends.registry import registered
from ..graph.low_rank import RANK, WORDS
from ..low_rank import INPUTS, RANKS, AdaptedBundle
from ..options import RunOptions
from ..profile import Profile
from .gate import Evaluate, engine_function
from .reference import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXACT, GRAPH = "torch float32", "the exported graph on ONNX Runtime"


def cases_of_profiles(
    bundle: Bundle, cases: Sequence[Case], profiles: Sequence[Profile]
) -> tuple[list[Case], list[str]]:
    """The cases of one component that the profiles admit, with at least one of each profile's own, and who made them.

    Without profiles an engine takes any size. `MissingError` where a profile admits no case and none can be made here.
    """
    if not profiles:
        return list(cases), [EXACT]
    admitted = [c for c in cases if any(p.admits(c.dims) for p in profiles)]
    lacking = [p for p in profiles if not any(p.admits(c.dims) for c in cases)]
    if not lacking:
        return admitted, [EXACT]
    evaluate, own_error, maker = _reference(bundle, cases[0].component)
    made = [_resized(bundle, cases, profile.optimum, len(cases) + i) for i, profile in enumerate(lacking)]
    worst = {d: max(c.torch_error.get(d, 0.0) for c in cases) for d in {d for c in cases for d in c.torch_error}}
    with _exact_arithmetic():
        made = [
            replace(
                case,
                outputs={n: np.array(v) for n, v in evaluate(case.inputs, case.dims).items()},
                torch_error={d: error + own_error for d, error in worst.items()},
            )
            for case in made
        ]
    return [*admitted, *made], [*([EXACT] if admitted else []), maker]


def with_changes(bundle: AdaptedBundle, cases: Sequence[Case]) -> list[Case]:
    """The cases of a component that takes low-rank changes: as they are, for no change; and the first one changed."""
    if not cases:
        return []
    part, dims = bundle.component(cases[0].component), {RANK: RANKS[0], WORDS: 1}
    random = np.random.default_rng(0)
    plain = [
        replace(
            case,
            dims={**case.dims, **dims},
            inputs={
                s.name: case.inputs[s.name] if s.name in case.inputs else _zeros(s.resolve({**case.dims, **dims}))
                for s in part.inputs
            },
        )
        for case in cases
    ]
    first = plain[0]
    changed = {n: random.normal(0.0, 0.02, first.inputs[n].shape).astype(np.float32) for n in INPUTS}
    inputs = {**first.inputs, **changed}
    evaluate, own_error, _ = _reference(bundle, first.component)
    with _exact_arithmetic():
        outputs = {n: np.array(v) for n, v in evaluate(inputs, first.dims).items()}
    error = {d: e + own_error for d, e in first.torch_error.items()}
    return [*plain, replace(first, index=len(cases), inputs=inputs, outputs=outputs, torch_error=error)]


def _zeros(shape: tuple[int, ...]) -> NDArray[Any]:
    return np.zeros(shape, np.float32)


def _resized(bundle: Bundle, cases: Sequence[Case], dims: Mapping[str, int], index: int) -> Case:
    """A stored case's inputs, each repeated or cut along its axes to these dimensions; outputs are to be made."""
    case = cases[index % len(cases)]
    inputs = {}
    for spec in bundle.component(case.component).inputs:
        value: NDArray[Any] = case.inputs[spec.name]
        for axis, size in enumerate(spec.resolve(dims)):
            value = np.take(value, np.arange(size) % value.shape[axis], axis)
        inputs[spec.name] = value
    return replace(case, index=index, dims=dict(dims), inputs=inputs)


def _reference(bundle: Bundle, component: str) -> tuple[Evaluate, float, str]:
    """What makes a component's outputs, its own error, and its name."""
    with suppress(MissingError):  # the package that makes it is not loaded, or lacks what it needs
        factory = registered("torch")
        if factory is not None:
            run = RunOptions(torch_dtype="float32", torch_device=_place(), channels_last=False)
            return engine_function(factory(bundle, component, run)), 0.0, EXACT
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingError(
            f"the reference has no case of the sizes that this engine of {component!r} is built for",
            expected="torch or ONNX Runtime, to make one",
            remedy="Install one: pip install 'fewstep[export]', or pip install 'fewstep[cpu]'",
        )
    from ..backends.ort import OrtEngine

    part = bundle.component(component)
    graph = OrtEngine.from_onnx(
        bundle.read_graph(part),
        inputs=part.inputs,
        outputs=part.outputs,
        folder=bundle.path(part.weights).parent,
        optimization="disabled",
    )
    measured = bundle.gate.get("components", {}).get(component, {}).get("worst_relative_l2")
    return engine_function(graph), float(measured or 0.0), GRAPH


def _place() -> str:
    if importlib.util.find_spec("torch") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """torch's convolutions and products in float32 as they are called: TF32 has 10 bits of mantissa."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
