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
from ...runtime.prompts.lora_tags import MOST_SCALE
from ...runtime.prompts.syntax import SYNTAXES
from ...values import parse_json
from ..options import NAME, OPTIONS, whole
from .control import CONTROL, PromptField
from .errors import HttpError, shown
from .settings import Settings

LARGEST_SEED = 2**63 - 1024
RANDOM = -1
"""As a seed, what others call so: as if it were left out."""
MOST_CLIP_SKIP = 12
LORAS = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=128)], Annotated[float, Meta(ge=-MOST_SCALE, le=MOST_SCALE)]],
    Meta(max_length=8, description="changes of the model's weights for these images, by name, with their scales"),
]
JSON_FIELDS = {"sampler_options": OPTIONS, "loras": LORAS, "control": CONTROL, "ip_adapter": PromptField}
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
    choices: dict[str, tuple[str, ...]]

    def generation_from(self, fields: dict[str, Any]) -> Any:
        """Convert what the body's JSON holds; `HttpError` 400 says where it is not as it should be."""
        try:
            return msgspec.convert(fields, type=self.generation)
        except msgspec.MsgspecError as error:
            raise self._refusal(error) from error

    def edit_from(self, fields: dict[str, Any]) -> Any:
        """Convert a form's fields, which are strings; some are JSON."""
        try:
            for name, kind in JSON_FIELDS.items():
                if isinstance(own := fields.get(name), str):
                    fields = {**fields, name: msgspec.convert(_parsed(own, name, param=name), kind | None)}
            return msgspec.convert(fields, type=self.edit, strict=False)
        except msgspec.MsgspecError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> HttpError:
        """What is wrong and where, without what was sent."""
        text, _, path = str(error).partition(" - at `$.")
        param = path.removesuffix("`") or None
        if "unknown field" in text:
            param = shown(text.rpartition("unknown field `")[2].removesuffix("`"))[1:-1]
            text = "there is no such field"
        elif param in self.choices and text.startswith("Invalid enum value"):
            text = f"expected one of {', '.join(self.choices[param])}"
        return HttpError(400, "invalid_request", f"{param}: {text}"[:300] if param else text[:300], param=param)


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
    return Calls(
        generation=msgspec.defstruct("ImageGeneration", shared, **named),
        edit=msgspec.defstruct("ImageEdit", edit, **named),
        choices={name: options for name, annotation, *_ in edit if (options := _choices(annotation))},
    )


_SHARE = Meta(gt=0.0, le=1.0, description="share of steps to run; default: 0.8, with a mask 1")
_EDIT: list[Any] = [
    ("strength", Annotated[float, _SHARE] | None, None),
    ("mask_kind", Annotated[Literal[MASKS], Meta(description="what of the mask is made anew")] | None, None),
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

    prompt = text(settings.prompt_characters, "what the image shows")
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
        ("deadline_s", number(1.0, settings.deadline_s, "seconds after which it is given up"), None),
    ]


def _choices(annotation: Any) -> tuple[str, ...]:
    """The literals of an annotation that has some, at whatever depth."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := _choices(part))), ())


def arguments(call: Any) -> dict[str, Any]:
    """A call as `Server.submit` takes it."""
    given = {
        "steps": call.num_inference_steps,
        "guidance": call.guidance_scale,
        "negative": call.negative_prompt,
        "sampler": call.sampler,
        "schedule": call.schedule,
        "seed": None if call.seed == RANDOM else call.seed,
        "prompt_syntax": call.prompt_syntax,
        "long_prompts": call.long_prompts,
        "clip_skip": call.clip_skip,
        "options": call.sampler_options,
        "loras": call.loras,
    }
    options = {name: value for name, value in given.items() if value is not None}
    options["images_per_prompt"] = call.n or 1
    if call.size not in (None, "auto"):
        width, _, height = call.size.partition("x")
        options["size"] = int(width), int(height)
    return options
