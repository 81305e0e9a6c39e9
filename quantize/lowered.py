"""A component with some layers in fewer bits: as an engine that is tried, and as files of a bundle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, Component
from ..engines import RunOptions
from ..engines.backends.ort import CPU, OrtEngine, leave_pairs, open_session
from ..engines.graph.accounting import count_operators
from ..engines.graph.onnx_bytes import OnnxGraph, read_graph
from ..engines.graph.quantized import FLOATS, INTEGERS, IntegerGrids, IntegerLayer, integer_layers, lower_layers
from ..engines.graph.relocate import Weight, drop_unread, place_weights, weights_of
from ..engines.graph.rewrite import rewrite_for_cpu
from ..engines.graph.weight_only import lower_weights
from ..engines.weights import check_weights, checked_graph
from ..weights.layout import plan_layout
from ..weights.stored import Stored, as_array, open_tensors
from .forms import FORMS, IntegerForm, Lowered


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lowering:
    """A component's plain graph and weights, out of which others are made."""

    bundle: Bundle
    component: str
    graph: bytes
    layers: tuple[IntegerLayer, ...]
    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, bundle: Bundle, component: str) -> Lowering:
        part = bundle.component(component)
        graph = checked_graph(bundle, part)
        path = check_weights(bundle, part, None)
        layers = integer_layers(read_graph(graph))
        return cls(bundle=bundle, component=component, graph=graph, layers=layers, tensors=open_tensors([path]))

    def weight(self, name: str) -> npt.NDArray[np.float32]:
        """A weight as it lies in its file, float32."""
        return np.asarray(as_array(self.tensors[name]), np.float32)

    def lowered(self, layers: Lowered, grids: IntegerGrids | None) -> OnnxGraph:
        """The graph with these layers in integers, whose weights are in it; the other weights stay where they are.

        grids: of the activations, where a form lowers these too.
        """
        graph = read_graph(self.graph)
        for form in FORMS.values():
            own = [layer for name, layer in layers if name == form.name]
            if own and grids is not None and form.activations:
                lower_layers(graph, own, grids, self.weight, FLOATS if form.floating else INTEGERS)
            elif own:
                lower_weights(graph, own, form.bits, self.weight)
        return graph

    def open(self, layers: Lowered, grids: IntegerGrids | None, dims: Mapping[str, int], threads: int) -> OrtEngine:
        """An engine of it on ONNX Runtime's CPU provider, optimised now.

        Weights that do not fit into a graph lie in a file beside the others' while the engine is opened.
        """
        part, made = self.bundle.component(self.component), self.lowered(layers, grids)
        inside = {n: w for n, w in weights_of(made, LEAST_OUTSIDE).items() if w.raw is not None}
        beside = self.bundle.folder / f".{self.component}-{os.getpid()}.trial"
        try:
            if sum(len(w.raw or b"") for w in inside.values()) > MOST_INSIDE:
                self._write_weights(made, inside, beside)
            graph, _ = rewrite_for_cpu(made.to_bytes(), dims)
            session = open_session(
                graph,
                external_folder=self.bundle.folder,
                provider=CPU,
                run=RunOptions(threads=threads),
                optimization="all",
                configure=leave_pairs if any(FORMS[name].floating for name, _ in layers) else None,
            )
        finally:
            beside.unlink(missing_ok=True)
        return OrtEngine(session, inputs=part.inputs, outputs=part.outputs)

    def write(
        self, layers: Lowered, grids: IntegerGrids | None, folder: Path, stem: str, form: IntegerForm
    ) -> Component:
        """Write graph and weights into a folder, under `stem`; the component that they are. Nothing is overwritten.

        form: the lowest of the layers'.
        """
        graph = self.lowered(layers, grids)
        drop_unread(graph)
        part, name = self.bundle.component(self.component), f"{stem}.safetensors"
        digest = self._write_weights(graph, weights_of(graph, LEAST_OUTSIDE), folder / name)
        data = graph.to_bytes()
        with (folder / f"{stem}.onnx").open("xb") as file:
            file.write(data)
        return replace(
            part,
            graph=f"{stem}.onnx",
            weights=name,
            graph_sha256=hashlib.sha256(data).hexdigest(),
            weights_sha256=digest,
            dtype=form.name,
            operators=dict(sorted(count_operators(data).items())),
            source={**part.source, "precision": f"{form.name} by layer"},
        )

    def _write_weights(self, graph: OnnxGraph, weights: Mapping[str, Weight], path: Path) -> str:
        """Write these into a new file that the graph then points at; the file's SHA-256."""
        layout = plan_layout([w.described for w in weights.values()])
        digest = hashlib.sha256(layout.header)
        with path.open("xb") as file:
            file.write(layout.header)
            for tensor in layout.order:
                raw, stored = weights[tensor].raw, self.tensors.get(tensor)
                view = self.tensors[tensor].data.data if raw is None else raw
                file.write(view)
                digest.update(view)
                if stored is not None:
                    stored.release()
        place_weights(graph, list(weights.values()), path.name, layout.places)
        return digest.hexdigest()


MOST_INSIDE = 1_500_000_000
"""Bytes of weights in a graph: messages end at two gigabytes."""
LEAST_OUTSIDE = 1024
"""Bytes from which a tensor lies in the file of weights."""
