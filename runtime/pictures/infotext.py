"""A picture's parameters as the web UI of A1111 writes them, and read from its pictures.

What is read becomes parameters as fewstep's own pictures hold them; what has no counterpart here is said by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CorruptError, FewstepError
from ...schedules.a1111 import read_labels, sampler_label, schedule_label
from ..arguments import LARGEST_SEED
from .upscale import find_upscaler

NEGATIVE = "Negative prompt: "
OPTION_LABELS = {
    "eta": "Eta",
    "s_churn": "Sigma churn",
    "s_tmin": "Sigma tmin",
    "s_tmax": "Sigma tmax",
    "s_noise": "Sigma noise",
}
ETA_DDIM = "Eta DDIM"
IGNORED = frozenset({"Version", "Model", "Model hash", "User", "App", "Lora hashes", "TI hashes", "Hashes", "Script"})
"""Entries that ask nothing of a picture: a bundle is named where the picture is made again."""
LEAST_ENTRIES = 3
MOST_LINE = 1 << 16
"""Characters of the last line."""
_ENTRY = re.compile(r'(\w[\w \-/]{1,80}):\s{0,8}("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,8})x(\d{1,8})")
_WEIGHTS = re.compile(r"[()\[\]]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What of another program's picture fewstep takes: parameters as its own pictures hold them, and what it leaves."""

    parameters: Mapping[str, Any]
    left: tuple[str, ...]


def most_guidance(p: Mapping[str, Any]) -> float | None:
    """The guidance, or the largest of those of a clip's frames."""
    found = p.get("guidance")
    return max(found) if isinstance(found, (list, tuple)) else found


def infotext(p: Mapping[str, Any]) -> str:
    """The parameters as the web UI writes them, in its names where it has one."""
    recorded, options = p.get("recorded") or {}, p.get("options") or {}
    plain = recorded.get("prompt_syntax") != "a1111"
    lines = [_prompt(str(p.get("prompt", "")), plain=plain, loras=p.get("loras") or {})]
    if p.get("negative"):
        lines.append(NEGATIVE + _prompt(str(p["negative"]), plain=plain, loras={}))
    guidance, skip, device = most_guidance(p), recorded.get("clip_skip"), recorded.get("seed_device", "cpu")
    hires = p.get("hires") or {}
    parts: list[tuple[str, Any]] = [
        ("Steps", p.get("steps")),
        ("Sampler", _named(sampler_label, p.get("sampler_name"))),
        ("Schedule type", _named(schedule_label, p.get("schedule_name"))),
        ("CFG scale", None if guidance is None else f"{max(guidance, 1.0):g}"),
        ("Seed", p.get("seed")),
        ("Size", f"{p.get('width')}x{p.get('height')}"),
        ("Model hash", _short(p.get("checkpoint_sha256"))),
        ("Model", p.get("model")),
        ("Variation seed", p.get("variation_seed")),
        ("Variation seed strength", p.get("variation")),
        ("Denoising strength", p.get("strength") if p.get("image") else hires.get("strength")),
        ("Mask blur", 0 if recorded.get("mask") else None),
        ("Clip skip", skip + 1 if skip else None),
        ("RNG", "CPU" if device == "cpu" else "NV"),
        *((_option_label(k, p), options[k]) for k in OPTION_LABELS if k in options),
        ("Hires upscale", _number(hires.get("scale"))),
        ("Hires resize", hires.get("size")),
        ("Hires steps", hires.get("steps")),
        ("Hires upscaler", hires.get("upscaler")),
        *_script(p.get("grid") or {}),
        ("Version", f"fewstep {p.get('version')}"),
    ]
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in parts if v is not None))
    return "\n".join(lines)


def _short(sha256: str | None) -> str | None:
    """A checkpoint file's digest as the web UI shows it."""
    return None if sha256 is None else sha256[:10]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _named(label: Any, name: str | None) -> str | None:
    return None if name is None else label(name)


def _option_label(name: str, p: Mapping[str, Any]) -> str:
    return ETA_DDIM if name == "eta" and p.get("sampler_name") == "ddim" else OPTION_LABELS[name]


def _script(grid: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a sheet of pictures says beside its first picture."""
    if "matrix" in grid:
        return [("Script", "Prompt matrix")]
    axes = [(letter, grid[k].partition("=")) for letter, k in (("X", "columns"), ("Y", "rows")) if grid.get(k)]
    named = [(f"{letter} {what}", text) for letter, (n, _, v) in axes for what, text in (("Type", n), ("Values", v))]
    return [("Script", "X/Y/Z plot"), *named] if axes else []


def _prompt(text: str, *, plain: bool, loras: Mapping[str, Any]) -> str:
    """A prompt as the web UI reads it: brackets that weigh nothing are escaped, LoRAs are tags."""
    words = _WEIGHTS.sub(r"\\\g<0>", text.replace("\\", "\\\\")) if plain else text
    return " ".join([words, *(f"<lora:{n.removesuffix('.safetensors')}:{_scale(s)}>" for n, s in loras.items())])


def _scale(scale: Any) -> str:
    """A number, or of the text encoder and of the UNet, as the tag has them."""
    if not isinstance(scale, Mapping):
        return f"{scale:g}"
    text = next((s for c, s in scale.items() if c != "unet"), 0.0)
    return f"{text:g}:{scale.get('unet', 0.0):g}"


def _quoted(value: object) -> str:
    """A value as the web UI quotes it, where it holds what divides entries."""
    text = str(value)
    if not set(text) & set(',:\n"'):
        return text
    return '"{}"'.format(text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))


def read_infotext(text: str, name: str) -> Carried:
    """The web UI's text of a picture of this name as parameters, for `check_parameters` to check.

    `CorruptError` for a text that is none of its, or whose numbers are none. A sampler or a schedule that fewstep does
    not do is left out and said, as is everything else that has no counterpart.
    """
    lines = text.strip().split("\n")
    entries = dict(_ENTRY.findall(lines[-1])) if len(lines[-1]) <= MOST_LINE else {}
    if len(entries) < LEAST_ENTRIES or "Steps" not in entries:
        raise CorruptError(f"the text of {name} is none of A1111's", expected="a last line of Steps, Sampler, ...")
    words = "\n".join(lines[:-1])
    positive, found, rest = f"\n{words}".partition(f"\n{NEGATIVE}")
    prompt, negative = positive.strip(), rest.strip() if found else None
    try:
        return _carried(_Entries(entries), prompt, negative)
    except (ValueError, OverflowError) as error:
        raise CorruptError(f"the text of {name} has a value that is no number ({error})") from error


class _Entries:
    """The last line's entries, of which each is taken once; what remains is left."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._left = {k: v[1:-1].replace('\\"', '"') if v[:1] == '"' else v.strip() for k, v in entries.items()}

    def take(self, name: str) -> str | None:
        return self._left.pop(name, None)

    def number(self, name: str) -> float | None:
        value = self.take(name)
        return None if value is None else float(value)

    def integer(self, name: str) -> int | None:
        value = self.take(name)
        return None if value is None else int(value)

    @property
    def left(self) -> list[str]:
        return [f"{k}: {v}" for k, v in self._left.items() if k not in IGNORED]


def _carried(entries: _Entries, prompt: str, negative: str | None) -> Carried:
    sampler, schedule = entries.take("Sampler"), entries.take("Schedule type")
    size = _SIZE.fullmatch(entries.take("Size") or "")
    if size is None:
        raise ValueError("its Size is not WIDTHxHEIGHT")
    p: dict[str, Any] = {"bundle": entries.take("Model") or "BUNDLE", "prompt": prompt, "negative": negative}
    p |= {"width": int(size[1]), "height": int(size[2]), "steps": entries.integer("Steps")}
    p |= {"guidance": entries.number("CFG scale"), "seed": (entries.integer("Seed") or 0) % (LARGEST_SEED + 1)}
    notes: list[str] = []
    if sampler is not None:
        try:
            p["sampler"], p["schedule"] = read_labels(sampler, schedule)
        except FewstepError as error:
            notes.append(f"Sampler: {sampler}{f', Schedule type: {schedule}' if schedule else ''} ({error.found})")
    skip, rng = entries.integer("Clip skip"), entries.take("RNG")
    recorded: dict[str, Any] = {"prompt_syntax": "a1111"}
    recorded |= {"clip_skip": skip - 1} if skip and skip > 1 else {}
    recorded |= {} if rng == "CPU" else {"seed_device": "cuda"}
    options = {k: entries.number(label) for k, label in OPTION_LABELS.items() if label in entries._left}
    eta = entries.number(ETA_DDIM)
    options |= {} if eta is None else {"eta": eta}
    variation = entries.number("Variation seed strength")
    variation_seed = entries.integer("Variation seed")
    if variation:
        p |= {"variation": variation, "variation_seed": variation_seed or 0}
    p |= _second_pass(entries, notes)
    return Carried(parameters={**p, "recorded": recorded, "options": options}, left=(*notes, *entries.left))


def _second_pass(entries: _Entries, notes: list[str]) -> dict[str, Any]:
    """The web UI's high-resolution pass, with an upscaler of ours where it is a network of its own."""
    scale, resize = entries.number("Hires upscale"), entries.take("Hires resize")
    steps, upscaler = entries.integer("Hires steps"), entries.take("Hires upscaler")
    strength = entries.number("Denoising strength")
    if scale is None and resize is None:
        if strength is not None:
            notes.append(f"Denoising strength: {strength:g} (its picture is not in the text: pass --image)")
        return {}
    found = find_upscaler(upscaler or "latent")
    if found is None:
        notes.append(f"Hires upscaler: {upscaler} (lanczos instead)")
    pass_ = {"scale": scale, "size": resize, "strength": strength, "steps": steps or None}
    return {"hires": {k: v for k, v in {**pass_, "upscaler": found or "lanczos"}.items() if v is not None}}
