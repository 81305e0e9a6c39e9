"""A stand-in for `IRefitter` and `IParserRefitter`, beside `standin_tensorrt.py`.

An engine is refitted by running its very ONNX with other initialisers. Refused is what the library's documentation says
is refused, or undefined: an engine that was not built for it, names that it does not ask for, other counts and types,
values that are not finite, weights that are missing, and a refit while work of the engine is pending. Whether weights
lie where they lay before is not documented, so here they never do: recorded work of before computes nothing (NaN).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

if TYPE_CHECKING:
    from standin_tensorrt import Engine, Plan

ONNX_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 9: "BOOL"}


def initialisers(graph: bytes, folder: Path) -> dict[str, onnx.TensorProto]:
    model = onnx.load_model_from_string(graph)
    onnx.external_data_helper.load_external_data_for_model(model, str(folder))
    return {i.name: i for i in model.graph.initializer}


class Refittable:
    """The weights of one engine: by name what the plan holds, and the session that computes with them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.running, self.generation, self.lock = plan, 0, 0, threading.Lock()
        self.values: dict[str, np.ndarray] = {}
        self.session: Any = None if plan.stripped else self._session({})

    def evaluate(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert self.session is not None, "the engine has no weights"
        with self.lock:
            self.running += 1
        try:
            return list(self.session.run(outputs, feed))
        finally:
            with self.lock:
                self.running -= 1

    def refit(self, values: dict[str, np.ndarray]) -> None:
        assert not self.running, "a refit while work is pending is undefined"
        self.values = {**self.values, **values}
        self.session, self.generation = self._session(self.values), self.generation + 1

    def _session(self, values: dict[str, np.ndarray]) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.plan.folder))
        model = onnx.load_model_from_string(self.plan.graph)
        for proto in model.graph.initializer:
            if proto.name in values:  # in the graph itself: what is folded is folded of these values
                proto.CopyFrom(onnx.numpy_helper.from_array(values[proto.name], proto.name))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Refitter:
    """See `IRefitter`."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self._engine, self._plan = engine, engine.plan
        self._say = engine.runtime._say
        if not self._plan.refittable:
            self._say("createInferRefitter: condition: e.isRefittable()")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._protos = initialisers(self._plan.graph, self._plan.folder)
        self._set: dict[str, np.ndarray] = {}

    def get_all_weights(self) -> list[str]:
        return sorted(self._plan.refittable)

    def get_missing_weights(self) -> list[str]:
        held = self._engine.weights.values
        return [n for n in self.get_all_weights() if self._plan.stripped and n not in self._set and n not in held]

    def get_weights_prototype(self, name: str) -> Any:
        real = self._engine.library.real
        if name not in self._plan.refittable:
            return real.Weights()
        return real.Weights(onnx.numpy_helper.to_array(self._protos[name]))

    def set_named_weights(self, name: str, weights: Any) -> bool:
        array = np.array(weights.numpy())
        if name not in self._plan.refittable:
            self._say(f"no refittable weights {name}")
            return False
        proto = self._protos[name]
        if weights.dtype.name != ONNX_TYPES[proto.data_type] or array.size != int(np.prod(proto.dims)):
            self._say(f"{name}: type or count of the weights is not the prototype's")
            return False
        self._set[name] = array.reshape(list(proto.dims))
        return True

    def refit_cuda_engine_async(self, stream: int) -> bool:
        library = self._engine.library
        library.refits += 1
        broken = [n for n, v in self._set.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
        if (
            library.driver.captures.get(stream)
            or self.get_missing_weights()
            or broken
            or library.refits == library.fails_at
        ):
            self._say(f"weights validation failed: {', '.join(broken)}")
            return False
        if self._plan.identical:
            for name, array in self._set.items():
                assert np.array_equal(array, onnx.numpy_helper.to_array(self._protos[name])), "unpredictable behavior"
        self._engine.weights.refit(self._set)
        return True


class ParserRefitter:
    """See `IParserRefitter`: sets every weight of an ONNX model that the engine asks for."""

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter, self._errors = refitter, 0

    @property
    def num_errors(self) -> int:
        return self._errors

    def get_error(self, index: int) -> Any:
        raise IndexError(index)

    def refit_from_bytes(self, model: bytes, path: str) -> bool:
        protos = initialisers(model, Path(path).parent)
        real = self._refitter._engine.library.real
        for name in self._refitter.get_all_weights():
            if name not in protos:
                self._refitter._say(f"the model has no initializer {name}")
                return False
            if not self._refitter.set_named_weights(name, real.Weights(onnx.numpy_helper.to_array(protos[name]))):
                return False
        return True
