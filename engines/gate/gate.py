"""The numeric gate: an engine's outputs against torch's in float32, with a limit that torch itself sets.

Against float32, an engine in some precision may err at most 1.5 times as much as torch errs in the same precision, in
relative L2 norm: ||y - y_ref|| / ||y_ref||. In float32 torch's own error says little about other orders of summation,
so there is a floor of 1e-4. It lies five times below the unit roundoff of TF32 and float16 (2^-11 = 4.9e-4), so that an
engine which computes in one of these cannot pass for float32; and it is 80 dB below the signal, against 50 dB asked of
the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArgumentError, GateError, MissingError
from ..base import Engine
from .reference import EXPORT_AGAIN, Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

FACTOR = 1.5
FLOAT32_FLOOR = 1e-4
IMAGE_PSNR_DB = 50.0
IMAGE_MAX_ABS = 2.0

Evaluate = Callable[[Mapping[str, "NDArray[Any]"], Mapping[str, int]], Mapping[str, "NDArray[Any]"]]
"""Inputs and dimensions to outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How far an array is from the expected one: largest absolute and relative L2 error, PSNR in dB, and finiteness."""

    max_abs: float
    rel_l2: float
    psnr: float
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict on one output of one case; `reason` is empty when it passed."""

    component: str
    case: int
    tensor: str
    report: Report
    limit: float
    reason: str

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """The verdict on one engine."""

    component: str
    subject: str
    dtype: str
    rows: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def worst(self) -> Verdict:
        return max(self.rows, key=lambda r: (not r.passed, not r.report.finite, r.report.rel_l2 / max(r.limit, 1e-30)))

    def to_json(self) -> dict[str, Any]:
        """For the engine's manifest: the verdict, the worst row, and every error."""
        return {
            "passed": self.passed,
            "reason": "" if self.passed else self.worst.reason,
            "dtype": self.dtype,
            "cases": [
                {
                    "case": f"{r.component}/{r.case}/{r.tensor}",
                    "rel_l2": _number(r.report.rel_l2),
                    "max_abs": _number(r.report.max_abs),
                    "psnr_db": _number(r.report.psnr),
                    "limit": r.limit,
                    "passed": r.passed,
                }
                for r in self.rows
            ],
        }


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def compare(output: NDArray[Any], expected: NDArray[Any]) -> Report:
    """Measure one array against another, in float64. PSNR's peak is 255 for uint8, else the largest magnitude."""
    if output.shape != expected.shape:
        raise GateError(f"an output has the shape {output.shape}", expected=f"{expected.shape}, as torch's")
    one, other = output.astype(np.float64), expected.astype(np.float64)
    finite = bool(np.isfinite(one).all())
    if not finite:
        return Report(max_abs=math.inf, rel_l2=math.inf, psnr=-math.inf, finite=False)
    error = one - other
    scale, distance = float(np.linalg.norm(other)), float(np.linalg.norm(error))
    relative = distance / scale if scale else (math.inf if distance else 0.0)
    mean_square = float(np.mean(error**2)) if error.size else 0.0
    peak = 255.0 if expected.dtype == np.uint8 else float(np.abs(other).max(initial=0.0))
    if not mean_square:
        psnr = math.inf
    else:
        psnr = 10 * math.log10(peak**2 / mean_square) if peak else -math.inf
    return Report(max_abs=float(np.abs(error).max(initial=0.0)), rel_l2=relative, psnr=psnr, finite=True)


def limit_for(dtype: str, torch_error: Mapping[str, float]) -> float:
    """The largest relative L2 error that passes; `MissingError` when torch's own error in this dtype is not known."""
    own = torch_error.get(dtype)
    if dtype == "float32":
        return max(FACTOR * (own or 0.0), FLOAT32_FLOOR)
    if own is None:
        raise MissingError(
            f"the reference does not say how far torch errs in {dtype}",
            expected=f"an error for {dtype}; it has {', '.join(torch_error) or 'none'}",
            remedy=f"{EXPORT_AGAIN} --dtype {dtype}",
        )
    return max(FACTOR * own, FLOAT32_FLOOR)


def worst_error(evaluate: Evaluate, cases: Iterable[Case]) -> float:
    """The largest relative L2 error of any output of these cases, flags apart."""
    errors = [0.0]
    for case in cases:
        outputs = evaluate(case.inputs, case.dims)
        errors += [compare(outputs[n], e).rel_l2 for n, e in case.outputs.items() if e.dtype != np.bool_]
    return max(errors)


def judge(case: Case, tensor: str, output: NDArray[Any], dtype: str) -> Verdict:
    """Compare one output with torch's and say, in words, what is wrong with it.

    Images pass at 50 dB (in float32 no pixel may be off by more than 2 levels), or at torch's own error times 1.5.
    """
    expected = case.outputs[tensor]
    limit = limit_for(dtype, case.torch_error)
    report = compare(output, expected)
    reason = ""
    if not report.finite:
        reason = "it holds NaN or infinity"
    elif expected.dtype == np.bool_:
        reason = "" if np.array_equal(output, expected) else "a flag differs"
    elif expected.dtype == np.uint8:
        if report.psnr < IMAGE_PSNR_DB and not (dtype != "float32" and report.rel_l2 <= limit):
            reason = f"PSNR {report.psnr:.1f} dB, limit {IMAGE_PSNR_DB:.0f} dB"
        elif dtype == "float32" and report.max_abs > IMAGE_MAX_ABS:
            reason = f"a pixel is off by {report.max_abs:.0f} levels, limit {IMAGE_MAX_ABS:.0f}"
    elif report.rel_l2 > limit:
        reason = f"relative error {report.rel_l2:.2e}, limit {limit:.2e}"
    return Verdict(component=case.component, case=case.index, tensor=tensor, report=report, limit=limit, reason=reason)


def gate_engine(
    subject: Engine | Evaluate, cases: Iterable[Case], *, component: str, dtype: str, name: str = "", check: bool = True
) -> GateReport:
    """Run an engine, or any function of inputs and dimensions, on all cases of a component.

    With `check` a failure raises `GateError`, whose `report` holds the whole verdict. No case at all is an error too.
    """
    evaluate = engine_function(subject) if isinstance(subject, Engine) else subject
    label = name or (subject.backend if isinstance(subject, Engine) else getattr(subject, "__name__", "function"))
    rows = []
    for case in cases:
        if case.component != component:
            continue
        outputs = evaluate(case.inputs, case.dims)
        missing = case.outputs.keys() - outputs.keys()
        if missing:
            raise GateError(f"{label} has no output {', '.join(sorted(missing))}", expected="all of torch's outputs")
        rows += [judge(case, tensor, outputs[tensor], dtype) for tensor in case.outputs]
    if not rows:
        raise MissingError(f"the reference has no case of {component!r}", remedy=EXPORT_AGAIN)
    report = GateReport(component=component, subject=label, dtype=dtype, rows=tuple(rows))
    if check and not report.passed:
        raise failure(report)
    return report


def failure(report: GateReport) -> GateError:
    """The error for a report that did not pass."""
    worst = report.worst
    return GateError(
        f"{report.subject} of {report.component!r} disagrees with torch: "
        f"case {worst.case}, output {worst.tensor!r}: {worst.reason}",
        expected=f"at most {FACTOR} times torch's own error in {report.dtype}",
        remedy="Keep more of the model in float32, or find the node with: fewstep verify BUNDLE --bisect",
    )


def engine_function(engine: Engine) -> Evaluate:
    """An engine as a function of NumPy arrays; buffers on a GPU are copied there and back."""

    def evaluate(inputs: Mapping[str, NDArray[Any]], dims: Mapping[str, int]) -> Mapping[str, NDArray[Any]]:
        binding = engine.bind(dims)
        if inputs.keys() != binding.inputs.keys():
            raise ArgumentError(
                f"the case has the inputs {', '.join(sorted(inputs))}", expected=", ".join(binding.inputs)
            )
        if engine.device == "cpu":
            for name, value in inputs.items():
                binding.inputs[name][...] = value
            binding.enqueue()
            return {n: np.array(v) for n, v in binding.outputs.items()}
        import torch

        for name, value in inputs.items():
            binding.inputs[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
        binding.enqueue()
        torch.cuda.current_stream(next(iter(binding.outputs.values())).device).synchronize()
        return {n: v.cpu().numpy() for n, v in binding.outputs.items()}

    return evaluate
