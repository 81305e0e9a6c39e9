"""What stands in for `triton_python_backend_utils` in tests: its documented classes, which refuse what the real do.

After the Python backend's README and its stub: a tensor is made of a NumPy array alone, of a type that Triton knows,
and strings are arrays of objects that are bytes or text; a response holds tensors alone, and an error beside none.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np

TYPES = {
    **{"BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64},
    **{"INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64},
    **{"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "STRING": np.object_},
}


class TritonModelException(Exception):
    """What the utilities raise."""


class TritonError:
    """An error for one response."""

    def __init__(self, message: str, code: int = 1) -> None:
        if not isinstance(message, str):
            raise TypeError("incompatible constructor arguments: a TritonError is made of a text")
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    """A named array."""

    def __init__(self, name: str, numpy_array: np.ndarray) -> None:
        if not isinstance(name, str) or not isinstance(numpy_array, np.ndarray):
            raise TypeError("incompatible constructor arguments: a Tensor is made of a name and a NumPy array")
        if numpy_array.dtype.type not in TYPES.values():
            raise TritonModelException(f"NumPy dtype is not supported: {numpy_array.dtype}")
        if numpy_array.dtype == np.object_ and not all(isinstance(v, (bytes, str)) for v in numpy_array.flat):
            raise TritonModelException("Failed to convert Python object to bytes")
        self._name, self._array = name, np.ascontiguousarray(numpy_array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceRequest:
    """What Triton hands to `execute`."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = list(inputs)

    def inputs(self) -> list[Tensor]:
        return self._inputs


class InferenceResponse:
    """What `execute` gives back for a request."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        if not isinstance(output_tensors, list) or not all(isinstance(t, Tensor) for t in output_tensors):
            raise TypeError("incompatible constructor arguments: output_tensors is a list of Tensors")
        if error is not None and not isinstance(error, TritonError):
            raise TypeError("incompatible constructor arguments: error is a TritonError")
        self._outputs, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((t for t in request.inputs() if t.name() == name), None)


def as_module() -> types.ModuleType:
    """The module by the name under which Triton's stub offers it."""
    module = types.ModuleType("triton_python_backend_utils")
    for thing in (TritonModelException, TritonError, Tensor, InferenceRequest, InferenceResponse):
        setattr(module, thing.__name__, thing)
    module.get_input_tensor_by_name = get_input_tensor_by_name  # type: ignore[attr-defined]
    return module


class TritonServer:
    """Loads a model's file and runs batches as the server does: checks them by the configuration first."""

    def __init__(self, config: dict[str, Any], model: Any) -> None:
        self.config, self.model = config, model

    def infer(self, *requests: dict[str, np.ndarray]) -> list[InferenceResponse]:
        """One execution of so many requests, each a mapping of inputs [batch, ...]."""
        stated = {i["name"]: i for i in self.config["input"]}
        rows = 0
        for request in requests:
            missing = {n for n, i in stated.items() if not i.get("optional")} - request.keys()
            unknown = request.keys() - stated.keys()
            if missing or unknown:
                raise TritonModelException(f"inputs {missing} are missing, {unknown} are unexpected")
            for name, array in request.items():
                kind = TYPES[stated[name]["data_type"].removeprefix("TYPE_")]
                dims = [int(d) for d in stated[name]["dims"]]
                if array.dtype.type is not kind or list(array.shape[1:]) != dims:
                    raise TritonModelException(f"input {name} is {array.dtype} {array.shape}, expected [-1, *{dims}]")
            rows += len(next(iter(request.values())))
        if rows > self.config["max_batch_size"]:
            raise TritonModelException(f"batch of {rows} exceeds max_batch_size")
        responses = self.model.execute([InferenceRequest([Tensor(n, a) for n, a in r.items()]) for r in requests])
        if not isinstance(responses, list) or len(responses) != len(requests):
            raise TritonModelException(f"expected a list of {len(requests)} responses")
        outputs = {o["name"]: o for o in self.config["output"]}
        for response, request in zip(responses, requests, strict=True):
            for tensor in [] if response.has_error() else response.output_tensors():
                kind = TYPES[outputs[tensor.name()]["data_type"].removeprefix("TYPE_")]
                dims = [len(next(iter(request.values()))), *(int(d) for d in outputs[tensor.name()]["dims"])]
                if tensor.as_numpy().dtype.type is not kind or list(tensor.as_numpy().shape) != dims:
                    raise TritonModelException(f"output {tensor.name()} is {tensor.as_numpy().shape}, expected {dims}")
        return responses
