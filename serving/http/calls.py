"""What a request may hold: types made from the settings, from which checking and the OpenAPI document both follow.

OpenAI's fields come first, then ours. Of OpenAI's, `quality`, `style`, `background`, `moderation` and `user` say
nothing to this model: values that ask for no more than the default are taken and change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from ...errors import CorruptError
from ...families.decoders import DECODERS
from ...runtime.arguments import LARGEST_LEVEL
from ...runtime.pictures.upscale import UPSCALERS
from ...runtime.prompts.lora_tags import MOST_SCALE
from ...runtime.prompts.syntax import SYNTAXES
from ...runtime.request import LARGEST_SIDE
from ...runtime.second_pass import MOST_SCALE as MOST_ENLARGED
from ...values import parse_json
from ..options import NAME, OPTIONS, whole
from .arguments import RANDOM
from .control import CONTROL, PromptField
from .errors import HttpError, shown
from .settings import Settings

LARGEST_SEED = 2**63 - 1024
MOST_CLIP_SKIP = 12
LORAS = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=128)], Annotated[float, Meta(ge=-MOST_SCALE, le=MOST_SCALE)]],
    Meta(max_length=8, description="changes of the model's weights for these images, by name, with their scales"),
]
PAIR = tuple[Annotated[int, Meta(ge=0, le=LARGEST_SIDE)], Annotated[int, Meta(ge=0, le=LARGEST_SIDE)]]
SIZE, CORNER = (
    Annotated[PAIR, Meta(description=f"[{p}], for a UNet that is told")] for p in ("width, height", "top, left")
)
SEED_DEVICE = Annotated[str, Meta(max_length=64, description="whose noise: cpu, cuda, or cuda:THREADS of a GPU")]
LISTS = (
    *("timesteps", "sigmas", "original_size", "crop_top_left", "target_size"),
    *("negative_original_size", "negative_crop_top_left", "negative_target_size"),
)
"""Fields that a form has as JSON, or once an entry, as OpenAPI has it."""
JSON_FIELDS = ("sampler_options", "loras", "control", "ip_adapter", "hires", *LISTS)
"""Fields that are JSON in a form."""
FORMATS = Literal["png", "jpeg", "webp"]
FITS = ("stretch", "cover", "contain")
MASKS = ("clear", "white")
"""What of a mask is made anew: what is fully transparent, as OpenAI has it, or what is white, as most others do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """The types of the two calls that make images, and the values of those fields that have few."""

    generation: Any
    edit: Any
    json_fields: dict[str, Any]
    choices: dict[str, tuple[str, ...]]

    def generation_from(self, fields: dict[str, Any]) -> Any:
        """Convert what the body's JSON holds; `HttpError` 400 says where it is not as it should be."""
        try:
            return msgspec.convert(fields, type=self.generation)
        except msgspec.MsgspecError as error:
            raise self._refusal(error) from error

    def edit_from(self, fields: dict[str, Any]) -> Any:
        """Convert a form's fields, which are strings; some are JSON."""
        for name, kind in self.json_fields.items():
            if (own := fields.get(name)) is not None:
                try:
                    fields = {**fields, name: _of_text(own, name, kind)}
                except msgspec.MsgspecError as error:
                    raise self._refusal(error, name) from error
        try:
            return msgspec.convert(fields, type=self.edit, strict=False)
        except msgspec.MsgspecError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception, field: str = "") -> HttpError:
        """What is wrong and where, of a body or of a field that is JSON, without what was sent."""
        text, _, path = str(error).partition(" - at `$")
        param = f"{field}{path.removesuffix('`')}".removeprefix(".")
        if "unknown field" in text:
            name = shown(text.rpartition("unknown field `")[2].removesuffix("`"))[1:-1]
            param, text = f"{param}.{name}".removeprefix("."), "there is no such field"
        elif param in self.choices and text.startswith("Invalid enum value"):
            text = f"expected one of {', '.join(self.choices[param])}"
        message = f"{param}: {text}" if param else text
        return HttpError(400, "invalid_request", message[:300], param=param or None)


def _of_text(text: str | list[str], name: str, kind: Any) -> Any:
    """A form's field that is JSON, or the texts of a list's entries."""
    if isinstance(text, list):
        return msgspec.convert(text, kind, strict=False)
    value = _parsed(text, name, param=name)
    return msgspec.convert([value] if name in LISTS and isinstance(value, (int, float)) else value, kind)


def parse_body(body: bytes) -> dict[str, Any]:
    """The fields of a body in JSON; `HttpError` 400 for anything else."""
    fields = _parsed(body, "the body")
    if not isinstance(fields, dict):
        raise HttpError(400, "invalid_request", "the body is no object in JSON")
    return fields


def _parsed(text: str | bytes, place: str, *, param: str | None = None) -> Any:
    """JSON of a request, whose objects have each key once; `HttpError` 400 for anything else."""
    try:
        return whole(parse_json(text, place, finite=True))
    except CorruptError as error:
        raise HttpError(400, "invalid_request", error.found[:300], param=param) from error


def make_calls(settings: Settings, sizes: Sequence[tuple[int, int]]) -> Calls:
    """The call types for a server of these sizes (width, height in pixels)."""
    shared = _fields(settings, [f"{w}x{h}" for w, h in sizes])
    named: dict[str, Any] = {"kw_only": True, "forbid_unknown_fields": True, "module": __name__}
    edit = [*shared, *_EDIT]
    choices = {name: options for name, annotation, *_ in edit if (options := _choices(annotation))}
    return Calls(
        generation=msgspec.defstruct("ImageGeneration", shared, **named),
        edit=msgspec.defstruct("ImageEdit", edit, **named),
        json_fields={name: annotation for name, annotation, *_ in edit if name in JSON_FIELDS},
        choices=choices | {"hires.size": choices["size"][1:], "hires.upscaler": UPSCALERS, "mask_threshold": _GREYS},
    )


_SHARE = Meta(gt=0.0, le=1.0, description="share of steps to run; default: 0.8, with a mask 1")
_GREYS = ("a number from 0 to 1", "none")
_GREY = Annotated[float, Meta(ge=0.0, le=1.0, description="grey from which on a mask is white; default: 0.5")]
_EDIT: list[Any] = [
    ("strength", Annotated[float, _SHARE] | None, None),
    ("mask_kind", Annotated[Literal[MASKS], Meta(description="what of the mask is made anew")] | None, None),
    ("mask_threshold", _GREY | Literal["none"] | None, None),
    ("noise_level", Annotated[int, Meta(ge=0, le=999, description="in a picture that is made larger")] | None, None),
    ("fit", Annotated[Literal[FITS], Meta(description="of a picture of another size")] | None, None),
    ("input_fidelity", Literal["low"] | None, None),
]


def _fields(settings: Settings, sizes: list[str]) -> list[Any]:
    def text(limit: int, words: str) -> Any:
        return Annotated[str, Meta(max_length=limit, description=words)]

    def integer(low: int, high: int, words: str) -> Any:
        return Annotated[int, Meta(ge=low, le=high, description=words)] | None

    def number(low: float, high: float, words: str) -> Any:
        return Annotated[float, Meta(ge=low, le=high, description=words)] | None

    def numbers(least: int, most: int, words: str) -> Any:
        level = Annotated[float, Meta(ge=0.0, le=LARGEST_LEVEL)]
        return Annotated[list[level], Meta(min_length=least, max_length=most, description=words)] | None

    prompt = text(settings.prompt_characters, "what the image shows")
    hires: list[Any] = [
        ("scale", number(1.0, MOST_ENLARGED, "times the first pass's width and height; default: 2"), None),
        ("size", Literal[tuple(sizes)] | None, None),
        ("strength", number(0.0, 1.0, "how much is denoised anew; default: 0.5"), None),
        ("steps", integer(1, settings.steps, "of its schedule; default: the first pass's"), None),
        ("upscaler", Literal[UPSCALERS] | None, None),
    ]
    second = msgspec.defstruct("SecondPass", hires, kw_only=True, forbid_unknown_fields=True, module=__name__)
    return [
        ("prompt", prompt),
        ("model", NAME | None, None),
        ("n", integer(1, settings.images, "number of images; their seeds are successive"), None),
        ("size", Literal[("auto", *sizes)] | None, None),
        ("response_format", Literal["b64_json"] | None, None),
        ("output_format", FORMATS | None, None),
        ("output_compression", integer(0, 100, "quality of JPEG and WebP"), None),
        ("stream", bool | None, None),
        ("partial_images", integer(0, settings.previews, "previews in a stream"), None),
        ("quality", Literal["auto", "standard", "low", "medium", "high", "hd"] | None, None),
        ("style", Literal["vivid", "natural"] | None, None),
        ("background", Literal["auto", "opaque"] | None, None),
        ("moderation", Literal["auto", "low"] | None, None),
        ("user", Annotated[str, Meta(max_length=256)] | None, None),
        ("seed", integer(RANDOM, LARGEST_SEED, "of the first image; random when left out, or -1"), None),
        ("num_inference_steps", integer(1, settings.steps, "default: the model's"), None),
        ("guidance_scale", number(0.0, 50.0, "classifier-free guidance; 1 or less: none"), None),
        ("negative_prompt", text(settings.prompt_characters, "what it should not show") | None, None),
        ("prompt_syntax", Literal[SYNTAXES] | None, None),
        ("long_prompts", Literal["truncate", "chunk"] | None, None),
        ("clip_skip", integer(0, MOST_CLIP_SKIP, "layers of the text encoders to leave out"), None),
        ("sampler", NAME | None, None),
        ("schedule", NAME | None, None),
        ("sampler_options", OPTIONS | None, None),
        ("loras", LORAS | None, None),
        ("control", CONTROL | None, None),
        ("guess_mode", bool | None, None),
        ("ip_adapter", PromptField | None, None),
        ("prompt_2", text(settings.prompt_characters, "what a second text encoder reads instead") | None, None),
        ("negative_prompt_2", text(settings.prompt_characters, "and what it should not show") | None, None),
        ("schedule_digest", Annotated[str, Meta(max_length=64)] | None, None),
        ("timesteps", numbers(1, settings.steps, "explicit ones, instead of steps and schedule"), None),
        ("sigmas", numbers(2, settings.steps + 1, "the same, as noise levels"), None),
        ("compat", Literal["diffusers"] | None, None),
        ("decoder", Literal[tuple(DECODERS)] | None, None),
        ("seed_device", SEED_DEVICE | None, None),
        ("shared_stream", bool | None, None),
        ("variation_seed", integer(RANDOM, LARGEST_SEED, "whose noise the seed's is turned towards"), None),
        ("variation", number(0.0, 1.0, "how far it is turned; default: 0"), None),
        ("original_size", SIZE | None, None),
        ("crop_top_left", CORNER | None, None),
        ("target_size", SIZE | None, None),
        ("negative_original_size", SIZE | None, None),
        ("negative_crop_top_left", CORNER | None, None),
        ("negative_target_size", SIZE | None, None),
        ("hires", Annotated[second, Meta(description="a second pass at a higher resolution")] | None, None),
        ("deadline_s", number(1.0, settings.deadline_s, "seconds after which it is given up"), None),
    ]


def _choices(annotation: Any) -> tuple[str, ...]:
    """The literals of an annotation that has some, at whatever depth."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := _choices(part))), ())
