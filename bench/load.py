"""Open-loop load: Poisson arrivals of mixed requests, on continuous batching and on three ways to do without it.

    python bench/load.py [--seconds N] [--rates F,F,...] [--json FILE] [--plot FILE]

Requests mix samplers, 1 to 30 steps, guidance and sizes. Arrivals do not wait for answers. A request counts towards
goodput when it ends within three times its time alone: the median, on an idle machine, of a pipeline's own call, with
as many threads as make it fastest; for diffusers its own call. Rates are multiples of what one request at a time
sustains. At each rate all subjects get the same arrivals, one subject after the other. What has not ended two seconds
after the last arrival is given up and counts as late.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
from fewstep.bench.load_subjects import (
    OUTSTANDING,
    STATIC_BATCH,
    Ask,
    Continuous,
    Queued,
    Subject,
    diffusers_maker,
    pipeline_maker,
)

SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "unipc")
STEPS = ((1, 0.2), (2, 0.2), (4, 0.3), (8, 0.15), (15, 0.1), (30, 0.05))
GUIDED = 0.2
SIZES = (((64, 64), 0.8), ((96, 96), 0.2))
STRETCH = 3.0
GRACE_S = 2.0


def draw(rng: random.Random, number: int) -> Ask:
    """One request of the mix."""
    steps = rng.choices([s for s, _ in STEPS], [w for _, w in STEPS])[0]
    return Ask(
        prompt=f"a {rng.choice(['red', 'green', 'blue'])} {rng.choice(['circle', 'ring', 'star'])}",
        seed=number,
        steps=steps,
        sampler=rng.choice(SAMPLERS),
        guidance=2.0 if rng.random() < GUIDED else 1.0,
        size=rng.choices([s for s, _ in SIZES], [w for _, w in SIZES])[0],
    )


class Alone:
    """Seconds a request takes with nobody else there, measured once for each (steps, guidance, size)."""

    def __init__(self, make: Callable[[list[Ask]], None]) -> None:
        self._cost: dict[tuple[float, tuple[int, int]], tuple[float, float]] = {}
        for guidance in (1.0, 2.0):
            for size, _ in SIZES:
                few, many = (self._time(make, steps, guidance, size) for steps in (1, 9))
                self._cost[guidance, size] = few, (many - few) / 8

    def __call__(self, ask: Ask) -> float:
        first, each = self._cost[ask.guidance, ask.size]
        return first + (ask.steps - 1) * each

    @staticmethod
    def _time(make: Callable[[list[Ask]], None], steps: int, guidance: float, size: tuple[int, int]) -> float:
        ask = Ask(prompt="a red circle", seed=0, steps=steps, sampler="euler", guidance=guidance, size=size)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            make([ask])
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def mean(self) -> float:
        rng = random.Random(0)
        return statistics.mean(self(draw(rng, i)) for i in range(4000))

    def to_json(self) -> dict[str, Any]:
        return {
            f"guidance {g:g}, {w}x{h}": {"first_step_ms": round(1e3 * a, 2), "further_step_ms": round(1e3 * b, 2)}
            for (g, (w, h)), (a, b) in self._cost.items()
        }


def load(subject: Subject, rate: float, seconds: float, alone: Alone) -> dict[str, Any]:
    """Put one rate of arrivals on a subject and count."""
    rng, lock = random.Random(7), threading.Lock()
    ended: list[tuple[Ask, float]] = []
    before, refused, sent, at = subject.figures(), 0, 0, 0.0
    began = time.perf_counter()
    while (at := at + rng.expovariate(rate)) < seconds:
        ask = draw(rng, sent)
        time.sleep(max(0.0, began + at - time.perf_counter()))
        arrival = began + at  # lateness of this loop is the subject's: it holds the interpreter

        def done(ok: bool, ask: Ask = ask, arrival: float = arrival) -> None:
            if ok:
                with lock:
                    ended.append((ask, time.perf_counter() - arrival))

        refused += not subject.submit(ask, done)
        sent += 1
    deadline = began + seconds + GRACE_S
    while len(ended) + refused < sent and time.perf_counter() < deadline:
        time.sleep(0.01)
    with lock:
        finished = list(ended)
    subject.forget()
    after, length = subject.figures(), max(time.perf_counter() - began, seconds)
    good = sum(took <= STRETCH * alone(ask) for ask, took in finished)
    stretches = [took / alone(ask) for ask, took in finished]
    return {
        "subject": subject.name,
        "rate_per_s": round(rate, 2),
        "sent": sent,
        "refused": refused,
        "finished": len(finished),
        "good": good,
        "goodput_per_s": round(good / seconds, 2),
        "latency_ms": percentiles([1e3 * t for _, t in finished]),
        "stretch": percentiles(stretches),
        "figures": {k: round(after[k] - before[k], 2) for k in after},
        "busy_share": round((after["busy_s"] - before["busy_s"]) / length, 3),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 90, 99)}


def behind_a_long_one(subject: Continuous, repeats: int) -> list[dict[str, Any]]:
    """Short requests alone, and sent while one of 30 steps runs; a tick is the median one while both do."""
    rows = []
    server = subject.server
    for steps in (1, 2, 4):
        for guidance in (1.0, 2.0):
            alone, behind, ticks = [], [], []
            for i in range(repeats):
                alone.append(_seconds(server, steps, i))
                long = server.submit("a ring", steps=30, guidance=guidance, sampler="dpmpp_2m", seed=i)
                time.sleep(0.02 + 0.002 * (i % 7))
                before = server.stats()
                behind.append(_seconds(server, steps, i))
                after = server.stats()
                ticks.append((after.tick_s - before.tick_s) / max(1, after.ticks - before.ticks))
                long.result(60)
            a, b, tick = (statistics.median(v) for v in (alone, behind, ticks))
            rows.append(
                {
                    "steps": steps,
                    "long_guidance": guidance,
                    "alone_ms": round(1e3 * a, 2),
                    "behind_ms": round(1e3 * b, 2),
                    "behind_p90_ms": round(1e3 * float(np.percentile(behind, 90)), 2),
                    "tick_ms": round(1e3 * tick, 2),
                    "limit_ms": round(1e3 * (1.5 * a + tick), 2),
                    "met": b <= 1.5 * a + tick,
                }
            )
    return rows


def _seconds(server: fewstep.Server, steps: int, seed: int) -> float:
    began = time.perf_counter()
    server.generate("a red circle", steps=steps, seed=seed)
    return time.perf_counter() - began


def fastest_threads(bundle: Any) -> tuple[fewstep.Pipeline, int, Alone]:
    """The pipeline that is quickest one request at a time, of those with one thread and with one a core."""
    found = []
    for threads in sorted({1, os.cpu_count() or 1}):
        pipeline = fewstep.load(bundle, threads=threads)
        found.append((pipeline, threads, Alone(pipeline_maker(pipeline))))
    return min(found, key=lambda f: f[2].mean())


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best goodput of each subject, and the most that arrives with nine in ten still good."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(r["subject"] for r in rows):
        mine = [r for r in rows if r["subject"] == name]
        sustained = [r["rate_per_s"] for r in mine if r["good"] >= 0.9 * r["sent"]]
        best = max(mine, key=lambda r: r["goodput_per_s"])
        found[name] = {
            "best_goodput_per_s": best["goodput_per_s"],
            "at_rate_per_s": best["rate_per_s"],
            "rate_with_90_percent_good_per_s": max(sustained, default=0.0),
        }
    ours, one = found["continuous"], found["one at a time"]
    found["goodput against one at a time"] = round(ours["best_goodput_per_s"] / one["best_goodput_per_s"], 2)
    return found


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name in dict.fromkeys(r["subject"] for r in rows):
        mine = [r for r in rows if r["subject"] == name]
        rates = [r["rate_per_s"] for r in mine]
        axes[0].plot(rates, [r["goodput_per_s"] for r in mine], marker="o", label=name)
        with_latency = [r for r in mine if r["stretch"]]
        axes[1].plot(
            [r["rate_per_s"] for r in with_latency], [r["stretch"]["p90"] for r in with_latency], marker="o", label=name
        )
    top = max(r["rate_per_s"] for r in rows)
    axes[0].plot([0, top], [0, top], color="0.8", zorder=0)
    axes[0].set(xlabel="arrivals a second", ylabel=f"ended within {STRETCH:g}x their time alone, a second")
    axes[1].set(xlabel="arrivals a second", ylabel="p90 of time / time alone", yscale="log")
    axes[1].axhline(STRETCH, color="0.8", zorder=0)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="student", choices=("student", "base"))
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals at each rate")
    parser.add_argument("--rates", default="0.5,0.8,1.1,1.5,2,3", help="multiples of what one at a time sustains")
    parser.add_argument("--without", default="", help="subjects to leave out, by comma")
    parser.add_argument("--repeats", type=int, default=21, help="of short requests behind a long one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    from fewstep.export.embedded import embedded_bundle, embedded_checkpoint

    bundle, _ = embedded_bundle(options.model)
    pipeline, threads, alone = fastest_threads(bundle)
    cores = os.cpu_count() or 1
    shared = fewstep.load(bundle, threads=cores)
    capacity = 1.0 / alone.mean()
    continuous = Continuous(shared, [s for s, _ in SIZES])
    subjects: list[tuple[Subject, Alone]] = [(continuous, alone)]
    subjects.append((Queued("one at a time", pipeline_maker(pipeline)), alone))
    subjects.append((Queued("static batches", pipeline_maker(shared), batch=STATIC_BATCH), alone))
    if "diffusers" not in options.without:
        make = diffusers_maker(str(embedded_checkpoint(options.model)), cores)
        subjects.append((Queued("diffusers", make), Alone(make)))
    print(f"one at a time sustains {capacity:.1f} requests a second ({threads} threads)", flush=True)
    rows = []
    for factor in (float(f) for f in options.rates.split(",")):
        for subject, own in subjects:
            row = load(subject, factor * capacity, options.seconds, own)
            rows.append(row)
            share = 100 * row["good"] / max(1, row["sent"])
            print(
                f"{row['rate_per_s']:6.1f}/s  {row['subject']:15} good {row['goodput_per_s']:6.1f}/s ({share:3.0f} %)  "
                f"stretch {row['stretch']}  refused {row['refused']}",
                flush=True,
            )
    short = behind_a_long_one(continuous, options.repeats)
    for row in short:
        print(row, flush=True)
    summary = summarise(rows)
    print(json.dumps(summary, indent=1))
    data = {
        "what": (__doc__ or "").split("\n")[0],
        "model": options.model,
        "machine": platform.processor() or platform.machine(),
        "cores": cores,
        "threads": {"one at a time": threads, "others": cores},
        "versions": {"python": platform.python_version(), "fewstep": fewstep.__version__},
        "mix": {"samplers": SAMPLERS, "steps": STEPS, "guided": GUIDED, "sizes": SIZES, "outstanding": OUTSTANDING},
        "seconds": options.seconds,
        "load_average_before": round(os.getloadavg()[0], 2),
        "alone": alone.to_json(),
        "rows": rows,
        "short_behind_a_30_step_one": short,
        "buckets_ms": continuous.server.stats().buckets,
        "summary": summary,
    }
    for subject, _ in subjects:
        subject.close()
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot, f"embedded {options.model}, {cores} cores: mixed requests, Poisson arrivals")
    return 0


if __name__ == "__main__":
    sys.exit(main())
