"""The numeric gate of an export: torch in a process of its own, then ONNX Runtime on the same inputs.

A bundle of full size is compared at fewer points, and in a process of its own too, so that the export's own memory
stays what its weights are streamed through. Whether the machine has the memory is asked first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ...bundle import Bundle, read_bundle, write_manifest
from ...engines.gate.reference import file_sha256
from ...engines.machine import available_memory
from ...errors import CorruptError, FewstepError, GateError, MissingExtraError, OutOfMemoryError
from ...places import refusal, write_error
from ..checkpoint.folder import Checkpoint

REFERENCE = "reference.safetensors"
SWITCHED_OFF = {"status": "not run: it was switched off"}
LARGE_BYTES = 400_000_000
"""Weights of one component from which a bundle counts as one of full size."""
_ACTIVATIONS = 1_500_000_000
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def run_gate(
    checkpoint: Checkpoint,
    bundle: Bundle,
    dtypes: Mapping[str, str],
    *,
    stage: Callable[[str], None],
    reference: Path | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Compare every component with torch in float32; the report for the manifest.

    reference: torch's outputs for this checkpoint, written before. Raises `GateError` for the worst output of the
    first component that disagrees, `MissingExtraError` without torch, `OutOfMemoryError` where the machine has less
    memory than the models take.
    """
    path = bundle.folder / REFERENCE
    large = max((bundle.folder / c.weights).stat().st_size for c in bundle.components.values()) > LARGE_BYTES
    if reference is not None:
        shutil.copyfile(reference, path)
    elif importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        raise MissingExtraError("torch", "export", purpose="The numeric gate of an export (--no-gate leaves it out)")
    else:
        if large:
            check_memory(needed_memory(bundle, fused=bool(checkpoint.loras)), available_memory())
        stage("reference")
        _run_reference(checkpoint, path, dtypes, quick=quick or large)
    stage("gate")
    report = _judge_apart(bundle) if large else judge(bundle)
    points = "few" if quick or large else "all"
    return report | {"reference": _reference_words(path), "reference_sha256": file_sha256(path), "points": points}


def needed_memory(bundle: Bundle, *, fused: bool = False) -> int:
    """Bytes that the largest step of a gate takes: a model in float32 beside itself in the precision of its engine.

    Pictures take the UNet and the VAE at once, on both sides. With LoRAs the reference holds the UNet and the encoders
    at once.
    """
    counts = {}
    for name, component in bundle.components.items():
        size = (bundle.folder / component.weights).stat().st_size
        counts[name] = (size // _SIZES[component.dtype], component.dtype)
    single = max(n * (4 + (_SIZES[d] if d != "float32" else 0)) for n, d in counts.values())
    together = sum(4 * n for k, (n, _) in counts.items() if not k.startswith("vae")) if fused else 0
    encoders = set(bundle.text_encoders)
    pictures = sum(4 * n for k, (n, _) in counts.items() if k not in encoders)
    engines = {k: 2 * n * _SIZES[d] for k, (n, d) in counts.items()}
    whole = sum(size for k, size in engines.items() if k not in encoders)
    return max(single, together, pictures, whole, *engines.values()) + _ACTIVATIONS


def check_memory(needed: int, available: int | None) -> None:
    if available is not None and needed > available:
        raise OutOfMemoryError(
            f"the gate of this bundle takes about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB "
            "are free",
            expected=f"{math.ceil(needed / 1e9)} GB",
            remedy="Free some, export on a larger machine, or leave the gate out with --no-gate.",
        )


def _reference_words(path: Path) -> str:
    with safe_open(path, framework="np") as file:
        lora = (file.metadata() or {}).get("lora", "none")
    return "torch float32" if lora == "none" else f"torch float32, LoRAs {lora}"


def judge(bundle: Bundle, only: Collection[str] | None = None) -> dict[str, Any]:
    """Run the bundle's graphs on its reference, and whole requests; `GateError` for the first that disagrees.

    only: these components alone, and no requests.
    """
    from ...engines.gate.gate import failure
    from ...engines.gate.reference import read_reference
    from ...engines.gate.verify import verify_graph
    from .requests import judge_pictures

    components: dict[str, Any] = {}
    for name, component in bundle.components.items():
        if only is not None and name not in only:
            continue
        if component.dtype == "bfloat16":
            components[name] = {"status": "not run: ONNX Runtime's CPU provider has no bfloat16 kernels"}
            continue
        report = verify_graph(bundle, name, read_reference(bundle.folder / REFERENCE, name))
        if not report.passed:
            raise failure(report)
        worst = report.worst
        components[name] = {
            "status": "passed",
            "cases": len({r.case for r in report.rows}),
            "worst_relative_l2": worst.report.rel_l2,
            "limit": worst.limit,
            "worst_output": f"{worst.case}/{worst.tensor}",
        }
    if only is None:
        pictures = judge_pictures(bundle, bundle.folder / REFERENCE)
    else:
        pictures = {"status": "not run: some components alone were looked at"}
    ran = all(c["status"] == "passed" for c in (*components.values(), *_verdicts(pictures)))
    return {
        "status": "passed" if ran else "passed in part",
        "runner": "onnxruntime, CPU",
        "components": components,
        "pictures": pictures,
    }


def _verdicts(pictures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """By task, or the one that says why there are none."""
    return [pictures] if "status" in pictures else list(pictures.values())


def _judge_apart(bundle: Bundle) -> dict[str, Any]:
    """`judge` in a process of its own, which ends with all the memory it took."""
    write_manifest(bundle)
    done = subprocess.run(  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
        [sys.executable, "-m", __name__, str(bundle.folder)], capture_output=True, text=True, check=False
    )
    try:
        verdict = json.loads(done.stdout)
    except ValueError as error:
        raise GateError(
            f"the gate ended without a verdict (exit code {done.returncode}): {done.stderr.strip()[-800:]}",
            remedy="Run it on a machine with more memory, or leave it out with --no-gate.",
        ) from error
    if "found" in verdict:
        raise GateError(verdict["found"], expected=verdict["expected"], remedy=verdict["remedy"])
    return dict(verdict)


def _run_reference(checkpoint: Checkpoint, path: Path, dtypes: Mapping[str, str], *, quick: bool) -> None:
    command = [
        sys.executable,
        "-m",
        f"{__package__}.reference",
        str(checkpoint.path),
        str(path),
        "--dtypes",
        json.dumps(dict(dtypes)),
        "--options",
        json.dumps(dict(checkpoint.options)),
    ]
    if quick:
        command.append("--quick")
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
    if (number := refusal(done.stderr)) is not None and done.returncode:
        raise write_error(number, "torch's reference", path.parent)
    if done.returncode or not path.is_file():
        raise GateError(
            f"torch could not compute the reference (exit code {done.returncode}): {done.stderr.strip()[-800:]}",
            remedy="Leave the gate out with --no-gate, or run on a machine with more memory.",
        )


def main(argv: list[str] | None = None) -> int:
    """Judge a bundle folder; the report, or what was found wrong, as JSON on stdout."""
    parser = argparse.ArgumentParser(prog="fewstep.export.gate.gating")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    try:
        print(json.dumps(judge(read_bundle(options.folder))))
    except (GateError, CorruptError) as error:
        print(json.dumps(_words(error)))
        return error.exit_code
    return 0


def _words(error: FewstepError) -> dict[str, str]:
    return {"found": error.found, "expected": error.expected, "remedy": error.remedy}


if __name__ == "__main__":
    sys.exit(main())
