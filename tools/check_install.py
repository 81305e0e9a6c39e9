"""Install fewstep as a wheel and as an editable checkout, each in a new virtual environment, and use both.

The wheel must hold the package `fewstep` and nothing beside it; `fewstep demo` must make a picture from it, without
torch; `import fewstep` must load none of the heavy libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "onnx", "transformers")


def run(*command: str | Path, cwd: Path, cache: Path) -> str:
    environment = {**os.environ, "FEWSTEP_CACHE_DIR": str(cache)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check(kind: str, target: str, folder: Path) -> None:
    place = folder / kind
    venv.create(place, with_pip=True)
    python, cache = place / "bin" / "python", folder / f"{kind}-cache"
    pip = (
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        ROOT / "constraints.txt",
    )
    options = ("--editable",) if kind == "editable" else ()
    run(*pip, *options, target, cwd=folder, cache=cache)
    loaded = f"import sys, fewstep; bad = [m for m in {HEAVY!r} if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    run(python, "-c", loaded, cwd=folder, cache=cache)
    made = json.loads(
        run(place / "bin" / "fewstep", "demo", "--json", "--output", f"{kind}.png", cwd=folder, cache=cache)
    )
    if not (folder / made["file"]).is_file():
        raise SystemExit(f"{kind}: the demo made no picture")
    print(f"{kind}: installed, imports lean, demo made {made['file']}")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            folder,
            str(ROOT),
            cwd=folder,
            cache=folder,
        )
        wheel = next(folder.glob("fewstep-*.whl"))
        tops = {n.split("/")[0] for n in zipfile.ZipFile(wheel).namelist()}
        if any(t != "fewstep" and not t.endswith(".dist-info") for t in tops):
            raise SystemExit(f"the wheel holds more than the package: {sorted(tops)}")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, top level {sorted(tops)}")
        check("wheel", f"{wheel}[cpu]", folder)
        check("editable", f"{ROOT}[cpu]", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
