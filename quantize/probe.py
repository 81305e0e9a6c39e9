"""What the layers read and give on the bundle's own pictures: the ends of their ranges, evaluation by evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..engines import Binding, RunOptions
from ..engines.backends.ort import CPU, OrtBinding, open_session
from ..engines.graph.onnx_bytes import FLOAT, Node, OnnxGraph, read_graph
from ..engines.graph.quantized import LINEAR, IntegerLayer, integer_layers

Float32 = npt.NDArray[np.float32]
LOW, HIGH, SQUARES, SIZE = "low", "high", "squares", "size"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What was seen of a component's tensors, an entry an evaluation.

    low, high: by tensor, float32 [n], or [n, C] of what linear layers read. squares: of the latter, their mean
    squares by channel, float32 [C]. products: by layer, multiplications for the pictures of an evaluation, on average.
    """

    low: Mapping[str, Float32]
    high: Mapping[str, Float32]
    squares: Mapping[str, Float32]
    products: Mapping[str, float]


class ProbeEngine:
    """A component's plain graph that tells, after each evaluation, what its layers read and gave."""

    device, capture, backend = "cpu", "none", "probe"

    def __init__(self, bundle: Bundle, component: str, *, threads: int = 0) -> None:
        part = bundle.component(component)
        graph = read_graph(bundle.read_graph(part))
        self.layers = integer_layers(graph)
        self._told = _add_probes(graph, self.layers)
        session = open_session(
            graph.to_bytes(),
            external_folder=bundle.folder,
            provider=CPU,
            run=RunOptions(threads=threads),
            optimization="all",
        )
        self._session = session
        self.inputs = {s.name: s for s in part.inputs}
        self.outputs = {s.name: s for s in part.outputs}
        self._records: dict[str, list[Any]] = {name: [] for name in self._told}

    def bind(self, dims: Mapping[str, int]) -> Binding:
        return _ProbeBinding(self._session, self.inputs, self.outputs, dims, self._records)

    def seen(self) -> Seen:
        """All that was told so far."""
        arrays = {n: np.stack([np.asarray(v, np.float32) for v in r]) for n, r in self._records.items()}

        def by(kind: str) -> dict[str, Float32]:
            return {n.removesuffix(f"!{kind}"): a for n, a in arrays.items() if n.endswith(f"!{kind}")}

        sizes = by(SIZE)
        products = {
            layer.module: float(sizes[layer.output].mean()) * float(np.prod(layer.shape[1:])) for layer in self.layers
        }
        squares = {n: np.asarray(a.mean(axis=0), np.float32) for n, a in by(SQUARES).items()}
        return Seen(low=by(LOW), high=by(HIGH), squares=squares, products=products)


class _ProbeBinding(OrtBinding):
    """Buffers, and the probes' outputs read after each evaluation."""

    __slots__ = ("_records",)

    def __init__(
        self, session: Any, inputs: Any, outputs: Any, dims: Mapping[str, int], records: dict[str, list[Any]]
    ) -> None:
        super().__init__(session, inputs, outputs, dims)
        self._records = records
        for name in records:
            self._io.bind_output(name, "cpu")

    def enqueue(self, stream: int | None = None) -> None:
        super().enqueue(stream)
        names = [o.name for o in self._session.get_outputs()]
        values = dict(zip(names, self._io.get_outputs(), strict=True))
        for name, into in self._records.items():
            into.append(values[name].numpy().copy())


def _add_probes(graph: OnnxGraph, layers: Sequence[IntegerLayer]) -> list[str]:
    """Give the graph outputs for what its layers read and give; their names."""
    told: list[str] = []

    def tell(name: str, kind: str, node: Node) -> None:
        node.outputs = [f"{name}!{kind}"]
        if node.outputs[0] not in told:
            graph.nodes.append(node)
            graph.add_output(node.outputs[0])
            told.append(node.outputs[0])

    def ends(name: str, axes: Sequence[int]) -> None:
        over = [graph.add_integers(f"axes_{len(axes)}", axes)] if axes else []
        for kind, operator in ((LOW, "ReduceMin"), (HIGH, "ReduceMax")):
            tell(name, kind, Node(operator=operator, inputs=[name, *over], outputs=[], attributes={"keepdims": 0}))

    for layer in layers:
        if layer.kind == LINEAR:
            axes = list(range(len(graph.shapes.get(layer.input, (0, 0, 0))) - 1))
            squared, over = f"{layer.input}!squared", graph.add_integers(f"axes_{len(axes)}", axes)
            if f"{layer.input}!{SQUARES}" not in told:
                graph.nodes.append(Node(operator="Mul", inputs=[layer.input, layer.input], outputs=[squared]))
            mean = Node(operator="ReduceMean", inputs=[squared, over], outputs=[], attributes={"keepdims": 0})
            tell(layer.input, SQUARES, mean)
            ends(layer.input, axes)
        else:
            ends(layer.input, [])
            ends(layer.output, [])
        counted = f"{layer.output}!counted"
        graph.nodes.append(Node(operator="Size", inputs=[layer.output], outputs=[counted]))
        tell(layer.output, SIZE, Node(operator="Cast", inputs=[counted], outputs=[], attributes={"to": FLOAT}))
    return told
