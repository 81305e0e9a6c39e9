"""A stranger's first minutes with fewstep, done for real, step after step, with what each of them showed.

    python tools/first_minutes.py [--folder FOLDER]

The demonstration, an own prompt, Python, a server with its pages and OpenAI's client, a grid, what a picture tells, and
an own checkpoint's folder. Ends with an error at the first step that does not do what its line says.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle on a blue background"
MOST_SECONDS = 300.0


def say(text: str) -> None:
    print(text, flush=True)


def fewstep(*words: str, within: Path) -> str:
    """Run the command line in a folder; what it printed."""
    say(f"$ fewstep {' '.join(words)}")
    began = time.perf_counter()
    command = [sys.executable, "-m", "fewstep", *words]
    done = subprocess.run(command, cwd=within, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
    if done.returncode:
        raise SystemExit(f"it ended with code {done.returncode}:\n{done.stdout}{done.stderr}")
    lines = [*done.stdout.strip().splitlines(), *done.stderr.strip().splitlines()[-1:]]
    say("\n".join(f"  {line[:160]}" for line in lines[:12]))
    say(f"  ({time.perf_counter() - began:.1f} s)")
    return done.stdout


def seen(picture: Image.Image) -> str:
    """A picture of the embedded models in words: its size, and the colours of its middle and its corner."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    height, width, _ = pixels.shape
    middle = pixels[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4].mean((0, 1))
    corner = pixels[:4, :4].mean((0, 1))
    return f"{width}x{height}, the middle {_colour(middle)}, the corner {_colour(corner)}"


def _colour(rgb: np.ndarray) -> str:
    names = ("red", "green", "blue")
    return names[int(rgb.argmax())] if rgb.max() > 1.4 * np.sort(rgb)[1] else "of no single colour"


def look(place: Path | io.BytesIO, *, at: str) -> None:
    """Say what a picture shows; it is of a red circle on blue."""
    with Image.open(place) as picture:
        words = seen(picture)
    say(f"  {at}: {words}")
    if "the middle red, the corner blue" not in words:
        raise SystemExit(f"{at} does not show {PROMPT}")


@contextmanager
def serving(within: Path) -> Iterator[str]:
    """A server of the embedded student on a free port: its address, once it says that it is ready."""
    say("$ fewstep serve student --port 0")
    command = [sys.executable, "-m", "fewstep", "serve", "student", "--port", "0"]
    with subprocess.Popen(command, cwd=within, stderr=subprocess.PIPE, text=True) as server:  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
        try:
            address = ""
            for line in server.stderr or ():
                say(f"  {line.strip()[:160]}")
                found = re.search(r"http://127\.0\.0\.1:\d+", line)
                address = found[0] if found else address
                if re.search(r"\bready\b", line) and address:
                    break
            else:
                raise SystemExit("the server ended before it was ready")
            yield address
        finally:
            server.terminate()
            server.communicate(timeout=60)


def served(address: str) -> None:
    for page in ("/", "/docs", "/live"):
        with urllib.request.urlopen(address + page, timeout=30) as answer:  # noqa: S310 an address of this machine
            title = re.search(r"<title>(.*?)</title>", answer.read().decode())
        say(f"  {page}: {answer.status}, {title[1] if title else 'no title'}")
        if title is None:
            raise SystemExit(f"{page} is no page")
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    models = [m.id for m in client.models.list().data]
    say(f"  OpenAI's client sees the models {', '.join(models)}")
    answer = client.images.generate(model=models[0], prompt=PROMPT, response_format="b64_json")
    if not answer.data or not answer.data[0].b64_json:
        raise SystemExit("the answer holds no picture")
    look(io.BytesIO(base64.b64decode(answer.data[0].b64_json)), at="its picture")


def main(folder: Path) -> None:
    say("# the demonstration")
    fewstep("demo", "--output", "demo.png", within=folder)
    look(folder / "demo.png", at="demo.png")
    say("# an own prompt, and what the picture tells")
    fewstep("run", "student", "--prompt", PROMPT, "--seed", "3", "--output", "own.png", within=folder)
    look(folder / "own.png", at="own.png")
    if PROMPT not in fewstep("inspect", "own.png", within=folder):
        raise SystemExit("the picture does not tell its prompt")
    say("# Python")
    lines = f'import fewstep; fewstep.load("student")("{PROMPT}", seed=3).save("python.png")'
    say(f"$ python -c '{lines}'")
    subprocess.run([sys.executable, "-c", lines], cwd=folder, check=True, timeout=MOST_SECONDS)  # noqa: S603 this interpreter, or a program of this project, with a list of arguments and no shell
    look(folder / "python.png", at="python.png")
    say("# a grid")
    axes = ["--prompt", PROMPT, "--columns", "steps=1,4", "--rows", "seed=3,4"]
    fewstep("grid", "student", *axes, "--output", "grid.png", within=folder)
    with Image.open(folder / "grid.png") as sheet:
        say(f"  grid.png: {sheet.width}x{sheet.height}")
    say("# a server, its pages and OpenAI's client")
    with serving(folder) as address:
        served(address)
    say("# an own checkpoint's folder")
    shutil.copytree(ROOT / "export" / "demo" / "student", folder / "checkpoint")
    fewstep("export", "checkpoint", "bundle", "--quick-gate", within=folder)
    fewstep("run", "bundle", "--prompt", PROMPT, "--seed", "3", "--output", "exported.png", within=folder)
    look(folder / "exported.png", at="exported.png")
    say("all of it did what it says")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where pictures are kept (default: nowhere)")
    given = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as own:
        if given is not None:
            given.mkdir(parents=True, exist_ok=True)
        main((given or Path(own)).resolve())
