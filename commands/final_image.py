"""The gate's last word: one picture, made by each backend's engines, against torch's in float32.

Components may each pass and their errors still add up over the steps; so a request is run whole. In float32 a picture
passes at 50 dB PSNR. In another precision torch itself is measured too, and a picture passes if its error is at most
1.5 times torch's own, as for the components: 3.5 dB below torch's PSNR, or 50 dB. Lowered components are judged by the
budget that they were found for, or by the farthest picture that it was judged by, if that is farther.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle import Bundle, read_bundle
from ..engines import RunOptions, Store
from ..engines.backends.ort import OrtEngine
from ..engines.backends.registry import registered_backend
from ..engines.gate.gate import FACTOR, IMAGE_PSNR_DB, compare
from ..errors import FewstepError
from ..precision import read_budget
from ..runtime import Pipeline

GRAPHS = "onnx-graphs"
"""A backend of its own: the exported graphs on ONNX Runtime's CPU, not optimised."""
PROMPT = "a small red lighthouse under a blue sky"
MOST_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageVerdict:
    """How near a backend's picture is to torch's in float32; `reason` is empty when it passed."""

    subject: str
    psnr: float
    limit: float
    reason: str

    @property
    def passed(self) -> bool:
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        psnr = self.psnr if math.isfinite(self.psnr) else None
        limit = self.limit if math.isfinite(self.limit) else None
        return {"subject": self.subject, "psnr_db": psnr, "limit_db": limit, "reason": self.reason}


def compare_final_images(
    bundle: Bundle, backends: Sequence[str], *, store: Store | None = None, size: tuple[int, int] | None = None
) -> list[ImageVerdict]:
    """A verdict on the exported graphs and on each backend, whose engines must be built.

    The request is the bundle's own (sampler, schedule, guidance), of at most 4 steps. Needs the torch backend to be
    registered (`import fewstep.export`): `MissingError` otherwise.
    """
    shared: dict[str, Any] = {"store": store, "size": size}
    plain = bundle if bundle.lowered is None else read_bundle(bundle.folder)
    exact = _picture(plain, "torch", engine_options={"torch_dtype": "float32"}, device="cpu:torch", **shared)
    limit = IMAGE_PSNR_DB
    verdicts = []
    if bundle.lowered is not None:
        limit = min(limit, read_budget(bundle.lowered.budget), bundle.lowered.worst)
    elif {p.dtype for p in bundle.components.values()} != {"float32"}:
        own = compare(_picture(bundle, "torch", device="cpu:torch", **shared), exact).psnr
        limit = min(limit, own - 20 * math.log10(FACTOR))
        verdicts.append(ImageVerdict(subject="torch in the bundle's precision", psnr=own, limit=-math.inf, reason=""))
    with registered_backend(GRAPHS, _open_graph):
        for backend in (GRAPHS, *backends):
            try:
                psnr = compare(_picture(bundle, backend, build="never", **shared), exact).psnr
                reason = "" if psnr >= limit else f"PSNR {psnr:.1f} dB, limit {limit:.1f} dB"
            except FewstepError as error:
                psnr, reason = -math.inf, str(error)
            verdicts.append(ImageVerdict(subject=backend, psnr=psnr, limit=limit, reason=reason))
    return verdicts


def _picture(bundle: Bundle, backend: str, **options: Any) -> Any:
    """uint8 [1, H, W, 3]."""
    pipeline = Pipeline(bundle, backend=backend, **options)
    return pipeline(PROMPT, seed=0, steps=min(bundle.defaults.steps, MOST_STEPS)).images


def _open_graph(bundle: Bundle, name: str, run: RunOptions) -> Any:
    part = bundle.component(name)
    return OrtEngine.from_onnx(
        bundle.path(part.graph), inputs=part.inputs, outputs=part.outputs, run=run, optimization="disabled"
    )
