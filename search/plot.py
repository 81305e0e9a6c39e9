"""A picture of what a search found: levels beside known ones, and errors over steps. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..places import writing
from ..schedules import FoundSchedules, NoiseSchedule, compile_program

BESIDE = ("trailing", "karras", "ays_sd", "gits")
FOUND_LINE: dict[str, Any] = {"color": "black", "linewidth": 2.0, "marker": "o", "markersize": 4, "label": "found"}


def plot_found(found: FoundSchedules, path: str | Path, *, noise_config: Mapping[str, Any]) -> None:
    """Write a PNG (or what the suffix says): on the left the levels of the most steps, on the right distances.

    Raises `MissingExtraError` without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", purpose="plotting schedules") from error
    noise = NoiseSchedule.from_diffusers(noise_config)
    figure = Figure(figsize=(11, 4.2), dpi=100)
    FigureCanvasAgg(figure)
    levels, errors = figure.subplots(1, 2)
    last = found.entries[-1]
    levels.plot(range(last.steps), last.sigmas[:-1], **FOUND_LINE)
    for name in BESIDE:
        program = compile_program(found.sampler, schedule=name, steps=last.steps, noise=noise)
        levels.plot(range(last.steps), program.sigmas[: last.steps], linewidth=1.0, marker=".", label=name)
    levels.set_yscale("log")
    levels.set_xlabel("evaluation")
    levels.set_ylabel("sigma")
    levels.set_title(f"levels of {last.steps} steps, {found.sampler}", fontsize=10)
    _plot_errors(errors, found.made.get("found", {}))
    errors.set_title(f"distance to the teacher, guidance {found.guidance:g}", fontsize=10)
    for axes in (levels, errors):
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=8)
    figure.tight_layout()
    with writing("the plot", Path(path).absolute().parent):
        figure.savefig(path)


def _plot_errors(axes: Any, reports: Mapping[str, Any]) -> None:
    """Means and intervals by number of steps, of what was found and of known schedules."""
    steps = [int(n) for n in reports]
    for name in ("found", *BESIDE):
        own = [r["latent_rmse"] if name == "found" else r["known"].get(name) for r in reports.values()]
        points = [(n, v) for n, v in zip(steps, own, strict=True) if v is not None]
        if not points:
            continue
        means = [v["mean"] for _, v in points]
        spread = [[v["mean"] - v["low"] for _, v in points], [v["high"] - v["mean"] for _, v in points]]
        style = FOUND_LINE if name == "found" else {"linewidth": 1.0, "marker": ".", "label": name}
        axes.errorbar([n for n, _ in points], means, yerr=spread, capsize=2, **style)
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("root mean square of latents")
