"""ONNX Runtime's own kernels on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import UnsupportedError
from ...weights.merged import mapped_weights
from ..base import Engine
from ..graph.accounting import FUSED_ON_CPU, Forms
from ..profile import profiles_for
from ..weights import check_weights
from .ort import CPU, OrtEngine
from .ort_build import OrtBackend
from .ort_swap import SwappableOrtEngine
from .registry import BuildJob, OpenJob, register

FUSING = ("extended", "all")


class OrtCpu(OrtBackend):
    """See the module; graphs are rewritten into fewer nodes first."""

    provider, rewriting = CPU, 5
    heeds = (*OrtBackend.heeds, "refittable")
    measured = splits_rows = True

    def check(self, job: BuildJob) -> None:
        refuse_float16(job)
        if job.component.dtype == "bfloat16":
            raise UnsupportedError(
                f"{job.name!r} is in bfloat16, for which ONNX Runtime has no kernels on the CPU",
                expected="float32 or float16",
                remedy="Name --backend torch, or export with --dtype fp32: ort-openvino-bf16 computes it in bfloat16.",
            )

        if job.options.refittable and job.component.dtype != "float32":
            raise UnsupportedError(
                f"{job.name!r} is in {job.component.dtype}, and is to be refittable",
                expected="float32",
                remedy="Export with --dtype fp32, or name --backend torch.",
            )

    def rewrite(self, graph: bytes, job: BuildJob) -> tuple[bytes, dict[str, int]]:
        from ..graph.rewrite import rewrite_for_cpu, rewrite_with_weights

        rewrite = rewrite_with_weights if job.options.refittable else rewrite_for_cpu
        return rewrite(graph, profiles_for(job.bundle)[job.name][0].optimum)

    def fusion(self, job: BuildJob) -> tuple[Forms, bool]:
        # the other precisions have no fused kernels
        return FUSED_ON_CPU, job.options.optimization in FUSING and job.component.dtype == "float32"

    def load(self, job: OpenJob, open_with: Callable[..., Any]) -> Engine:
        specs: dict[str, Any] = {"inputs": job.component.inputs, "outputs": job.component.outputs}
        if not job.entry.key.options.get("refittable"):
            return OrtEngine(open_with(), **specs)
        path = check_weights(job.bundle, job.component, job.store)
        return SwappableOrtEngine(
            open_with(), weights=mapped_weights(path), digest=job.component.weights_sha256, **specs
        )


def refuse_float16(job: BuildJob) -> None:
    if job.options.float16:
        raise UnsupportedError(
            "half precision on the CPU, where it is slower", remedy="Leave it out, or name --backend ort-cuda."
        )


register(OrtCpu())
