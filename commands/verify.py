"""`fewstep verify BUNDLE`: each graph and each engine of this machine against torch's stored reference."""

from __future__ import annotations

import argparse

from .common import emit


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a bundle folder")
    parser.add_argument("--component", action="append", help="only this component; repeatable")


def execute(options: argparse.Namespace) -> int:
    from ..bundle import read_bundle
    from ..engines import default_store
    from ..engines.verify import verify_bundle

    reports = verify_bundle(
        read_bundle(options.bundle), store=default_store(), components=options.component, check=False
    )
    lines = []
    for r in reports:
        worst = r.worst
        verdict = "passed" if r.passed else f"FAILED: {worst.reason}"
        errors = f"worst {worst.report.rel_l2:.2e} (limit {worst.limit:.2e})"
        lines.append(f"{r.component:15} {r.subject:45} {r.dtype:9} {errors}  {verdict}")
    data = {
        "passed": all(r.passed for r in reports),
        "reports": [{"component": r.component, "subject": r.subject, **r.to_json()} for r in reports],
    }
    emit(options, data, "\n".join(lines))
    return 0 if data["passed"] else 5
