"""What there is: samplers and schedules as plain data and as text, and which of them suit a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import FewstepError
from ..values import shown
from .compat.classes import admits_thresholding
from .compile import compile_program
from .found import FoundSchedules
from .names import sampler_aliases_of, schedule_aliases_of
from .noise import NoiseSchedule
from .program import Program
from .solvers.registry import SAMPLERS, Sampler
from .spacing import SPACINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerInfo:
    """One sampler for people.

    history: ring slots of kept quantities. evaluations: of the network, as an expression in the steps n.
    draws: when it draws noise. order: of accuracy. thresholds: whether it may threshold x0. options: its
    keyword options with their defaults.
    """

    name: str
    summary: str
    aliases: tuple[str, ...]
    history: int
    evaluations: str
    draws: str
    order: int
    thresholds: bool
    options: Mapping[str, Any]
    default_schedule: str
    source: str
    diffusers: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleInfo:
    """One schedule for people. kind: "timesteps", "sigmas" or "table", by what it picks. options: its own."""

    name: str
    summary: str
    aliases: tuple[str, ...]
    kind: str
    options: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Suitability:
    """Whether a sampler suits a checkpoint, and why, or why not."""

    sampler: str
    suits: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundInfo:
    """Found schedules of one number of steps, for people. figures: on prompts and seeds held out from the search."""

    sampler: str
    digest: str
    steps: int
    method: str
    guidance: float
    size: tuple[int, int]
    figures: Mapping[str, Any]


def list_found(held: Sequence[FoundSchedules]) -> list[FoundInfo]:
    """Every number of steps that was searched, by sampler."""
    return [
        FoundInfo(
            sampler=found.sampler,
            digest=found.digest,
            steps=entry.steps,
            method=entry.method,
            guidance=found.guidance,
            size=found.size,
            figures=entry.figures,
        )
        for found in held
        for entry in found.entries
    ]


def list_samplers() -> list[SamplerInfo]:
    """Every sampler, in the registry's order."""
    noise = NoiseSchedule.scaled_linear()
    return [
        SamplerInfo(
            name=sampler.name,
            summary=sampler.summary,
            aliases=sampler_aliases_of(sampler.name),
            history=compile_program(sampler.name, steps=12, noise=noise).history,
            evaluations=_evaluations(sampler),
            draws=sampler.draws,
            order=sampler.order,
            thresholds=admits_thresholding(sampler),
            options=sampler.options,
            default_schedule=sampler.schedule,
            source=sampler.source,
            diffusers=sampler.diffusers,
        )
        for sampler in SAMPLERS.values()
    ]


def list_schedules() -> list[ScheduleInfo]:
    """Every schedule by name, with what it picks and where it is from."""
    return [
        ScheduleInfo(
            name=spacing.name,
            summary=spacing.summary,
            aliases=schedule_aliases_of(spacing.name),
            kind="timesteps" if spacing.timesteps else "sigmas" if spacing.sigmas else "table",
            options=spacing.options,
            source=spacing.source,
        )
        for spacing in SPACINGS.values()
    ]


def samplers_for(
    noise: NoiseSchedule, *, prediction: str | None = None, family: str | None = None
) -> list[Suitability]:
    """Which samplers suit a checkpoint, and why the others do not.

    prediction: the checkpoint's, its noise schedule's own if None. family: "lcm", "tcd", "turbo", "lightning",
    "hyper" for a distilled checkpoint, None for a base model.
    """
    prediction = prediction or noise.prediction
    return [_suitability(sampler, noise, prediction, family) for sampler in SAMPLERS.values()]


_WANTED: dict[str, tuple[tuple[str, ...], str]] = {
    "lcm": (("lcm",), "consistency-distilled for LCM's multistep sampling"),
    "tcd": (("tcd",), "consistency-distilled for TCD's strategic sampling"),
    "turbo": (("euler_ancestral", "euler"), "distilled adversarially for Euler steps from trailing timesteps"),
    "lightning": (
        ("euler", "dpmpp_1m", "dpmpp_1s", "ddim", "deis_1"),
        "distilled for first-order steps from trailing timesteps",
    ),
    "hyper": (("ddim", "euler", "tcd", "lcm", "dpmpp_1m", "dpmpp_1s", "deis_1"), "distilled for first-order steps"),
}


def why_unsuited(sampler: str, family: str | None) -> str | None:
    """Why a sampler does not suit checkpoints of a kind of distillation (`samplers_for`), if that is known of it."""
    if family in _WANTED:
        suiting, why = _WANTED[family]
        return None if sampler in suiting else f"{', '.join(suiting)} only: this checkpoint is {why}"
    return f"for {sampler.upper()}-distilled checkpoints or LoRAs only" if sampler in ("lcm", "tcd") else None


def _suitability(sampler: Sampler, noise: NoiseSchedule, prediction: str, family: str | None) -> Suitability:
    name = sampler.name
    if name == "edm_euler" and noise.timestep_type != "continuous":
        return Suitability(sampler=name, suits=False, why="for networks on EDM's axis, fed with ln(sigma) / 4")
    against = why_unsuited(name, family)
    if against is not None:
        return Suitability(sampler=name, suits=False, why=against)
    if family in _WANTED:
        return Suitability(sampler=name, suits=True, why=f"this checkpoint is {_WANTED[family][1]}")
    try:
        compile_program(name, steps=min(10, len(noise)), noise=noise, prediction=prediction)
    except FewstepError as error:
        return Suitability(sampler=name, suits=False, why=str(error))
    note = "; start trailing, since the last timestep is pure noise" if noise.zero_terminal_snr else ""
    note += "; thresholds x0, as the checkpoint's scheduler says" if noise.config.get("thresholding") else ""
    return Suitability(sampler=name, suits=True, why=f"any {prediction} model{note}")


def program_table(program: Program) -> list[dict[str, Any]]:
    """The rows of a program as plain data, one dict an evaluation."""
    return [
        {
            "row": i,
            "timestep": float(program.timesteps[i]),
            "sigma": float(program.sigmas[i]),
            "h_x": float(program.h_x[i]),
            "h_out": float(program.h_out[i]),
            "write": int(program.write[i]),
            "a": float(program.a[i]),
            "b": [float(b) for b in program.b[i]],
            "c": float(program.c[i]),
            "c_prev": float(program.c_prev[i]),
            "draws": bool(program.draws[i]),
        }
        for i in range(program.evaluations)
    ]


def format_program(program: Program) -> str:
    """The rows as a text table, with a heading line."""
    columns = ["row", "timestep", "sigma", "h_x", "h_out", "write", "a", *(f"b{k}" for k in range(program.history))]
    columns += ["c", "c_prev", "draws"]
    lines = []
    for row in program_table(program):
        values = {**row, **{f"b{k}": value for k, value in enumerate(row["b"])}, "draws": "yes" if row["draws"] else ""}
        lines.append([_cell(values[column]) for column in columns])
    skipped = f", {program.start} of {program.steps} steps skipped" if program.start else ""
    heading = (
        f"{program.sampler} under {program.schedule}, {program.prediction}: {program.evaluations} evaluations, "
        f"{program.history} history slots{skipped}; ends at sigma {program.sigmas[-1]:g}"
    )
    return f"{heading}\n{format_table(columns, lines)}"


def format_samplers(infos: Sequence[SamplerInfo]) -> str:
    columns = ["sampler", "history", "evaluations", "order", "noise", "thresholds", "source", "other names"]
    return format_table(
        columns,
        [
            [
                *(i.name, str(i.history), i.evaluations, str(i.order), i.draws, "yes" if i.thresholds else ""),
                *(i.source, ", ".join(i.aliases)),
            ]
            for i in infos
        ],
    )


def format_schedules(infos: Sequence[ScheduleInfo]) -> str:
    columns = ["schedule", "picks", "what", "source", "other names"]
    return format_table(columns, [[i.name, i.kind, i.summary, i.source, ", ".join(i.aliases)] for i in infos])


def format_found(infos: Sequence[FoundInfo]) -> str:
    columns = ["searched", "digest", "steps", "method", "found at", "held out"]
    return format_table(
        columns,
        [
            [
                *(i.sampler, i.digest[:12], str(i.steps), i.method),
                f"guidance {i.guidance:g}, {i.size[0]}x{i.size[1]}",
                ", ".join(f"{k} {_figure(v)}" for k, v in i.figures.items()),
            ]
            for i in infos
        ],
    )


def _figure(value: Any) -> str:
    """A figure of whatever type, short."""
    return _cell(value) if isinstance(value, float) else shown(value, 40)


def format_suitability(verdicts: Sequence[Suitability]) -> str:
    ranked = sorted(verdicts, key=lambda verdict: not verdict.suits)
    return format_table(["sampler", "suits", "why"], [[v.sampler, "yes" if v.suits else "no", v.why] for v in ranked])


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two spaces apart."""
    widths = [max(len(column), *(len(row[k]) for row in rows)) for k, column in enumerate(columns)]
    lines = [columns, *rows]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_data(infos: Sequence[SamplerInfo | ScheduleInfo | Suitability | FoundInfo]) -> list[dict[str, Any]]:
    """The same as dicts for JSON; infinite option defaults become the text "inf"."""
    return [_json_safe(asdict(info)) for info in infos]


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(v) for key, v in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _evaluations(sampler: Sampler) -> str:
    if sampler.stages == 2:
        return "2n - 1"
    return f"n + {sampler.extra_evaluations}" if sampler.extra_evaluations else "n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "0" if value == 0.0 else f"{value:.6g}"
    return str(value)
