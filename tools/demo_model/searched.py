"""Pictures of the embedded base model under a found schedule, beside usual ones, and what the pixel checker sees.

python tools/demo_model/searched.py FOUND.json --steps 5 --sheet docs/schedules-5-steps.png --output accuracy.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import fewstep
import numpy as np
from checker import look
from evaluate import _right, share
from fewstep.commands.sheet import draw_sheet
from fewstep.export.embedded import embedded_bundle
from fewstep.runtime.pictures.images import save_png
from scenes import TEMPLATES, random_scene, triples

SHOWN = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--sheet", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    pipe = fewstep.load(embedded_bundle("base")[0], batch=8)
    n, many = options.steps, 100
    sampler = fewstep.load_schedules(options.found).sampler
    calls = {
        f"{n} steps, trailing": {"steps": n, "schedule": "trailing"},
        f"{n} steps, Karras": {"steps": n, "schedule": "karras"},
        f"{n} steps, AYS table": {"steps": n, "schedule": "ays_sd"},
        f"{n} steps, found": {"steps": n, "schedule": options.found},
        "20 steps, trailing": {"steps": 20, "schedule": "trailing"},
        f"{many} steps, Karras": {"steps": many, "schedule": "karras"},
    }
    rng = random.Random(4242)
    scenes = [random_scene(rng, triples(held_out=None)) for _ in range(options.prompts)]
    prompts = [s.caption(rng.choice(TEMPLATES)) for s in scenes]
    seeds = [50_000_000 + i for i in range(len(prompts))]
    pictures, right = {}, {}
    for name, call in calls.items():
        made = [
            pipe(prompts[i : i + 8], seed=seeds[i : i + 8], sampler=sampler, **call).images
            for i in range(0, len(prompts), 8)
        ]
        pictures[name] = np.concatenate(made)
        right[name] = share(
            [_right(look(p), s.background, s.colour, s.shape) for p, s in zip(pictures[name], scenes, strict=True)]
        )
    rows = [[pictures[name][i] for name in calls] for i in range(SHOWN)]
    sheet = draw_sheet(rows, list(calls), [""] * SHOWN, title=f"{sampler}, guidance {pipe.bundle.defaults.guidance:g}")
    save_png(options.sheet, np.asarray(sheet))
    report = {"sampler": sampler, "prompts": options.prompts, "shown": prompts[:SHOWN], "right": right}
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(right, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
