"""The same comparison by other hands: Polygraphy's runners run the engines, its `Comparator` compares them with torch.

Polygraphy's own engine loader is not used, because it allows host code in an engine: the runners here wrap engines that
were opened through the store. Needs the module `polygraphy`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import MissingError, MissingExtraError
from .gate import Evaluate, limit_for
from .reference import EXPORT_AGAIN, Case


def compare_with_polygraphy(
    subjects: Mapping[str, Evaluate], cases: Sequence[Case], *, component: str, dtype: str
) -> dict[str, bool]:
    """Whether each subject passes on every case, in Polygraphy's judgement; outputs are compared by relative L2 norm.

    Its `SimpleCompareFunc` and `L2CompareFunc` take absolute norms, so the limit of each case is scaled by the norm of
    torch's output. Images and flags are left to `gate`, whose limits for them are not norms. Raises `MissingError`
    without a case, `MissingExtraError` without Polygraphy.
    """
    polygraphy = _import_polygraphy()
    mine = [c for c in cases if c.component == component]
    if not mine:
        raise MissingError(f"the reference has no case of {component!r}", remedy=EXPORT_AGAIN)
    verdicts = dict.fromkeys(subjects, True)
    for case in mine:
        floats = [n for n, v in case.outputs.items() if np.issubdtype(v.dtype, np.floating)]
        if not floats:
            continue
        runners = [_runner("torch", _recorded(case), case, floats)]
        runners += [_runner(name, evaluate, case, floats) for name, evaluate in subjects.items()]
        results = polygraphy.Comparator.run(runners, data_loader=[dict(case.inputs)])
        limit = limit_for(dtype, case.torch_error)
        bounds = {n: limit * float(np.linalg.norm(case.outputs[n].astype(np.float64))) for n in floats}
        for index, name in enumerate(subjects, start=1):
            compared = polygraphy.Comparator.compare_accuracy(
                results, comparisons=[(0, index)], compare_func=polygraphy.L2CompareFunc(l2_threshold=bounds)
            )
            verdicts[name] = verdicts[name] and bool(compared)
    return verdicts


def _import_polygraphy() -> Any:
    try:
        from polygraphy import comparator
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingExtraError("polygraphy", "verify", purpose="the cross-check") from error
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    return comparator


def _recorded(case: Case) -> Evaluate:
    """Torch, as far as the reference holds it."""

    def evaluate(inputs: Mapping[str, Any], dims: Mapping[str, int]) -> Mapping[str, Any]:
        return case.outputs

    return evaluate


def _runner(name: str, evaluate: Evaluate, case: Case, outputs: Sequence[str]) -> Any:
    """A runner of Polygraphy's round a function of NumPy arrays."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Runner(BaseRunner):  # type: ignore[misc]
        def activate_impl(self) -> None:
            return None

        def deactivate_impl(self) -> None:
            return None

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for key, value in case.inputs.items():
                metadata.add(key, value.dtype, value.shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, Any]) -> Any:
            results = evaluate(feed_dict, case.dims)
            self.inference_time = 0.0
            return OrderedDict((n, results[n]) for n in outputs)

    return Runner(name=name)
