"""What an HTTP service allows: who may call it, and how much of everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import ArgumentError
from .callers import LEAST_CHARACTERS, Callers, Key
from .origins import check_origin_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """model, aliases: names that requests may give as `model`. token: what callers must present, if anything, or one
    of the keys, by their callers' names. origins: of pages that may call (`*`: all), beside the service's own.

    hosts: values of the `Host` header that are answered (without their port), all when empty: a service on loopback
    names its own, so that no web page can reach it through a name of its making. Limits: body_bytes of a request and
    bodies_bytes of all that are read or wait to be decoded, decoders that decode pictures at once, picture_pixels of an
    upload before it is decoded, prompt_characters, images and steps of a request, previews of a stream. deadline_s:
    after which a request is given up. drain_s: how long SIGTERM waits for requests in progress.
    """

    model: str
    aliases: tuple[str, ...] = ()
    token: str | None = None
    keys: Mapping[str, Key] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes: int = 16 * 1024 * 1024
    bodies_bytes: int = 64 * 1024 * 1024
    decoders: int = 2
    json_bytes: int = 256 * 1024
    picture_pixels: int = 4096 * 4096
    prompt_characters: int = 4000
    images: int = 8
    steps: int = 100
    previews: int = 16
    deadline_s: float = 120.0
    drain_s: float = 30.0
    callers: Callers = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < LEAST_CHARACTERS:
            raise ArgumentError(f"the token has {len(self.token)} characters", expected=f"at least {LEAST_CHARACTERS}")
        object.__setattr__(self, "origins", tuple(check_origin_name(o) for o in self.origins))
        object.__setattr__(self, "callers", Callers(self.token, dict(self.keys)))

    def uploads_bytes(self, images: int, size: tuple[int, int], *, beside: int = 0) -> int:
        """The most memory that bodies, decoding, and the pictures of so many waiting images of this size take together.

        beside: pictures of an image that it does not start from, for controls and as prompts, of each of two passes.

        Decoding takes a picture as it is stored, a turned copy, and one in RGB: 4 bytes a pixel each at most, and half
        of that again while it is resized. An image waits in float32, with a mask.
        """
        decoding = self.decoders * self.picture_pixels * 18
        return self.bodies_bytes + decoding + images * size[0] * size[1] * (4 + 2 * 3 * beside) * 4

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, *self.aliases)
