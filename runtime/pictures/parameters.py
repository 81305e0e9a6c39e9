"""What a PNG says of how it was made, read without its pixels, and the command that makes it again.

A picture may come from anybody: its texts are read under a cap, by type and range, and what goes into the command is
quoted so that a shell takes each word as one, whatever it holds.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, BinaryIO

from ...errors import CorruptError
from ...schedules.compat.classes import CLASSES, COMMON
from ...schedules.solvers.registry import SAMPLERS
from ...schedules.spacing import SPACINGS
from ...values import Reader, escape, has_controls, parse_json
from ..arguments import LARGEST_SEED
from ..call import CONTROL_WORDS, IMAGE_PROMPT, RECORDED
from ..prompts.lora_tags import MOST_SCALE
from .reading import existing_file

JSON_KEY = "fewstep"
NAMED_OPTIONS = ("eta", "timesteps", "sigmas")
"""Options that a command gives by name; it gives any other as `--option=NAME=VALUE`."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_TEXT = 4 << 20
"""Characters of the text, unpacked."""
CHOICES = {
    "fit": ("stretch", "cover", "contain", "diffusers"),
    "prompt_syntax": ("plain", "a1111"),
    "long_prompts": ("truncate", "chunk"),
}
"""Of recorded arguments that are words of a list."""
MOST_CHUNKS = 100_000
LARGEST_SIDE = 2**24


@cache
def known_options() -> frozenset[str]:
    """The names of every sampler's and schedule's options, and of diffusers' schedulers'."""
    ours = [*(s.options for s in SAMPLERS.values()), *(s.options for s in SPACINGS.values())]
    theirs = [(*c.reads, *c.step_options) for c in CLASSES.values()]
    return frozenset({*NAMED_OPTIONS, "last_sigma", *COMMON}.union(*ours, *theirs))


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters in a PNG that fewstep wrote; `CorruptError` when there are none, or not such ones."""
    file = existing_file(path)
    try:
        with file.open("rb") as stream:
            found = [t for k, data in _text_chunks(stream) if (t := _text(k, data)) is not None]
    except (OSError, struct.error, zlib.error, ValueError) as error:
        raise CorruptError(f"{file.name} cannot be read as a PNG of fewstep ({error})") from error
    if len(found) != 1:
        raise CorruptError(
            f"{file.name} holds {'no' if not found else f'{len(found)} times'} parameters of fewstep",
            expected=f"one text chunk {JSON_KEY!r}",
        )
    data = parse_json(found[0], f"the text {JSON_KEY!r} of {file.name}")
    reading = Reader(place=f"the text {JSON_KEY!r} of {file.name}")
    check_parameters(reading.mapping("parameters", data), reading)
    return dict(data)


def _text_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The kinds and contents of a PNG's text chunks, to its end; all others are passed over."""
    if stream.read(8) != SIGNATURE:
        raise ValueError("it does not begin as one")
    for _ in range(MOST_CHUNKS):
        length, kind = struct.unpack(">I4s", stream.read(8))
        if kind in (b"tEXt", b"zTXt", b"iTXt") and length <= MOST_TEXT:
            data = stream.read(length)
            if struct.unpack(">I", stream.read(4))[0] != zlib.crc32(data, zlib.crc32(kind)):
                raise ValueError("a text chunk is damaged")
            yield kind, data
        else:
            stream.seek(length + 4, os.SEEK_CUR)
        if kind == b"IEND":
            return
    raise ValueError(f"more than {MOST_CHUNKS} chunks")


def _text(kind: bytes, data: bytes) -> str | None:
    """The text of a chunk of ours; `None` for another's."""
    key, _, rest = data.partition(b"\0")
    if key != JSON_KEY.encode():
        return None
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        _, _, rest = rest[2:].partition(b"\0")  # the language
        _, _, rest = rest.partition(b"\0")  # the key, translated
    if packed:
        unpacking = zlib.decompressobj()
        rest = unpacking.decompress(rest, MOST_TEXT)
        if not unpacking.eof:
            raise ValueError(f"a text of more than {MOST_TEXT} bytes, or a damaged one")
    return rest.decode("utf-8" if kind == b"iTXt" else "latin-1")


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
    for key in ("guidance", "strength"):
        if p.get(key) is not None:
            reading.number(key, p[key])
    if p.get("batch") is None:
        reading.integer("seed", p.get("seed"), 0, LARGEST_SEED)
    else:
        batch = reading.mapping("batch", p["batch"])
        reading.integer("the batch's seed", batch.get("seed"), 0, LARGEST_SEED)
        for prompt in reading.array("the batch's prompts", batch.get("prompts"), 1):
            reading.text("a prompt", prompt, least=0, most=MOST_TEXT)
    for name, value in reading.mapping("loras", p.get("loras") or {}).items():
        reading.text("a LoRA's name", name)
        for component, scale in value.items() if isinstance(value, dict) else [("unet", value)]:
            reading.text("a LoRA's component", component)
            reading.number("a LoRA's scale", scale, -MOST_SCALE, MOST_SCALE)
    for name, value in reading.mapping("options", p.get("options") or {}).items():
        reading.choice("an option's name", name, sorted(known_options()))
        _check_option(name, value, reading)
    for name, value in reading.mapping("recorded", p.get("recorded") or {}).items():
        reading.choice(
            "a recorded argument's name", name, (*RECORDED, *CONTROL_WORDS, "guess_mode", "mask", *IMAGE_PROMPT)
        )
        _check_recorded(name, value, reading)


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
    elif name == "clip_skip":
        reading.integer(name, value, 0, 64)
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
    batch = p.get("batch")
    bundle = str(p["bundle"])
    words = ["fewstep", "run", f"./{bundle}" if bundle.startswith("-") else bundle]
    words += [f"--prompt={prompt}" for prompt in (batch["prompts"] if batch else [p["prompt"]])]
    if p.get("negative") is not None:
        words.append(f"--negative={p['negative']}")
    for key in ("prompt_2", "negative_2"):
        if p.get(key) is not None:
            words.append(f"--{key.replace('_', '-')}={p[key]}")
    words += [f"--lora={name}:{_scales(scale)}" for name, scale in (p.get("loras") or {}).items()]
    for key in ("steps", "sampler", "schedule", "guidance", "compat"):
        if p.get(key) is not None:
            words.append(f"--{key}={p[key]}")
    words.append(f"--seed={batch['seed'] if batch else p.get('seed')}")
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
        words += [f"--strength={p['strength']}"] if p.get("strength") is not None else []
    return " ".join(map(shell_word, [*words, f"--output={output}"]))


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
