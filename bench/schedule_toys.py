"""Schedules found by Align Your Steps' bound against usual ones, on data whose denoiser and density are known exactly.

    python bench/schedule_toys.py [--json FILE] [--plot FILE] [--samples N] [--data N] [--steps 5,8,10,15,20]

For each toy and sampler: KL(data || samples) over cells of exact probability, and the squared maximum mean discrepancy
(a Gaussian kernel of bandwidth 0.1), of samples from the same noise under every schedule. Searched are

- "bound": by the bound alone, at the sampler's order;
- "bound and judge": the same, stopped and chosen by the error of 256 results to the same sampler's in 320 steps, from
  the same noise (for the stochastic sampler: from the same path of noise). No divergence is seen by a search.

The usual ones lie in EDM's range, 80 to 0.002, and end at 0: EDM's (rho 7), uniform in sigma, uniform in the time of
the linear variance-preserving SDE, the cosine schedule, and uniform in ln(sigma). Since the bound ends at 0.01, one
level below the last that is evaluated, EDM's levels for that range, used the same way, stand beside them, as do the
closed form's for Gaussian data of the same variance. Where a schedule leaves cells empty, its KL is a matter of the
number of samples too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fewstep.bench.machine import describe
from fewstep.schedules.spacing import exponential, karras, kl_optimal
from fewstep.search.klub import find_klub, gaussian_optimum
from fewstep.search.problem import Knots
from fewstep.search.toys import (
    LOW,
    SIGMA_MAX,
    SIGMA_MIN,
    TOYS,
    Divergences,
    Mixture,
    make_samples,
    toy_judge,
    toy_problem,
)

SAMPLERS = {"dpmpp_1m_sde": 1, "euler": 1, "dpmpp_2m": 2}
TITLES = {"dpmpp_1m_sde": "Stochastic DDIM (dpmpp_1m_sde)", "euler": "Euler", "dpmpp_2m": "DPM++ 2M"}
CLAIMED = ("edm", "uniform", "time", "cosine")
"""Those that the paper compares with; the others are told beside them."""
BESIDE = ("log", "edm to the bound's end", "gaussian")
FOUND = ("bound", "bound and judge")
SEED, SAMPLE_SEED = 0, 7


def time_uniform(steps: int) -> np.ndarray:
    """Levels uniform in the time of Song et al.'s linear VP SDE (arXiv 2011.13456: beta from 0.1 to 20)."""
    low, rise = 0.1, 19.9
    ends = [(np.sqrt(low**2 + 2 * rise * np.log1p(s**2)) - low) / rise for s in (SIGMA_MAX, SIGMA_MIN)]
    u = np.linspace(*ends, steps)
    return np.asarray(np.sqrt(np.expm1(rise * u**2 / 2 + low * u)))


def knots(name: str, levels: Sequence[float] | np.ndarray) -> Knots:
    return Knots(name=name, sigmas=(*map(float, levels), 0.0))


def usual(steps: int) -> list[Knots]:
    """What a schedule is compared with, and started from."""
    return [
        knots("edm", karras(SIGMA_MIN, SIGMA_MAX, steps)),
        knots("uniform", np.linspace(SIGMA_MAX, SIGMA_MIN, steps)),
        knots("time", time_uniform(steps)),
        knots("cosine", kl_optimal(SIGMA_MIN, SIGMA_MAX, steps)),
        knots("log", exponential(SIGMA_MIN, SIGMA_MAX, steps)),
    ]


def beside(steps: int, c: float) -> list[Knots]:
    """The same end as the bound's."""
    return [
        knots(BESIDE[1], karras(LOW, SIGMA_MAX, steps + 1)[:-1]),
        knots(BESIDE[2], gaussian_optimum(SIGMA_MAX, LOW, c, steps + 1)[:-1]),
    ]


def search(toy: Mixture, sampler: str, counts: Sequence[int], count: int) -> tuple[dict[str, dict[int, Knots]], Any]:
    """By method and steps, and what it cost."""
    problem, judge = toy_problem(toy, sampler), toy_judge(toy, sampler)
    data = toy.sample(count, 1)
    asked: dict[str, Any] = {"order": SAMPLERS[sampler], "seed": SEED, "low": LOW}
    asked["start"] = min(usual(10), key=judge)
    found, costs = {}, {"start": asked["start"].name}
    for name, says in zip(FOUND, (None, judge), strict=True):
        before, began = toy.evaluations, time.perf_counter()
        found[name] = find_klub(problem, data, np.arange(count), counts, judge=says, **asked)
        costs[name] = {
            "rows_evaluated": toy.evaluations - before,
            "seconds": round(time.perf_counter() - began, 2),
        }
    return found, costs


def measure(toy: Mixture, sampler: str, counts: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """All cells of one toy and one sampler."""
    problem, divergences = toy_problem(toy, sampler), Divergences(mixture=toy)
    found, costs = search(toy, sampler, counts, options.data)
    c = float(np.sqrt(np.mean(np.var(toy.sample(options.data, 1), axis=0))))
    cells = []
    for steps in counts:
        rows = {}
        for k in (*usual(steps), *beside(steps, c), *(knots(n, found[n][steps].sigmas[:-1]) for n in FOUND)):
            made = make_samples(problem, toy, k, options.samples, SAMPLE_SEED)
            rows[k.name] = {"kl": round(divergences.kl(made), 5), "mmd2": round(divergences.mmd2(made), 8)}
            if k.name in FOUND:
                rows[k.name]["sigmas"] = " ".join(f"{s:.6g}" for s in k.sigmas)
        cells.append({"steps": steps, "schedules": rows} | {k: verdict(rows, k) for k in ("kl", "mmd2")})
    return {"toy": toy.name, "sampler": sampler, "cost": costs, "cells": cells}


def verdict(rows: dict[str, Any], figure: str) -> dict[str, Any]:
    """Of each search: the best usual schedule's figure over its own, and whom it does not beat."""
    summary = {}
    for name in FOUND:
        own = rows[name][figure]
        best = min(rows[k][figure] for k in CLAIMED)
        lost = [k for k in rows if k not in FOUND and rows[k][figure] <= own]
        summary[name] = {"best_usual_over_it": round(best / own, 2) if own > 0 else None, "does_not_beat": lost}
    return summary


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Cells that each search wins against all that are claimed, and the cells that it loses, by name."""
    summary: dict[str, Any] = {}
    cells = [(r["toy"], r["sampler"], cell) for r in results for cell in r["cells"]]
    for name in FOUND:
        for figure in ("kl", "mmd2"):
            lost: list[str] = []
            others = dict.fromkeys(BESIDE, 0)
            for toy, sampler, cell in cells:
                behind = cell[figure][name]["does_not_beat"]
                beaten_by = [k for k in behind if k in CLAIMED]
                lost += [f"{toy}, {sampler}, {cell['steps']}: {', '.join(beaten_by)}"] if beaten_by else []
                others = {k: n + (k in behind) for k, n in others.items()}
            summary[f"{name}, {figure}"] = {
                "cells": len(cells),
                "wins": len(cells) - len(lost),
                "loses": lost,
                "cells_not_better_than": others,
            }
    return summary


def print_table(results: list[dict[str, Any]]) -> None:
    names = list(results[0]["cells"][0]["schedules"])
    short = {BESIDE[1]: "edm to end", "bound and judge": "with judge"}
    print(
        "KL(data || samples) in nats, and below it MMD^2 in 1e-4; * where one of " + ", ".join(CLAIMED) + " is better"
    )
    for r in results:
        print(f"\n{r['toy']}, {r['sampler']} (started from {r['cost']['start']})")
        print(f"{'':>7}" + "".join(f"{short.get(n, n):>12}" for n in names))
        for cell in r["cells"]:
            for figure, factor in (("kl", 1.0), ("mmd2", 1e4)):
                words = []
                for n in names:
                    behind = cell[figure][n]["does_not_beat"] if n in FOUND else []
                    mark = "*" if set(behind) & set(CLAIMED) else ""
                    words.append(f"{factor * cell['schedules'][n][figure]:.4g}{mark}".rjust(12))
                print(f"{cell['steps'] if figure == 'kl' else '':>7}" + "".join(words))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """The data, the levels found against usual ones at 10 steps, and KL over steps for each sampler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    colours = {"edm": "C0", "time": "C1", "cosine": "C2", "log": "C4", "bound": "0.55", "bound and judge": "C3"}
    toys = list(dict.fromkeys(r["toy"] for r in results))
    figure, axes = pyplot.subplots(len(toys), 2 + len(SAMPLERS), figsize=(14.5, 2.9 * len(toys)), squeeze=False)
    for row, name in zip(axes, toys, strict=True):
        toy = TOYS[name]()
        row[0].hist2d(*toy.sample(200000, 5).T, bins=90, cmap="Greys", rasterized=True)
        row[0].set(xticks=[], yticks=[], ylabel=name, aspect="equal")
        mine = {r["sampler"]: r for r in results if r["toy"] == name}
        for k in usual(10):
            if k.name in ("edm", "cosine", "log"):
                row[1].plot(k.sigmas[:-1], marker=".", lw=0.9, color=colours[k.name], label=k.name)
        for (sampler, r), style in zip(mine.items(), ("-", "--", ":"), strict=True):
            cell = next(c for c in r["cells"] if c["steps"] == 10)
            sigmas = [float(s) for s in cell["schedules"]["bound and judge"]["sigmas"].split()[:-1]]
            row[1].plot(sigmas, style, marker=".", lw=1.2, color=colours["bound and judge"], label=f"found, {sampler}")
        row[1].set(yscale="log")
        row[1].grid(alpha=0.25)
        for axis, (_, r) in zip(row[2:], mine.items(), strict=True):
            for k, colour in colours.items():
                steps = [c["steps"] for c in r["cells"]]
                kl = [max(c["schedules"][k]["kl"], 1e-4) for c in r["cells"]]
                axis.plot(steps, kl, marker=".", lw=1.4 if k in FOUND else 0.9, color=colour, label=k)
            axis.set(yscale="log")
            axis.grid(alpha=0.25)
    axes[0, 0].set_title("the data", fontsize=9)
    axes[0, 1].set_title("levels of 10 steps", fontsize=9)
    for axis, title in zip(axes[0, 2:], TITLES.values(), strict=True):
        axis.set_title(f"KL over steps: {title}", fontsize=9)
    axes[0, 1].legend(fontsize=6.5, frameon=False)
    axes[0, 2].legend(fontsize=6.5, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=75)
    with Image.open(path) as drawn:
        few = drawn.convert("RGB").quantize(48)
    few.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--samples", type=int, default=200000)
    parser.add_argument("--data", type=int, default=256, help="points that are searched on")
    parser.add_argument("--steps", default="5,8,10,15,20")
    options = parser.parse_args()
    counts = [int(n) for n in options.steps.split(",")]
    machine = describe(1)
    results = [measure(make(), sampler, counts, options) for make in TOYS.values() for sampler in SAMPLERS]
    print_table(results)
    summary = summarise(results)
    print(json.dumps(summary, indent=1))
    if options.json:
        report = {
            "what": (__doc__ or "").split("\n")[0],
            "machine": machine,
            "samples": options.samples,
            "data": options.data,
            "summary": summary,
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
