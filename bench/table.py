"""The report as a table for a terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MissingExtraError


def lines(report: dict[str, Any], steps: tuple[int, ...]) -> list[str]:
    """The table: one line a contender, then its stages, then the ratios to fewstep."""
    alone = report["what"]["measured"] != "whole requests"
    agreement = "rel.error" if alone else "PSNR dB"
    columns = f"{'p50 ms':>10} {'p90 ms':>10} {'p99 ms':>10} {'peak MB':>9} {'start ms':>9} {agreement:>8}"
    table = [f"{'':20} {'steps':>5} {columns}"]
    for name, data in report["contenders"].items():
        if "error" in data:
            table.append(f"{name:20} cannot run: {data['error']}")
            continue
        for s in steps:
            whole = data["whole"].get(str(s))
            if whole is None:
                continue
            cold = data["cold_start"]["p50"] if data["cold_start"] else None
            table.append(
                f"{name:20} {s:5} {whole['p50']:10.2f} {whole['p90']:10.2f} {whole['p99']:10.2f} "
                f"{data['peak_mb']:9.0f} {_or_dash(cold, '9.0f')} {_agreement(data)}"
            )
        if data["fit"]:
            table.append(f"{'':26} fixed {data['fit']['fixed_ms']:.2f} ms + {data['fit']['per_step_ms']:.2f} ms a step")
        stages = data["stages"].get(str(steps[-1]), {})
        if stages:
            table.append(f"{'':26} " + ", ".join(f"{n} {v['p50']:.2f}" for n, v in stages.items()))
    for ours, others in report["ratios"].items():
        for other, by in others.items():
            parts = []
            for key, value in by.items():
                if key == "peak memory":
                    parts.append(f"memory {value:.2f}x")
                else:
                    parts.append(f"{key if key == 'cold start' else f'{key} steps'} {_ratio(value)}")
            table.append(f"{other} over {ours}: " + "; ".join(parts))
    for s, given in report["cores"].items():
        table.append(
            f"cores given round {given['n']} turns of {s} steps: median {given['p50']:.2f}, least {given['min']:.2f}"
        )
    return table


def _ratio(value: dict[str, Any]) -> str:
    text = f"{value['ratio']:.2f}x [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{text} ({_ratio(value['all_cores'])} with all cores)" if "all_cores" in value else text


def _or_dash(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def _agreement(data: dict[str, Any]) -> str:
    if "relative_error" not in data:
        return f"{'-':>8}"
    if data["relative_error"] is None:
        return f"{'NaN':>8}"
    if "psnr_db" not in data:
        return f"{data['relative_error']:8.1e}"
    return f"{'equal':>8}" if data["psnr_db"] is None else f"{data['psnr_db']:8.1f}"


def plot(report: dict[str, Any], steps: tuple[int, ...], path: Path) -> None:
    """Bars of the median with p90 as a whisker, one group a step count; `MissingExtraError` without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", purpose="--plot") from error
    able = {n: d for n, d in report["contenders"].items() if "error" not in d}
    figure, axes = pyplot.subplots(figsize=(1.6 * len(able) * max(1, len(steps)) ** 0.5 + 2, 4))
    for i, s in enumerate(steps):
        rows = [d["whole"][str(s)] for d in able.values()]
        places = [j + i * 0.8 / len(steps) for j in range(len(rows))]
        middle, high = [r["p50"] for r in rows], [r["p90"] - r["p50"] for r in rows]
        axes.bar(places, middle, 0.8 / len(steps), yerr=[[0.0] * len(rows), high], label=f"{s} steps", capsize=2)
    axes.set_xticks([j + 0.4 - 0.4 / len(steps) for j in range(len(able))], list(able), rotation=15)
    axes.set_ylabel("milliseconds, median and p90")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
