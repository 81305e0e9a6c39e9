"""What a user's process does with good input and with bad, printed: the pictures, and each refusal word for word.

Run by `test_optimised.py` under several flags of the interpreter, which must all print the same. Usage:
`optimised_run.py FOLDER CHECKPOINT`
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
from fewstep.bundle import read_bundle
from fewstep.cli import main
from fewstep.engines import Store
from fewstep.errors import FewstepError
from fewstep.export import export_bundle

CALL: dict[str, Any] = {"steps": 3, "seed": 7, "guidance": 2.0, "sampler": "dpmpp_2m"}
PICTURE = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
MORE = ({}, {"image": PICTURE, "strength": 0.7}, {"sampler": "euler_a"}, {"prompt": ["a", "b"], "seed": [1, 2]})
WEIGHTS = "diffusion_pytorch_model.safetensors"
BAD_CALLS: list[dict[str, Any]] = [
    {"steps": 0},
    {"steps": True},
    {"steps": 2.5},
    {"guidance": float("nan")},
    {"guidance": 1e9},
    {"seed": -1},
    {"seed": []},
    {"size": (33, 64)},
    {"size": 7},
    {"sampler": "eulr"},
    {"schedule": "none"},
    {"prompt": "\ud800"},
    {"prompt": 5},
    {"prompt": "x" * 30_000},
    {"negative": ["a", "b"]},
    {"image": PICTURE[:, :, :2]},
    {"image": PICTURE, "strength": 1.5},
    {"mask": PICTURE[:, :, 0]},
    {"timesteps": [5, 9]},
    {"sigmas": [float("inf")]},
    {"latents": np.full((1, 4, 32, 32), np.nan, np.float32)},
    {"prompt_embeds": np.zeros((1, 3, 3), np.float32)},
    {"images_per_prompt": 10**9},
    {"nonsense": 1},
]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def linked(folder: Path) -> None:
    (folder / "unet.onnx").rename(folder / "else")
    (folder / "unet.onnx").symlink_to("else")


BAD_BUNDLES: dict[str, Callable[[Path], object]] = {
    "weights changed": lambda f: flip(f / "unet.safetensors", -9),
    "graph changed": lambda f: flip(f / "vae_decoder.onnx", 100),
    "graph gone": lambda f: (f / "unet.onnx").unlink(),
    "graph a link": linked,
    "no JSON": lambda f: (f / "bundle.json").write_text("{"),
    "another format": lambda f: edit(f / "bundle.json", lambda d: d.update(format=9)),
    "a file upwards": lambda f: edit(f / "bundle.json", lambda d: d["components"]["unet"].update(graph="../x.onnx")),
    "no component": lambda f: edit(f / "bundle.json", lambda d: d["components"].pop("unet")),
    "no manifest": lambda f: (f / "bundle.json").unlink(),
}
BAD_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "a pickle": lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(
        f / "unet/diffusion_pytorch_model.bin"
    ),
    "cut weights": lambda f: flip(f / "vae/diffusion_pytorch_model.safetensors", 3),
    "a class of its own": lambda f: edit(f / "model_index.json", lambda d: d.update(unet=["os", "system"])),
    "no scheduler": lambda f: shutil.rmtree(f / "scheduler"),
}


def told(what: str, root: Path, attempt: Callable[[], object]) -> None:
    try:
        print(f"{what}: done, {attempt()}")
    except FewstepError as error:
        words = re.sub(r"\b[0-9a-f]{16}\b", "...", str(error).replace(str(root), ""))  # engines differ in a byte or two
        print(f"{what}: {type(error).__name__} {error.exit_code}: {words}")


def digest(result: Any) -> str:
    return hashlib.sha256(result.images.tobytes() + result.latents.tobytes()).hexdigest()


def run(root: Path, checkpoint: Path) -> None:
    bundle = export_bundle(checkpoint, root / "bundle", gate=False)
    store = Store(root / "cache" / "engines")
    pipe = fewstep.load(bundle, store=store, threads=1)
    for more in (
        {},
        {"image": PICTURE, "strength": 0.7},
        {"sampler": "euler_a"},
        {"prompt": ["a", "b"], "seed": [1, 2]},
    ):
        told(f"call {sorted(more)}", root, lambda m=more: digest(pipe(**{"prompt": "a (red:1.2) circle", **CALL, **m})))
    for more in BAD_CALLS:
        told(f"call {str(more)[:40]!r}", root, lambda m=more: digest(pipe(**{"prompt": "x", **CALL, **m})))
    for what, damage in BAD_BUNDLES.items():
        shutil.copytree(bundle.folder, root / "bad")
        damage(root / "bad")
        fresh = Store(root / "bad" / "cache" / "engines")  # with nothing built, so that every file is read
        told(what, root, lambda s=fresh: digest(fewstep.load(root / "bad", store=s, threads=1)("x", **CALL)))
        shutil.rmtree(root / "bad")
    for what, damage in BAD_CHECKPOINTS.items():
        shutil.copytree(checkpoint, root / "bad")
        damage(root / "bad")
        told(what, root, lambda: export_bundle(root / "bad", root / "none", gate=False))
        shutil.rmtree(root / "bad")
    (entry,) = store.entries("unet")
    flip(entry.path, 1000)
    told("an engine changed", root, lambda: fewstep.load(read_bundle(bundle.folder), store=store))
    store.root.chmod(0o755)
    told("a store that is open", root, lambda: Store(store.root))
    print("exit code", main(["run", str(root / "none"), "--prompt", "x"]))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
