"""What a picture says of how it was made, and the command that makes it again.

A picture may come from anybody: its texts are read under a cap, by type and range, and what goes into the command is
quoted so that a shell takes each word as one, whatever it holds.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from ...errors import CorruptError
from ...families.decoders import DECODERS
from ...schedules.found import METHODS
from ...values import Reader, escape, has_controls, parse_json
from ..arguments import LARGEST_SEED
from ..call import CLIP_ARGUMENTS, CONTROL_WORDS, IMAGE_PROMPT, RECORDED, option_names
from ..prompts.lora_tags import MOST_SCALE
from .infotext import Carried, read_infotext
from .texts import JSON_KEY, MOST_TEXT, TEXT_KEY, read_texts
from .upscale import UPSCALERS

NAMED_OPTIONS = ("eta", "timesteps", "sigmas")
"""Options that a command gives by name; it gives any other as `--option=NAME=VALUE`."""
CHOICES = {
    "fit": ("stretch", "cover", "contain", "diffusers"),
    "prompt_syntax": ("plain", "a1111"),
    "long_prompts": ("truncate", "chunk"),
    "decoder": tuple(DECODERS),
}
"""Of recorded arguments that are words of a list."""
MOST_STAGES = 8
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIZE = re.compile(r"\d{1,8}x\d{1,8}")
LARGEST_SIDE = 2**24
GRID = ("columns", "rows", "matrix", "cell")
"""Axes of a sheet of pictures, as the command line has them."""


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters in a picture that fewstep wrote; `CorruptError` when there are none, or not such ones."""
    name, texts = read_texts(path)
    found = texts.get(JSON_KEY, ())
    if len(found) != 1:
        raise CorruptError(
            f"{name} holds {'no' if not found else f'{len(found)} times'} parameters of fewstep",
            expected=f"one text {JSON_KEY!r}",
        )
    data = parse_json(found[0], f"the text {JSON_KEY!r} of {name}")
    reading = Reader(place=f"the text {JSON_KEY!r} of {name}")
    check_parameters(reading.mapping("parameters", data), reading)
    return dict(data)


def read_call(path: str | os.PathLike[str]) -> Carried:
    """The call in a picture of fewstep's or of A1111's web UI, and what of it cannot be carried over, by name.

    `CorruptError` where there is none, or none that can be read.
    """
    name, texts = read_texts(path)
    if JSON_KEY in texts or TEXT_KEY not in texts:
        return Carried(parameters=read_parameters(path), left=())
    carried = read_infotext(texts[TEXT_KEY][0], name)
    check_parameters(carried.parameters, Reader(place=f"the text {TEXT_KEY!r} of {name}"))
    return carried


def check_parameters(p: Mapping[str, Any], reading: Reader) -> None:
    """Raise the reading's error for parameters that no picture of fewstep holds."""
    reading.text("bundle", p.get("bundle"))
    reading.text("prompt", p.get("prompt"), least=0, most=MOST_TEXT)
    for key in ("negative", "prompt_2", "negative_2", "sampler", "schedule", "compat", "image"):
        if p.get(key) is not None:
            reading.text(key, p[key], least=0, most=MOST_TEXT)
    for key in ("width", "height", "steps"):
        if key != "steps" or p.get(key) is not None:
            reading.integer(key, p.get(key), 1, LARGEST_SIDE)
    if p.get("compat") is not None:
        reading.choice("compat", p["compat"], ("diffusers",))
    if p.get("schedule_digest") is not None:
        reading.text("schedule_digest", p["schedule_digest"], _DIGEST)
    if p.get("checkpoint_sha256") is not None:
        reading.text("checkpoint_sha256", p["checkpoint_sha256"], _SHA256)
    if p.get("schedule_method") is not None:
        reading.choice("schedule_method", p["schedule_method"], METHODS)
    listed = isinstance(p.get("guidance"), (list, tuple))  # one a frame of a clip
    for factor in reading.array("guidance", p["guidance"], 1) if listed else ():
        reading.number("guidance", factor)
    for key in ("strength",) if listed else ("guidance", "strength"):
        if p.get(key) is not None:
            reading.number(key, p[key])
    if p.get("batch") is None:
        reading.integer("seed", p.get("seed"), 0, LARGEST_SEED)
    else:
        batch = reading.mapping("batch", p["batch"])
        reading.integer("the batch's seed", batch.get("seed"), 0, LARGEST_SEED)
        for prompt in reading.array("the batch's prompts", batch.get("prompts"), 1):
            reading.text("a prompt", prompt, least=0, most=MOST_TEXT)
    if p.get("variation") is not None or p.get("variation_seed") is not None:
        reading.number("variation", p.get("variation"), 0.0, 1.0)
        reading.integer("variation_seed", p.get("variation_seed"), 0, LARGEST_SEED)
    _check_second_pass(reading.mapping("hires", p.get("hires") or {}), reading)
    for name, text in reading.mapping("grid", p.get("grid") or {}).items():
        reading.choice("a word of the grid", name, GRID)
        reading.text(name, text, most=MOST_TEXT)
    for word in reading.array("then", p.get("then") or (), 0, MOST_STAGES):
        reading.text("a later stage", word)
    for name, value in reading.mapping("loras", p.get("loras") or {}).items():
        reading.text("a LoRA's name", name)
        for component, scale in value.items() if isinstance(value, dict) else [("unet", value)]:
            reading.text("a LoRA's component", component)
            reading.number("a LoRA's scale", scale, -MOST_SCALE, MOST_SCALE)
    for name, value in reading.mapping("options", p.get("options") or {}).items():
        reading.choice("an option's name", name, sorted({*option_names(), *NAMED_OPTIONS}))
        _check_option(name, value, reading)
    for name, value in reading.mapping("recorded", p.get("recorded") or {}).items():
        reading.choice(
            "a recorded argument's name", name, (*RECORDED, *CONTROL_WORDS, "guess_mode", "mask", *IMAGE_PROMPT)
        )
        _check_recorded(name, value, reading)


def _check_second_pass(given: Mapping[str, Any], reading: Reader) -> None:
    for name, value in given.items():
        reading.choice("a word of the second pass", name, ("scale", "size", "strength", "steps", "upscaler"))
        if name == "size":
            reading.text("the second pass's size", value, _SIZE)
        elif name == "upscaler":
            reading.choice("upscaler", value, UPSCALERS)
        elif name == "steps":
            reading.integer("the second pass's steps", value, 1, LARGEST_SIDE)
        else:
            reading.number(f"the second pass's {name}", value, 0.0, LARGEST_SIDE)


def _check_option(name: str, value: object, reading: Reader) -> None:
    """A flag, a text, a number, or a list of numbers; what has an option of its own is as that takes it."""
    if name in ("timesteps", "sigmas") or isinstance(value, (list, tuple)):
        for number in reading.array(name, value, 1):
            reading.number(name, number)
    elif isinstance(value, str) and name != "eta":
        reading.text(name, value, least=0)
    elif name == "eta" or not (value is None or isinstance(value, bool)):
        reading.number(name, value, -math.inf, math.inf)


def _check_recorded(name: str, value: object, reading: Reader) -> None:
    if name == "guess_mode":
        reading.flag(name, value)
    elif name in CONTROL_WORDS:
        for word in reading.array(name, value, 1):
            reading.text(f"a word of {name}", word, most=MOST_TEXT)
    elif name == "noise_level":
        if value != "none":
            reading.integer(name, value, 0, LARGEST_SIDE)
    elif name == "clip_skip":
        reading.integer(name, value, 0, 64)
    elif name in ("noise_augmentation", "min_guidance"):
        reading.number(name, value)
    elif name in CLIP_ARGUMENTS:
        reading.integer(name, value, 0, LARGEST_SIDE)
    elif name.endswith("_size") or "crop" in name:
        least = 1 if name.endswith("_size") else -LARGEST_SIDE
        for side in reading.array(name, value, 2, 2) if value != "none" else ():
            reading.integer(name, side, least, LARGEST_SIDE)
    elif name == "ip_adapter_scale" or (name == "mask_threshold" and value != "none"):
        reading.number(name, value)
    else:
        reading.choice(name, value, CHOICES[name]) if name in CHOICES else reading.text(name, value)


def command_line(p: Mapping[str, Any], output: str) -> str:
    """The command that makes the picture again; of a batch with one stream of noise, the whole batch.

    p: as `check_parameters` admits them.
    """
    return " ".join(map(shell_word, command_words(p, output)))


def command_words(p: Mapping[str, Any], output: str) -> list[str]:
    """As `command_line`, word by word."""
    p, grid = _without_axes(p), p.get("grid") or {}
    batch = p.get("batch")
    bundle = str(p["bundle"])
    words = ["fewstep", "grid" if grid else "run", f"./{bundle}" if bundle.startswith("-") else bundle]
    clip = "frames" in (p.get("recorded") or {})
    prompts = batch["prompts"] if batch else [p["prompt"]] if p.get("prompt") is not None else []
    words += ([f"--images={len(prompts)}"] if batch else []) if clip else [f"--prompt={prompt}" for prompt in prompts]
    if p.get("negative") is not None:
        words.append(f"--negative={p['negative']}")
    for key in ("prompt_2", "negative_2"):
        if p.get(key) is not None:
            words.append(f"--{key.replace('_', '-')}={p[key]}")
    words += [f"--lora={name}:{_scales(scale)}" for name, scale in (p.get("loras") or {}).items()]
    for key in ("steps", "sampler", "schedule", "schedule_digest", "guidance", "compat"):
        if p.get(key) is not None:
            listed = isinstance(p[key], (list, tuple))
            words.append(f"--{key.replace('_', '-')}={','.join(map(_digits, p[key])) if listed else p[key]}")
    if batch or p.get("seed") is not None:
        words.append(f"--seed={batch['seed'] if batch else p['seed']}")
    words += [f"--{k.replace('_', '-')}={p[k]}" for k in ("variation_seed", "variation") if p.get(k) is not None]
    if batch:
        words.append("--shared-stream")
    named = {k: v for k, v in (p.get("options") or {}).items() if k in NAMED_OPTIONS}
    others = {k: v for k, v in (p.get("options") or {}).items() if k not in NAMED_OPTIONS}
    words += [f"--option={k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in others.items()]
    for key, value in {**named, **(p.get("recorded") or {})}.items():
        if key == "guess_mode" or key in CONTROL_WORDS:
            option = f"--{key.replace('_', '-')}"
            words += [f"{option}={word}" for word in value] if key in CONTROL_WORDS else [option] * bool(value)
            continue
        joint = "x" if key.endswith("_size") else ","
        shown = joint.join(map(_digits, value)) if isinstance(value, (list, tuple)) else value
        words.append(f"--{key.replace('_', '-')}={shown}")
    words.append(f"--size={p['width']}x{p['height']}")
    if p.get("image"):
        words.append(f"--image={p['image']}")
        words += [f"--strength={p['strength']}"] if p.get("strength") is not None and not clip else []
    words += [f"--then={stage}" for stage in p.get("then") or ()]
    words += _second_pass_words(p.get("hires") or {})
    words += [f"--{'prompt-matrix' if k == 'matrix' else k}={text}" for k, text in grid.items()]
    return [*words, f"--output={output}"]


def _second_pass_words(hires: Mapping[str, Any]) -> list[str]:
    """The options of a second pass; by its size, where it has one."""
    if not hires:
        return []
    size = hires["size"] if hires.get("size") else f"{_digits(hires.get('scale', 2))}x"
    others = (f"--hires-{k}={v}" for k in ("strength", "steps", "upscaler") if (v := hires.get(k)) is not None)
    return [f"--hires={size}", *others]


def _without_axes(p: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a sheet of pictures without what its axes say."""
    grid = p.get("grid") or {}
    axes = {"prompt" if k == "matrix" else text.partition("=")[0] for k, text in grid.items()}
    axes |= {"schedule_digest"} if "schedule" in axes else set()
    recorded = {k: v for k, v in (p.get("recorded") or {}).items() if k not in axes}
    return {**{k: v for k, v in p.items() if k not in axes}, "recorded": recorded}


def _scales(scale: float | Mapping[str, float]) -> str:
    """A LoRA's scale as `--lora` takes it: a number, or by component."""
    if not isinstance(scale, Mapping):
        return _digits(scale)
    return ",".join(f"{component}={_digits(s)}" for component, s in scale.items())


def _digits(number: float) -> str:
    """A number without a needless point, and with all of its digits."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def shell_word(word: str) -> str:
    """A word as a shell takes it; one with control characters as `$'...'`, of which a terminal shows all."""
    if not has_controls(word) and "\n" not in word and "\t" not in word:
        return shlex.quote(word)
    inner = (escape(c) if has_controls(c) or c in "\n\t" else f"\\{c}" if c in "\\'" else c for c in word)
    return f"$'{''.join(inner)}'"
