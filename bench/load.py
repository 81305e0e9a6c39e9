"""Open-loop load: Poisson arrivals of mixed requests, on continuous batching and on four ways to do without it.

    python bench/load.py [--seconds N] [--rates F,F,...] [--json FILE] [--plot FILE]
    python bench/load.py --bundle FOLDER --sizes 256x256 --steps 1,2,4 --guided 0 --threads 2 --without diffusers

Requests mix samplers, steps, guidance and sizes. Arrivals do not wait for answers. A request counts towards goodput
when it ends within three times its time alone: the best, on an idle machine, of a pipeline's own call, with as many
threads as make that fastest; for diffusers its own call, which takes longer. Rates are multiples of what one request
at a time sustains. At each rate all subjects get the same arrivals, one subject after the other, and each runs with
the threads that suit it best. One at a time goes in order of arrival, and once more in that of due times, where those
that can be in time no more come last. What has not ended when the slowest request could have is given up and counts
as late. Most requests are one peer's and the rest three others'; goodput and the longest wait are said by peer too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from fewstep.bench.load_mix import Alone, Mix
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
from fewstep.bench.machine import describe
from fewstep.runtime import load as load_pipeline
from fewstep.serving import Server

STRETCH = 3.0


def load(subject: Subject, mix: Mix, rate: float, seconds: float, alone: Alone) -> dict[str, Any]:
    """Put one rate of arrivals on a subject and count."""
    rng, lock = random.Random(7), threading.Lock()
    ended: list[tuple[Ask, float]] = []
    before, sent, at = subject.figures(), 0, 0.0
    asked: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    began = time.perf_counter()
    while (at := at + rng.expovariate(rate)) < seconds:
        ask = mix.draw(rng, sent)
        time.sleep(max(0.0, began + at - time.perf_counter()))
        arrival = began + at  # lateness of this loop is the subject's: it holds the interpreter

        def done(ok: bool, ask: Ask = ask, arrival: float = arrival) -> None:
            if ok:
                with lock:
                    ended.append((ask, time.perf_counter() - arrival))

        refused[ask.peer] += not subject.submit(ask, done)
        asked[ask.peer] += 1
        sent += 1
    deadline = began + seconds + STRETCH * alone.longest()
    while len(ended) + refused.total() < sent and time.perf_counter() < deadline:
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
        "refused": refused.total(),
        "finished": len(finished),
        "good": good,
        "goodput_per_s": round(good / seconds, 2),
        "latency_ms": percentiles([1e3 * t for _, t in finished]),
        "stretch": percentiles(stretches),
        "peers": {p: of_peer(p, asked[p], refused[p], finished, alone, seconds) for p in sorted(asked)},
        "figures": {k: round(after[k] - before[k], 2) for k in after},
        "busy_share": round((after["busy_s"] - before["busy_s"]) / length, 3),
    }


def of_peer(
    peer: str, sent: int, refused: int, finished: list[tuple[Ask, float]], alone: Alone, seconds: float
) -> dict[str, Any]:
    """What one peer got: how many of its requests, how many of them in time, and its longest wait of those answered."""
    own = [(ask, took) for ask, took in finished if ask.peer == peer]
    good = sum(took <= STRETCH * alone(ask) for ask, took in own)
    return {
        "sent": sent,
        "refused": refused,
        "finished": len(own),
        "good": good,
        "goodput_per_s": round(good / seconds, 2),
        "worst_wait_ms": round(1e3 * max((took for _, took in own), default=0.0), 1),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 90, 99)}


def behind_a_long_one(subject: Continuous, mix: Mix, *, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Short requests alone, and sent while one of many steps runs; a tick is the median one while both do."""
    rows = []
    server = subject.server
    for short in sorted({s for s, _ in mix.steps if s <= 4}):
        for guidance in mix.guidances:
            alone, behind, ticks = [], [], []
            for i in range(repeats):
                alone.append(_seconds(server, short, i))
                long = server.submit("a ring", steps=steps, guidance=guidance, sampler="dpmpp_2m", seed=i)
                next(long.steps())
                time.sleep(alone[-1] * (i % 7) / 7)
                before = server.stats()
                behind.append(_seconds(server, short, i))
                after = server.stats()
                ticks.append((after.tick_s - before.tick_s) / max(1, after.ticks - before.ticks))
                if long.done:
                    raise SystemExit("the long request ended before the short one: give it more steps")
                long.cancel()
            a, b, tick = (statistics.median(v) for v in (alone, behind, ticks))
            rows.append(
                {
                    "steps": short,
                    "long_steps": steps,
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


def _seconds(server: Server, steps: int, seed: int) -> float:
    began = time.perf_counter()
    server.generate("a red circle", steps=steps, seed=seed, guidance=1.0, sampler="euler")
    return time.perf_counter() - began


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best goodput of each subject, and the most that arrives with nine in ten still good."""
    results: dict[str, Any] = {}
    for name in dict.fromkeys(r["subject"] for r in rows):
        mine = [r for r in rows if r["subject"] == name]
        sustained = [r["rate_per_s"] for r in mine if r["good"] >= 0.9 * r["sent"]]
        best = max(mine, key=lambda r: r["goodput_per_s"])
        results[name] = {
            "best_goodput_per_s": best["goodput_per_s"],
            "at_rate_per_s": best["rate_per_s"],
            "rate_with_90_percent_good_per_s": max(sustained, default=0.0),
        }
    ours = results["continuous"]["best_goodput_per_s"]
    against = {n: round(ours / f["best_goodput_per_s"], 2) for n, f in results.items() if n != "continuous"}
    return {**results, "best goodput of continuous batching against": against}


def gains(buckets: dict[str, dict[int, float]], alone: Alone) -> dict[str, Any]:
    """Rows a second of the largest bucket over those of lone evaluations, by size.

    Against the server's own evaluation of one row, and against a further step of a lone request, which has the
    threads that make it fastest.
    """
    ratios = {}
    for size, costs in buckets.items():
        width, _, height = size.partition("x")
        lone_ms = 1e3 * alone.step_s(1.0, (int(width), int(height)))
        rows, cost_ms = max(costs.items())
        ratios[size] = {
            "rows": rows,
            "over_one_row": round(costs[min(costs)] / min(costs) * rows / cost_ms, 2),
            "over_a_lone_step": round(lone_ms * rows / cost_ms, 2),
        }
    return ratios


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


def subjects_of(
    options: argparse.Namespace, mix: Mix, bundle: Any
) -> tuple[list[tuple[Subject, Alone]], dict[str, int]]:
    """What to load, each with the time alone that its requests are held to, and the threads each uses."""
    counts = [options.threads] if options.threads else sorted({1, os.cpu_count() or 1})
    pipelines = {n: load_pipeline(bundle, threads=n, size=mix.sizes[0][0]) for n in counts}
    timing = {"repeats": options.timings, "more_steps": 2 * options.timings - 2}
    times = {n: Alone(mix, pipeline_maker(p), **timing) for n, p in pipelines.items()}
    lone = min(counts, key=lambda n: times[n].mean())
    servers = {n: Continuous(p, [s for s, _ in mix.sizes], rows=options.rows) for n, p in pipelines.items()}
    shared = max(counts, key=lambda n: crowd(servers[n].server)) if len(counts) > 1 else counts[0]
    for n in counts:
        if n != shared:
            servers[n].close()
    alone, make = times[lone], pipeline_maker(pipelines[lone])

    def times_of(ask: Ask) -> tuple[float, float]:
        return (STRETCH - 1) * alone(ask), STRETCH * alone(ask)

    subjects: list[tuple[Subject, Alone]] = [
        (servers[shared], alone),
        (Queued("one at a time", make), alone),
        (Queued("earliest due first", make, times=times_of), alone),
        (Queued("static batches", pipeline_maker(pipelines[max(counts)]), batch=STATIC_BATCH), alone),
    ]
    threads = {"continuous": shared, "one at a time": lone, "static batches": max(counts)}
    if "diffusers" not in options.without:
        from fewstep.export.embedded import embedded_checkpoint

        plain = diffusers_maker(str(embedded_checkpoint(options.model)), max(counts), mix.samplers)
        subjects.append((Queued("diffusers", plain), Alone(mix, plain, **timing)))
        threads["diffusers"] = max(counts)
    return [s for s in subjects if s[0].name not in options.without], threads


def crowd(server: Server, requests: int = 40) -> float:
    """Requests of four steps a second when they are all there at once."""
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        tickets = [server.submit("a ring", steps=4, guidance=1.0, sampler="euler", seed=i) for i in range(requests)]
        for ticket in tickets:
            ticket.result()
        rates.append(requests / (time.perf_counter() - began))
    return max(rates)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="student", choices=("student", "base"))
    parser.add_argument("--bundle", type=Path, help="a bundle in place of an embedded model")
    parser.add_argument("--name", help="what to call the model in the figures")
    parser.add_argument("--sizes", default="", help="WxH,..., equally often (default: 64x64 and, a fifth, 96x96)")
    parser.add_argument("--steps", default="", help="N,..., equally often (default: 1 to 30)")
    parser.add_argument("--guided", type=float, default=0.2, help="share of requests (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of all subjects (default: what suits each)")
    parser.add_argument("--rows", type=int, default=8, help="most UNet rows a tick (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals at each rate")
    parser.add_argument("--rates", default="0.3,0.5,0.7,1,1.5,2", help="multiples of what one at a time sustains")
    parser.add_argument("--without", default="", help="subjects to leave out, by comma")
    parser.add_argument("--timings", type=int, default=5, help="repeats of a request alone (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=21, help="of short requests behind a long one")
    parser.add_argument("--long", type=int, default=30, help="steps of the long one (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.without = [n.strip() for n in options.without.split(",")] + (["diffusers"] if options.bundle else [])
    return options


def mix_of(options: argparse.Namespace) -> Mix:
    given: dict[str, Any] = {"guided": options.guided}
    if options.sizes:
        sizes = [tuple(int(n) for n in s.split("x")) for s in options.sizes.split(",")]
        given["sizes"] = tuple((s, 1 / len(sizes)) for s in sizes)
    if options.steps:
        steps = [int(n) for n in options.steps.split(",")]
        given["steps"] = tuple((s, 1 / len(steps)) for s in steps)
    return Mix(**given)


def main() -> int:
    options = arguments()
    mix, machine = mix_of(options), describe(0)
    from fewstep.bundle import read_bundle
    from fewstep.export.embedded import embedded_bundle

    bundle = read_bundle(options.bundle) if options.bundle else embedded_bundle(options.model)[0]
    name = options.name or (bundle.name if options.bundle else f"embedded {options.model}")
    subjects, threads = subjects_of(options, mix, bundle)
    continuous, alone = subjects[0]
    if not isinstance(continuous, Continuous):
        raise SystemExit("continuous batching cannot be left out")
    capacity = 1.0 / alone.mean()
    print(f"one at a time sustains {capacity:.2f} requests a second; threads {threads}", flush=True)
    buckets = continuous.server.stats().buckets
    short = behind_a_long_one(continuous, mix, steps=options.long, repeats=options.repeats)
    for row in short:
        print(row, flush=True)
    rows = []
    for factor in (float(f) for f in options.rates.split(",")):
        for subject, own in subjects:
            row = load(subject, mix, factor * capacity, options.seconds, own)
            rows.append(row)
            share = 100 * row["good"] / max(1, row["sent"])
            print(
                f"{row['rate_per_s']:6.2f}/s  {row['subject']:24} good {row['goodput_per_s']:6.2f}/s ({share:3.0f} %)  "
                f"stretch {row['stretch']}  refused {row['refused']}",
                flush=True,
            )
            for peer, got in row["peers"].items():
                print(
                    f"{'':12}{peer:24} good {got['goodput_per_s']:6.2f}/s ({got['good']} of {got['sent']}, refused "
                    f"{got['refused']})  longest wait {got['worst_wait_ms']:.0f} ms",
                    flush=True,
                )
    summary = {**summarise(rows), "rows a second at the largest bucket": gains(buckets, alone)}
    print(json.dumps(summary, indent=1))
    data = {
        "what": (__doc__ or "").split("\n")[0],
        "model": name,
        "machine": machine,
        "threads": threads,
        "mix": {**mix.to_json(), "outstanding": OUTSTANDING, "within": STRETCH},
        "seconds": options.seconds,
        "alone": {subject.name: own.to_json() for subject, own in subjects},
        "rows": rows,
        "short_behind_a_long_one": short,
        "buckets_ms": buckets,
        "summary": summary,
    }
    for subject, _ in subjects:
        subject.close()
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot, f"{name}, {os.cpu_count()} cores: mixed requests, Poisson arrivals")
    return 0


if __name__ == "__main__":
    sys.exit(main())
