"""A picture of schedules: sigma over steps on one logarithmic axis. Needs matplotlib, imported when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ArgumentError, MissingExtraError
from ..places import writing
from .program import Program

FLOOR = 1e-3
"""Where sigma 0 is drawn, as a logarithmic axis has no 0."""


def plot_schedules(programs: Sequence[Program], path: str | Path, *, title: str = "") -> None:
    """Write a PNG (or what the suffix says) with one line a program.

    Raises MissingExtraError without matplotlib, ArgumentError for no programs.
    """
    if not programs:
        raise ArgumentError("no programs to plot", expected="at least one")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", purpose="plotting schedules") from error
    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for program in programs:
        sigmas = [max(float(sigma), FLOOR) for sigma in program.sigmas]
        shape = f"{program.sampler} {program.schedule}, {program.evaluations} evaluations"
        axes.plot(range(len(sigmas)), sigmas, marker="o", markersize=3, linewidth=1.2, label=shape)
    axes.set_yscale("log")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("sigma")
    axes.grid(True, which="both", alpha=0.25)
    if any(program.sigmas[-1] == 0.0 for program in programs):
        axes.axhline(FLOOR, linewidth=0.8, linestyle=":", color="grey")
        axes.annotate("0", (0, FLOOR), textcoords="offset points", xytext=(-12, -3))
    axes.legend(fontsize=8)
    axes.set_title(title or "noise level at each evaluation")
    figure.tight_layout()
    with writing("the plot", Path(path).absolute().parent):
        figure.savefig(path)
