"""The report's data: figures by contender, and the ratios of each to each variant of fewstep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .samples import Plan, Samples
from .summary import fixed_and_per_step, percentiles, psnr, ratio_of_medians, relative_error, stage_percentiles

FEWEST = 5
"""How many turns with all cores make a figure."""


def make_report(plan: Plan, samples: dict[str, Samples], meetings: Sequence[Mapping[str, Samples]]) -> dict[str, Any]:
    """Contenders, ratios and the cores that the machine gave, for JSON; `samples` are those of all meetings."""
    reference = samples["diffusers"].output if "diffusers" in samples else None
    contenders = {n: _figures(plan, s, reference) for n, s in samples.items()}
    ratios: dict[str, Any] = {}
    for meeting in meetings:
        for ours in (n for n in meeting if n in plan.variants):
            for other in meeting:
                if other != ours:
                    ratios.setdefault(ours, {})[other] = dict(_ratios(plan, meeting, ours, other))
    for ours in plan.variants:
        for other in (n for n in samples if n not in plan.variants):
            if samples[other].cold and samples[ours].cold:
                entry = ratios.setdefault(ours, {}).setdefault(other, {})
                entry["cold start"] = ratio_of_medians(samples[other].cold, samples[ours].cold)
            if samples[other].peak_mb and samples[ours].peak_mb:
                entry = ratios.setdefault(ours, {}).setdefault(other, {})
                entry["peak memory"] = round(samples[other].peak_mb / samples[ours].peak_mb, 3)
    cores = {str(s): [c for part in samples.values() for c in part.cores.get(s, ())] for s in plan.steps}
    return {"contenders": contenders, "ratios": ratios, "cores": {s: percentiles(v) for s, v in cores.items() if v}}


def _ratios(plan: Plan, meeting: Mapping[str, Samples], ours: str, other: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """By number of steps: how many times longer the other took, in all rounds and in the turns with all cores."""
    theirs, mine = meeting[other], meeting[ours]
    for steps in plan.steps:
        if steps not in theirs.wall or steps not in mine.wall:
            continue
        result: dict[str, Any] = ratio_of_medians(theirs.wall[steps], mine.wall[steps])
        few, many = (s.with_all_cores(steps, plan.threads) for s in (theirs, mine))
        if min(len(few), len(many)) >= FEWEST:
            result["all_cores"] = ratio_of_medians(few, many, paired=False)
        yield str(steps), result


def _figures(plan: Plan, samples: Samples, reference: np.ndarray | None) -> dict[str, Any]:
    """One contender's part of the report."""
    if samples.error:
        return {"error": samples.error}
    whole = {s: samples.with_all_cores(s, plan.threads) for s in samples.wall}
    data: dict[str, Any] = {
        "versions": samples.versions,
        "facts": samples.facts,
        "import_ms": round(samples.import_ms, 2),
        "load_ms": round(samples.load_ms, 2),
        "peak_mb": round(samples.peak_mb, 1),
        "whole": {str(s): percentiles(v) for s, v in samples.wall.items()},
        "whole_all_cores": {str(s): percentiles(v) for s, v in whole.items() if len(v) >= FEWEST},
        "cpu": {str(s): percentiles(v) for s, v in samples.cpu.items()},
        "stages": {str(s): stage_percentiles(v) for s, v in samples.stages.items()} if plan.unet is None else {},
        "fit": fixed_and_per_step({s: float(np.median(v)) for s, v in samples.wall.items()}),
        "cold_start": percentiles(samples.cold) if samples.cold else None,
        "cold_start_unbuilt": percentiles(samples.cold_unbuilt) if samples.cold_unbuilt else None,
        "samples_ms": {str(s): [round(v, 4) for v in w] for s, w in samples.wall.items()},
    }
    if reference is not None and samples.output is not None and samples.output.shape == reference.shape:
        if plan.unet is None:
            data["psnr_db"] = psnr(samples.output, reference)
        data["relative_error"] = relative_error(samples.output, reference)
    return data
