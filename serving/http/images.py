"""`POST /v1/images/generations` and `/v1/images/edits`: OpenAI's images API on a server's tickets."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from ...errors import ArgumentError, MissingError
from ...runtime.prompts.lora_tags import take_tags
from ...runtime.result import Result, Step
from ..server import Server
from ..ticket import Ticket
from .arguments import arguments, editing_arguments
from .bodies import (
    BodyBudget,
    check_content_type,
    encode_picture,
    open_clear_mask,
    open_picture,
    open_white_mask,
    read_body,
    read_form,
)
from .calls import LISTS, Calls, make_calls, parse_body
from .control import control_arguments, is_controlled
from .errors import HttpError, describe, json_response, no_model, shown
from .service import Service
from .settings import Settings

INLINE_PIXELS = 128 * 128
"""What is encoded on the loop's own thread."""
CUT = "the prompt was longer than the model reads at once and was cut; long_prompts 'chunk' keeps all of it"
MOST_FORMS = 256
"""Forms of requests that are known to have their programs: no more than the programs that are kept."""


class ImageRoutes:
    """The two calls that make images. A client that goes away cancels what it asked for."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self._service, self._settings = service, settings
        self._calls: dict[tuple[tuple[int, int], ...], Calls] = {}
        self._bodies = BodyBudget(settings.bodies_bytes)
        self._decoders = asyncio.Semaphore(settings.decoders)
        # threads of their own: what a thread has let go of may stay with it, and any of many would keep its share
        self._threads = ThreadPoolExecutor(settings.decoders, "fewstep-picture")
        self._forms: OrderedDict[bytes, None] = OrderedDict()

    def _calls_of(self, model: str) -> Calls:
        """What requests of a model may hold; `UnavailableError` while that is not known."""
        sizes = self._service.sizes(model)
        if sizes not in self._calls:
            self._calls[sizes] = make_calls(self._settings, sizes)
        return self._calls[sizes]

    def _asked_model(self, fields: Mapping[str, Any]) -> str:
        """The model that a request names, the first where it names none; `HttpError` 404 for one that is not here."""
        name = fields.get("model")
        if name is None or name in self._settings.models or not isinstance(name, str):
            return self._service.first
        if name not in self._service.others:
            raise no_model((*self._settings.models, *self._service.others))
        return name

    async def generate(self, request: Request) -> Response:
        return await self._run(request, *await self._read_generation(request), "image_generation")

    async def edit(self, request: Request) -> Response:
        return await self._run(request, *await self._read_edit(request), "image_edit")

    async def _read_generation(self, request: Request) -> tuple[Any, Ticket]:
        check_content_type(request, "application/json")
        limit = self._settings.body_bytes if self._service.takes_pictures else self._settings.json_bytes
        with self._bodies.hold(request, limit):
            body = await read_body(request, limit)
            large = len(body) > self._settings.json_bytes
            fields = await asyncio.to_thread(parse_body, body) if large else parse_body(body)
            model = self._asked_model(fields)
            call = self._calls_of(model).generation_from(fields)
            async with self._service.using(model, timeout=self._deadline_s(call)) as server:
                _check_loras(server, call)
                if is_controlled(call):
                    return call, await self._decoded(request, server, call, {})
                return call, await self._accepted(model, request, server, call)

    async def _decoded(self, request: Request, server: Server, call: Any, files: dict[str, list[bytes]]) -> Ticket:
        """As accepted with its pictures, which are decoded a few at a time, where there is room at all."""
        server.check_room()
        async with self._decoders:
            submit = partial(self._with_pictures, request, server, call, files)
            return await asyncio.get_running_loop().run_in_executor(self._threads, submit)

    def _deadline_s(self, call: Any) -> float:
        return float(call.deadline_s or self._settings.deadline_s)

    async def _accepted(self, model: str, request: Request, server: Server, call: Any) -> Ticket:
        """On a thread the first time, for a program that is new takes a while to compile, and where it takes long.

        LoRAs are files, and a second pass is a request more.
        At once for what differs from an earlier one in words and seeds alone: handing it to a thread takes longer.
        """
        words = {"negative": None, "seed": None, "prompt_2": None, "negative_2": None, "variation_seed": None}
        slow = call.loras or call.hires or call.prompt_syntax not in (None, "plain")  # whose tags may name LoRAs
        form = None if slow else msgspec.json.encode({**arguments(call), **words, "model": model})
        if form is not None and form in self._forms:
            self._forms.move_to_end(form)
            return self._submit(request, server, call)
        ticket = await asyncio.to_thread(self._submit, request, server, call)
        if form is not None:
            self._forms[form] = None
            while len(self._forms) > MOST_FORMS:
                self._forms.popitem(last=False)
        return ticket

    async def _read_edit(self, request: Request) -> tuple[Any, Ticket]:
        """What is asked for, with pictures of the size that the model takes; what came is let go of here."""
        if not self._service.others:
            self._service.server.check_room()  # before anything of it is read
        with self._bodies.hold(request, self._settings.body_bytes):
            fields, files = await read_form(request, self._settings.body_bytes, lists=LISTS)
            model = self._asked_model(fields)
            call = self._calls_of(model).edit_from(fields)
            async with self._service.using(model, timeout=self._deadline_s(call)) as server:
                _check_loras(server, call)
                return call, await self._decoded(request, server, call, files)

    def _with_pictures(self, request: Request, server: Server, call: Any, files: dict[str, list[bytes]]) -> Ticket:
        server.check_room()
        most = self._settings.picture_pixels
        pictures = control_arguments(call, files, most)
        if files:
            pictures |= _pictures(files, most, call.mask_kind)
            pictures |= editing_arguments(call)
        return self._submit(request, server, call, **pictures)

    def _submit(self, request: Request, server: Server, call: Any, **more: Any) -> Ticket:
        return server.submit(
            call.prompt,
            deadline_s=self._deadline_s(call),
            previews=bool(call.stream and call.partial_images),
            name=request.scope["state"].get("request_id"),
            owner=_owner(request),
            **arguments(call),
            **more,
        )

    async def _run(self, request: Request, call: Any, ticket: Ticket, kind: str) -> Response:
        trace = request.scope["state"].get("trace")
        if trace is not None:
            trace.stages = ticket.stages
        if call.stream:
            return StreamingResponse(_events(ticket, call, kind), media_type="text/event-stream", headers=_NO_CACHE)
        result = await _or_gone(request, ticket)
        if trace is not None:
            numbers = {k: v for k, v in result.timings.items() if isinstance(v, (int, float))}
            trace.attributes |= {f"fewstep.{stage}_ms": round(ms, 2) for stage, ms in numbers.items()}
        began = time.perf_counter()
        pictures = await _encoded(result, call)
        answer = _answer(result, call, pictures, encode_ms=1e3 * (time.perf_counter() - began))
        return json_response(answer | _warnings(ticket, result))


def _owner(request: Request) -> str | None:
    """Whose request it is, for sharing the room: its key's, or its address's."""
    caller = request.scope["state"].get("caller")
    if caller is not None:
        return f"key {caller.name}"
    return None if request.client is None else request.client.host


def _check_loras(server: Server, call: Any) -> None:
    """Refuse LoRAs, of the field or of the prompt's tags, that the service has not: no request names a file of it."""
    tagged = () if call.prompt_syntax in (None, "plain") else take_tags(call.prompt)[1]
    named = [*((name, "loras") for name in call.loras or {}), *((name, "prompt") for name, _, _ in tagged)]
    for name, field in named:
        try:
            if server.pipeline.loras.folder is None:
                raise MissingError("no folder of LoRAs")
            server.pipeline.loras.find(name)
        except (MissingError, ArgumentError) as error:
            raise HttpError(422, "invalid_combination", f"no LoRA {shown(name)} is here", param=field) from error


def _pictures(files: dict[str, list[bytes]], most_pixels: int, mask_kind: str | None) -> dict[str, Any]:
    """The picture of a form, and its mask, as a call takes them."""
    for name, fewest in (("image", 1), ("mask", 0)):
        if not fewest <= len(files[name]) <= 1:
            raise HttpError(
                400, "invalid_request", f"the form has {len(files[name])} {name}s; one is taken", param=name
            )
    image = open_picture(files["image"][0], most_pixels)
    open_mask = open_white_mask if mask_kind == "white" else open_clear_mask
    masks = [open_mask(data, most_pixels, image.size) for data in files["mask"]]
    return {"image": image, "mask": masks[0] if masks else None}


_NO_CACHE = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def _or_gone(request: Request, ticket: Ticket) -> Result:
    """The ticket's result; when the client disconnects first, the ticket is cancelled and `ClientDisconnect` raised."""
    gone, result = asyncio.ensure_future(_disconnected(request)), ticket.future()
    either: set[asyncio.Future[Any]] = {gone, result}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        gone.cancel()  # nothing waits for its end, which is an answer's time
        result.cancel()
        ticket.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(ticket: Ticket, call: Any, kind: str) -> AsyncIterator[bytes]:
    """Server-sent events as OpenAI names them: previews on the way, then each image; or an error."""
    try:
        index = 0
        partials = call.partial_images or 0
        async for step in ticket.asteps():
            if index < partials and step.index + 1 < step.total and _is_due(step, index, partials):
                event = await asyncio.to_thread(_preview, step, call, kind, index)
                yield _event(event)
                index += 1
        result = await ticket
        pictures = await _encoded(result, call)
        for i, (picture, seed) in enumerate(zip(pictures, result.seeds, strict=True)):
            about = _about(call, result.images.shape[2], result.images.shape[1])
            about |= _warnings(ticket, result)
            yield _event({"type": f"{kind}.completed", "b64_json": picture, "index": i, "seed": seed, **about})
    except Exception as error:
        yield _event({"type": "error", **describe(error)[1]}, name="error")
    finally:
        ticket.cancel()


def _is_due(step: Step, sent: int, partials: int) -> bool:
    """Whether the next of `wanted` previews, spread over the steps, is due."""
    return (step.index + 1) * (partials + 1) >= (sent + 1) * step.total


def _preview(step: Step, call: Any, kind: str, index: int) -> dict[str, Any]:
    pixels = step.preview()
    height, width = pixels.shape[1:3]
    return {
        "type": f"{kind}.partial_image",
        "partial_image_index": index,
        "step": step.index + 1,
        "steps": step.total,
        "b64_json": _encode(pixels[0], call),
        **_about(call, width, height),
    }


def _about(call: Any, width: int, height: int) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "size": f"{width}x{height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": call.output_format or "png",
    }


def _event(data: dict[str, Any], *, name: str | None = None) -> bytes:
    return f"event: {name or data['type']}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def _answer(result: Result, call: Any, pictures: list[str], *, encode_ms: float) -> dict[str, Any]:
    height, width = result.images.shape[1:3]
    timings = {**result.timings, "encode": encode_ms}
    return {
        "created": int(time.time()),
        "data": [{"b64_json": p, "seed": s} for p, s in zip(pictures, result.seeds, strict=True)],
        "size": f"{width}x{height}",
        "output_format": call.output_format or "png",
        "timings_ms": {k: round(v, 2) for k, v in timings.items() if isinstance(v, (int, float))},
    }


def _warnings(ticket: Ticket, result: Result) -> dict[str, list[str]]:
    """What of the request went against the model or had no effect, for its caller; nothing where nothing did."""
    words = [*ticket.warnings, *([CUT] if any(result.truncated) else [])]
    return {"warnings": list(dict.fromkeys(words))} if words else {}


async def _encoded(result: Result, call: Any) -> list[str]:
    """The pictures as base64; small ones at once, for a thread takes longer to be handed them."""
    if result.images[..., 0].size <= INLINE_PIXELS:
        return _encode_all(result, call)
    return await asyncio.to_thread(_encode_all, result, call)


def _encode_all(result: Result, call: Any) -> list[str]:
    return [_encode(image, call) for image in result.images]


def _encode(pixels: Any, call: Any) -> str:
    data = encode_picture(pixels, call.output_format or "png", call.output_compression)
    return base64.b64encode(data).decode()
