"""How well the embedded model follows prompts: fresh prompts over several seeds, read by the pixel checker.

    python tools/demo_model/evaluate.py base --output export/demo/base/evaluation.json
    python tools/demo_model/evaluate.py student --steps 4 --output export/demo/student/evaluation.json

fewstep itself makes the pictures from the shipped checkpoint. One is right when background, colour and shape are.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import fewstep
import numpy as np
from checker import look
from fewstep.export.embedded import embedded_bundle
from scenes import SHAPES, TEMPLATES, random_scene, render, triples

PARTS = ("background", "colour", "shape")


def share(rows: list[dict[str, bool]]) -> dict[str, float]:
    """The share of images with each part right, and with all of them right."""
    found = {p: float(np.mean([r[p] for r in rows])) for p in PARTS}
    return {k: round(v, 4) for k, v in {**found, "all": float(np.mean([all(r.values()) for r in rows]))}.items()}


def checker_score(count: int) -> dict[str, float]:
    """The checker on scenes that were rendered, not generated."""
    scenes = [random_scene(random.Random(9000 + i), triples(held_out=None)) for i in range(count)]
    pixels = ((render(scenes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return share([_right(look(p), s.background, s.colour, s.shape) for p, s in zip(pixels, scenes, strict=True)])


def _right(seen: object, background: str, colour: str, shape: str) -> dict[str, bool]:
    wanted = {"background": background, "colour": colour, "shape": shape}
    return {p: getattr(seen, p) == wanted[p] for p in PARTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("base", "student"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    bundle, _ = embedded_bundle(options.model)
    pipe = fewstep.load(bundle)
    withheld = set(triples(held_out=True))
    rng = random.Random(31337)
    rows, by_shape, unseen = [], {s: [] for s in SHAPES}, []
    for number in range(options.prompts):
        scene = random_scene(rng, triples(held_out=None))
        prompt = scene.caption(rng.choice(TEMPLATES))
        seeds = [10_000 + options.seeds * number + k for k in range(options.seeds)]
        result = pipe(prompt, seed=seeds, steps=options.steps, guidance=options.guidance)
        for image in result.images:
            right = _right(look(image), scene.background, scene.colour, scene.shape)
            rows.append(right)
            by_shape[scene.shape].append(right)
            if (scene.colour, scene.shape, scene.background) in withheld:
                unseen.append(right)
    report = {
        "model": options.model,
        "prompts": options.prompts,
        "seeds_each": options.seeds,
        "steps": options.steps or bundle.defaults.steps,
        "guidance": bundle.defaults.guidance if options.guidance is None else options.guidance,
        "sampler": f"{bundle.defaults.sampler}, {bundle.defaults.schedule}",
        "right": share(rows),
        "right_by_shape": {s: share(r)["all"] for s, r in by_shape.items()},
        "right_on_withheld_triples": share(unseen) if unseen else None,
        "checker_on_rendered_scenes": checker_score(500),
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
