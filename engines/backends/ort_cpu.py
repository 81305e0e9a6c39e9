"""ONNX Runtime's own kernels on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import UnsupportedError
from ..base import Engine
from ..graph.accounting import FUSED_ON_CPU, Forms
from ..profile import profiles_for
from .ort import CPU, OrtEngine
from .ort_build import OrtBackend
from .registry import BuildJob, OpenJob, register

FUSING = ("extended", "all")


class OrtCpu(OrtBackend):
    """See the module; graphs are rewritten into fewer nodes first."""

    provider, rewriting = CPU, 4
    measured = splits_rows = True

    def check(self, job: BuildJob) -> None:
        refuse_float16(job)
        if job.component.dtype == "bfloat16":
            raise UnsupportedError(
                f"{job.name!r} is in bfloat16, for which ONNX Runtime has no kernels on the CPU",
                expected="float32 or float16",
                remedy="Name --backend torch, or export with --dtype fp32: ort-openvino-bf16 computes it in bfloat16.",
            )

    def rewrite(self, graph: bytes, job: BuildJob) -> tuple[bytes, dict[str, int]]:
        from ..graph.rewrite import rewrite_for_cpu

        return rewrite_for_cpu(graph, profiles_for(job.bundle)[job.name][0].optimum)

    def fusion(self, job: BuildJob) -> tuple[Forms, bool]:
        # the other precisions have no fused kernels
        return FUSED_ON_CPU, job.options.optimization in FUSING and job.component.dtype == "float32"

    def load(self, job: OpenJob, open_with: Callable[..., Any]) -> Engine:
        return OrtEngine(open_with(), inputs=job.component.inputs, outputs=job.component.outputs)


def refuse_float16(job: BuildJob) -> None:
    if job.options.float16:
        raise UnsupportedError(
            "half precision on the CPU, where it is slower", remedy="Leave it out, or name --backend ort-cuda."
        )


register(OrtCpu())
