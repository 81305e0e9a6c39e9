"""`fewstep verify BUNDLE`: each graph and each engine of this machine against torch, and the picture they make."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

from ..errors import MissingError, MissingExtraError
from .common import BUNDLE_HELP, add_budget_option, emit, open_bundle, register_torch, say

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..engines.gate.gate import GateReport
    from .final_image import ImageVerdict


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help=BUNDLE_HELP)
    add_budget_option(parser)
    parser.add_argument("--component", action="append", help="only this component; repeatable")
    parser.add_argument("--bisect", action="store_true", help="name the first node that is wrong in what fails")
    parser.add_argument(
        "--no-image", action="store_true", help="do not make the same picture with torch and each backend"
    )
    parser.add_argument("--polygraphy", action="store_true", help="have Polygraphy's Comparator judge the graphs too")


def execute(options: argparse.Namespace) -> int:
    from ..engines import default_store
    from ..engines.gate.verify import verify_bundle

    for asked, module, extra in ((options.polygraphy, "polygraphy", "verify"), (options.bisect, "onnx", "export")):
        if asked and importlib.util.find_spec(module) is None:  # told before minutes of comparing, not after them
            raise MissingExtraError(module, extra, purpose=f"--{'polygraphy' if extra == 'verify' else 'bisect'}")
    bundle = open_bundle(options.bundle, options.budget)
    reports = verify_bundle(bundle, store=default_store(), components=options.component, check=False)
    data: dict[str, Any] = {
        "passed": all(r.passed for r in reports),
        "reports": [{"component": r.component, "subject": r.subject, **r.to_json()} for r in reports],
    }
    lines = [_line(r) for r in reports]
    if not options.no_image and not options.component:
        verdicts, why_not = _final_images(bundle)
        data["images"] = [v.to_json() for v in verdicts]
        data["passed"] = data["passed"] and all(v.passed for v in verdicts)
        lines += [_image_line(v) for v in verdicts]
        if why_not:
            data["images_not_compared"] = why_not
            say(f"the final image is not compared: {why_not}")
    if options.polygraphy:
        data["polygraphy"] = {n: _second_opinion(bundle, n) for n in options.component or bundle.components}
        data["passed"] = data["passed"] and all(data["polygraphy"].values())
        lines += [f"{n:15} Polygraphy: {'passed' if ok else 'FAILED'}" for n, ok in data["polygraphy"].items()]
    if options.bisect:
        data["culprits"] = {r.component: _culprit(bundle, r) for r in reports if not r.passed}
        lines += [f"{n:15} first wrong node: {c}" for n, c in data["culprits"].items()]
    emit(options, data, "\n".join(lines))
    return 0 if data["passed"] else 5


def _line(report: GateReport) -> str:
    worst = report.worst
    verdict = "passed" if report.passed else f"FAILED: {worst.reason}"
    errors = f"worst {worst.report.rel_l2:.2e} (limit {worst.limit:.2e})"
    return f"{report.component:15} {report.subject:45} {report.dtype:9} {errors}  {verdict}"


def _final_images(bundle: Bundle) -> tuple[list[ImageVerdict], str]:
    """The verdicts on the final image, and why there are none where torch or its reference is not installed."""
    from ..engines import default_store
    from ..engines.gate.verify import engines_here
    from .final_image import compare_final_images

    register_torch("torch")
    backends = sorted({e.key.backend for e in engines_here(bundle, "unet", default_store()) if not e.failed})
    say(f"making one picture with torch in float32, the exported graphs{''.join(f', {b}' for b in backends)}")
    try:
        return compare_final_images(bundle, backends), ""
    except MissingError as error:
        return [], str(error)


def _image_line(verdict: ImageVerdict) -> str:
    ending = "passed" if verdict.passed else f"FAILED: {verdict.reason}"
    limit = "for comparison" if verdict.limit == float("-inf") else f"limit {verdict.limit:.1f} dB"
    return f"{'final image':15} {verdict.subject:45} PSNR {verdict.psnr:.1f} dB ({limit})  {ending}"


def _second_opinion(bundle: Bundle, name: str) -> bool:
    """The exported graph on ONNX Runtime, judged by Polygraphy."""
    from ..engines.backends.ort import OrtEngine
    from ..engines.gate.cross_check import compare_with_polygraphy
    from ..engines.gate.gate import engine_function
    from ..engines.gate.verify import load_cases

    part = bundle.component(name)
    path = bundle.path(part.graph)
    engine = OrtEngine.from_onnx(path, inputs=part.inputs, outputs=part.outputs, optimization="disabled")
    subjects = {"the ONNX graph": engine_function(engine)}
    return all(compare_with_polygraphy(subjects, load_cases(bundle), component=name, dtype=part.dtype).values())


def _culprit(bundle: Bundle, report: GateReport) -> str:
    """The first wrong node of the engine of a component that failed, in words."""
    from ..engines.gate.bisect import bisect_engine
    from ..engines.gate.verify import load_cases

    cases = [c for c in load_cases(bundle) if c.component == report.component and c.index == report.worst.case]
    say(f"bisecting {report.component}")
    place = bisect_engine(bundle, report.component, cases[0])
    if place is None:
        return "none: every cut agrees with the unoptimised graph"
    return f"{place.node} ({place.operator}), error {place.rel_l2:.2e} after {place.before:.2e} before it"
