"""Samplers and schedules in the web UI of A1111's own words, both ways."""

from __future__ import annotations

from .names import fold, resolve_sampler, resolve_schedule

SAMPLER_LABELS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "lms": "LMS",
    "heun": "Heun",
    "kdpm2": "DPM2",
    "kdpm2_ancestral": "DPM2 a",
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc_2": "UniPC",
    "unipc_3": "UniPC",
    "lcm": "LCM",
}
"""Ours that the web UI has too."""
SCHEDULE_LABELS = {
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "kl_optimal": "KL Optimal",
    "simple": "Simple",
    "leading": "DDIM",
    "beta": "Beta",
    "ays_sd": "Align Your Steps",
    "ays_sdxl": "Align Your Steps",
    "gits": "Align Your Steps GITS",
}
_SCHEDULES = {
    **{fold(label): ours for ours, label in reversed(SCHEDULE_LABELS.items())},
    "normal": "linspace",
    "polyexponential": "exponential",
    "align_your_steps": "ays",
    "turbo": "turbo_tenths",
}
_AUTOMATIC = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "kdpm2", "kdpm2_ancestral"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
    **dict.fromkeys(("ddim", "plms"), "leading"),
    "lcm": "lcm",
}
"""What the web UI takes for its schedule "Automatic"; for all others the uniform one."""


def sampler_label(name: str) -> str:
    """A sampler of ours as the web UI names it; ours, where that has none."""
    return SAMPLER_LABELS.get(name, name)


def schedule_label(name: str) -> str:
    """A schedule of ours as the web UI names it; ours, where that has none."""
    return SCHEDULE_LABELS.get(name, name)


def read_labels(sampler: str, schedule: str | None) -> tuple[str, str]:
    """A sampler and a schedule of ours from the web UI's words; schedule: `None` where a picture states none.

    Raises UnknownNameError, and UnsupportedError for one that is not done.
    """
    resolved = resolve_sampler(sampler)
    if schedule is None:
        uniform = "linspace" if resolved.name not in ("ddim", "plms", "lcm") else _AUTOMATIC[resolved.name]
        return sampler, resolved.schedule or uniform
    if fold(schedule) == "automatic":
        return sampler, resolved.schedule or _AUTOMATIC.get(resolved.name, "linspace")
    return sampler, _SCHEDULES.get(fold(schedule)) or resolve_schedule(schedule)
