"""The model that Triton's Python backend runs: requests of a batch that ask alike are one call."""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArgumentError, FewstepError
from ...values import parse_json
from ..bundles import bundle_of

if TYPE_CHECKING:
    from ...runtime.pipeline import Pipeline

SETTINGS = ("steps", "guidance", "sampler", "schedule")
"""What images of one call share; prompts, negative prompts and seeds are each image's own."""
Row = dict[str, Any]


class TritonPythonModel:
    """A bundle beside this model's file, loaded once an instance; Triton calls the three methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """args: Triton's, all texts: `model_config` as JSON, `model_repository` and `model_version`, the instance."""
        import triton_python_backend_utils as pb_utils

        from ...runtime import load

        self._utils = pb_utils
        config = parse_json(args["model_config"], "the model's configuration")
        stated = {k: v["string_value"] for k, v in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"] / stated["bundle"]
        width, _, height = stated["size"].partition("x")
        bundle = bundle_of(str(folder), stated["backend"])
        on_gpu = stated["backend"] != "auto" and args.get("model_instance_kind") == "GPU"
        self._pipeline: Pipeline = load(
            bundle,
            backend=stated["backend"],
            size=(int(width), int(height)),
            batch=int(config["max_batch_size"]),
            device=f"cuda:{args['model_instance_device_id']}" if on_gpu else None,
        )
        self._pipeline.warm_up(batch=1)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in their order; what is wrong with one is its own error."""
        outcomes: list[dict[int, tuple[Any, int, str]] | Exception] = []
        rows: list[list[Row]] = []
        for request in requests:
            try:
                rows.append(self._rows(request))
                outcomes.append({})
            except (FewstepError, UnicodeDecodeError) as error:
                rows.append([])
                outcomes.append(error)
        groups: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
        for r, ones in enumerate(rows):
            for i, row in enumerate(ones):
                groups[(*(row.get(k) for k in SETTINGS), "negative" in row)].append((r, i))
        for places in groups.values():
            self._make(rows, places, outcomes)
        return [self._response(outcome) for outcome in outcomes]

    def finalize(self) -> None:
        """Let go of the engines."""
        del self._pipeline

    def _rows(self, request: Any) -> list[Row]:
        """What each image of a request asks; a request has one or several, by its batch axis."""
        columns = {}
        for name in ("prompt", "negative", "seed", *SETTINGS):
            tensor = self._utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                columns[name] = [v.decode() if isinstance(v, bytes) else v.item() for v in _flat(tensor.as_numpy())]
        counts = {len(c) for c in columns.values()}
        if "prompt" not in columns or len(counts) != 1:
            raise ArgumentError("inputs of different lengths", expected="[batch, 1] each, the prompt among them")
        return [{k: c[i] for k, c in columns.items()} for i in range(counts.pop())]

    def _make(self, rows: list[list[Row]], places: list[tuple[int, int]], outcomes: list[Any]) -> None:
        """Make images that ask alike; where that fails and they are of several requests, each request's alone."""
        asked = [rows[r][i] for r, i in places]
        given = {k: v for k, v in asked[0].items() if k in SETTINGS}
        seeds = [row["seed"] if "seed" in row else secrets.randbits(32) for row in asked]
        negatives: dict[str, Any] = {"negative": [row["negative"] for row in asked]} if "negative" in asked[0] else {}
        try:
            result = self._pipeline([row["prompt"] for row in asked], seed=seeds, **negatives, **given)
        except FewstepError as error:
            concerned = sorted({r for r, _ in places})
            if len(concerned) == 1:
                outcomes[concerned[0]] = error
                return
            for one in concerned:
                self._make(rows, [p for p in places if p[0] == one], outcomes)
            return
        for (r, i), image, seed, p in zip(places, result.images, seeds, result.parameters, strict=True):
            if isinstance(outcomes[r], dict):
                outcomes[r][i] = (image, seed, json.dumps(dict(p)))

    def _response(self, outcome: dict[int, tuple[Any, int, str]] | Exception) -> Any:
        utils = self._utils
        if isinstance(outcome, Exception):
            return utils.InferenceResponse(output_tensors=[], error=utils.TritonError(str(outcome)))
        made = [outcome[i] for i in range(len(outcome))]
        images, seeds, parameters = zip(*made, strict=True)
        return utils.InferenceResponse(
            output_tensors=[
                utils.Tensor("image", np.ascontiguousarray(np.stack(images))),
                utils.Tensor("seed", np.array(seeds, np.uint64)[:, None]),
                utils.Tensor("parameters", np.array([p.encode() for p in parameters], np.object_)[:, None]),
            ]
        )


def _flat(values: np.ndarray) -> list[Any]:
    """[batch, 1] as a list of its entries."""
    if values.ndim != 2 or values.shape[1] != 1:
        raise ArgumentError(f"an input has shape {list(values.shape)}", expected="[batch, 1]")
    return list(values[:, 0])
