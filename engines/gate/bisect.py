"""Naming the first node that is wrong: a graph is cut after a node, built, run, and compared with the same cut unbuilt.

The cut is moved by bisection over the nodes in their order, so that a graph of 3,000 nodes takes a dozen builds. What
is compared with is the same cut run by ONNX Runtime without optimisation, whose end `verify` compares with torch.
Needs the module `onnx`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...bundle import Bundle, Component
from ...errors import ArgumentError, MissingExtraError
from ...places import copy_file
from ..backends.ort import OrtEngine, open_session
from ..backends.registry import load_backend, plain_backend
from ..base import TensorSpec
from ..open import build_engines, open_engine
from ..options import BuildOptions, RunOptions
from ..profile import Profile, dimension_names
from ..store import Store
from ..weights import check_graph
from .gate import Evaluate, compare, engine_function, limit_for
from .reference import Case

FETCHED = 32
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}

Candidate = Callable[["Bundle", str], Evaluate]
"""Makes what is suspected out of a bundle with a cut graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """The first node whose output is wrong: its name, operator and output, its error, and the error before it."""

    node: str
    operator: str
    tensor: str
    rel_l2: float
    before: float
    limit: float
    builds: int


def bisect_engine(
    bundle: Bundle,
    component: str,
    case: Case,
    *,
    backend: str | None = None,
    options: BuildOptions | None = None,
    candidate: Candidate | None = None,
    limit: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Culprit | None:
    """The first node whose output differs by more than `limit` (by default the gate's); `None` when the last agrees.

    Assumes that an error, once there, shows in what is computed from it: a place is found where right turns into
    wrong. `candidate` replaces the engines of `backend` by something else.
    """
    onnx = _import_onnx()
    part = bundle.component(component)
    model = onnx.load(str(check_graph(bundle, part)), load_external_data=False)
    bound = limit if limit is not None else limit_for(part.dtype, case.torch_error)
    make = candidate or _builder(backend or plain_backend().name, options, case)
    places = _places(onnx, bundle, part, model, case)
    if not places:
        raise ArgumentError(f"the graph of {component!r} has no node with a float output", expected="one at least")
    errors: dict[int, float] = {}

    def error(at: int) -> float:
        if at not in errors:
            place = places[at]
            if progress is not None:
                progress(f"{place.operator} {place.node} ({at + 1} of {len(places)})")
            errors[at] = _error(onnx, bundle, component, model, _frontier(model, places[: at + 1]), case, make)
        return errors[at]

    low, high = -1, len(places) - 1
    if error(high) <= bound:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    return Culprit(
        node=places[high].node,
        operator=places[high].operator,
        tensor=places[high].tensor.name,
        rel_l2=error(high),
        before=error(low) if low >= 0 else 0.0,
        limit=bound,
        builds=len(errors),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A node after which the graph can be cut: its index, name and operator, and its output as it is for the case."""

    index: int
    node: str
    operator: str
    tensor: TensorSpec


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "export", purpose="bisecting a graph") from error
    return onnx


def _places(onnx: Any, bundle: Bundle, part: Component, model: Any, case: Case) -> list[_Place]:
    """Nodes in order with a float output that depends on an input; ONNX Runtime tells dtypes and shapes."""
    live = {i.name for i in model.graph.input}
    nodes = []
    for index, node in enumerate(model.graph.node):
        if live & set(node.input):
            live |= set(node.output)
            nodes.append((index, node))
    known = {o.name for o in model.graph.output}
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=n.output[0]) for _, n in nodes if n.output[0] not in known)
    with tempfile.TemporaryDirectory(prefix="fewstep-bisect-") as folder:
        graph = _write(bundle, part, shown.SerializeToString(), Path(folder))
        session = open_session(graph, run=RunOptions(), optimization="disabled")
        types = {o.name: _FLOATS.get(o.type) for o in session.get_outputs()}
        fetched = [(i, n) for i, n in nodes if types[n.output[0]] is not None]
        places = []
        # Not all at once: every intermediate of a full-size model does not fit into memory.
        for start in range(0, len(fetched), FETCHED):
            some = fetched[start : start + FETCHED]
            values = session.run([n.output[0] for _, n in some], dict(case.inputs))
            for (index, node), value in zip(some, values, strict=True):
                shape = tuple(int(n) for n in value.shape)
                spec = TensorSpec(name=node.output[0], dtype=str(value.dtype), shape=shape)
                places.append(_Place(index=index, node=node.name, operator=node.op_type, tensor=spec))
    return places


def _frontier(model: Any, places: list[_Place]) -> list[_Place]:
    """Of the places up to a cut, those whose tensors are used beyond it, and the last: errors pass through these."""
    last = places[-1].index
    used = {name for node in list(model.graph.node)[last + 1 :] for name in node.input}
    used |= {o.name for o in model.graph.output}
    return [p for p in places if p.tensor.name in used or p is places[-1]]


def _error(
    onnx: Any, bundle: Bundle, component: str, model: Any, ends: list[_Place], case: Case, make: Candidate
) -> float:
    """The largest relative L2 error at some tensors: the suspect's cut graph against the same cut unoptimised."""
    with tempfile.TemporaryDirectory(prefix="fewstep-bisect-") as folder:
        cut = _cut(onnx, bundle, component, model, ends, Path(folder))
        part = cut.component(component)
        plain = OrtEngine.from_onnx(
            cut.path(part.graph), inputs=part.inputs, outputs=part.outputs, optimization="disabled"
        )
        inputs = {s.name: case.inputs[s.name] for s in part.inputs}
        expected = engine_function(plain)(inputs, case.dims)
        outputs = make(cut, component)(inputs, case.dims)
        return max(compare(outputs[name], value).rel_l2 for name, value in expected.items())


def _cut(onnx: Any, bundle: Bundle, component: str, model: Any, ends: list[_Place], folder: Path) -> Bundle:
    """A bundle in `folder` whose component ends with some tensors: the nodes that they need, the inputs of these."""
    part, nodes = bundle.component(component), list(model.graph.node)
    producers = {output: i for i, n in enumerate(nodes) for output in n.output}
    needed = [p.tensor.name for p in ends]
    reached, kept = set(needed), set[int]()
    while needed:
        producer = producers.get(needed.pop())
        if producer is None or producer in kept:
            continue
        kept.add(producer)
        fresh = set(nodes[producer].input) - reached
        reached |= fresh
        needed += fresh
    short = onnx.ModelProto()
    short.CopyFrom(model)
    graph = short.graph
    del graph.node[:], graph.output[:], graph.value_info[:], graph.input[:], graph.initializer[:]
    graph.node.extend(nodes[i] for i in sorted(kept))
    graph.input.extend(i for i in model.graph.input if i.name in reached)
    graph.initializer.extend(i for i in model.graph.initializer if i.name in reached)
    kinds = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
    for place in ends:
        spec = place.tensor
        graph.output.append(onnx.helper.make_tensor_value_info(spec.name, kinds[spec.dtype], [None] * len(spec.shape)))
    data = short.SerializeToString()
    _write(bundle, part, data, folder)
    changed = replace(
        part,
        graph_sha256=hashlib.sha256(data).hexdigest(),
        inputs=tuple(s for s in part.inputs if s.name in reached),
        outputs=tuple(p.tensor for p in ends),
        operators={},
    )
    return replace(bundle, folder=folder, components={**bundle.components, component: changed})


def _write(bundle: Bundle, part: Component, graph: bytes, folder: Path) -> Path:
    """Put a graph into a folder of its own, with the component's weights beside it."""
    copy_file(bundle.path(part.weights), folder / part.weights)
    path = folder / part.graph
    path.write_bytes(graph)
    return path


def _builder(backend: str, options: BuildOptions | None, case: Case) -> Candidate:
    """Engines of a backend, built in the cut bundle's own folder."""

    def make(cut: Bundle, component: str) -> Evaluate:
        part = cut.component(component)
        store = Store(cut.folder / "engines")
        profiles: dict[str, Sequence[Profile]] = {component: (_exact(part, case),)}
        build_engines(
            cut,
            backend=backend,
            components=(component,),
            profiles=profiles if load_backend(backend).uses_profiles else None,
            options=options,
            store=store,
            gate=False,
        )
        return engine_function(open_engine(cut, component, backend=backend, dims=case.dims, store=store, build="never"))

    return make


def _exact(part: Component, case: Case) -> Profile:
    return Profile.exact({n: case.dims[n] for n in dimension_names(part.inputs)})
