"""Pictures by engines that are being tried, beside those of the plain ones: same prompts, same seeds, same steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engines import Binding, Engine
from ..errors import FewstepError
from ..runtime import Pipeline
from ..runtime.arrays import Float32, UInt8
from ..runtime.pictures.vae import Vae
from ..runtime.prompts.encoders import TextEncoders
from ..runtime.request import Request
from ..search.sets import Counts, share_prompts
from .settings import QuantizeSettings

AT_ONCE = 4
"""Pictures made together."""
PARTS = ("search", "choose", "held_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Prompts and their seeds, which no other part has."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> Asked:
        return Asked(prompts=self.prompts[:count], seeds=self.seeds[:count])


@dataclass(slots=True, eq=False)
class Trials:
    """A pipeline's pictures with another UNet or decoder.

    pipeline: on NumPy and on ONNX Runtime's CPU provider, whose engines are the plain ones.
    """

    pipeline: Pipeline
    settings: QuantizeSettings
    asked: Mapping[str, Asked] = field(init=False)
    _plain: dict[str, tuple[Float32, UInt8]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        s = self.settings
        counts = Counts(search=s.pairs, choose=s.choose, held_out=s.held_out)
        shared, asked, first = share_prompts(s.prompts, counts, s.seed), {}, s.seed
        for name, prompts in zip(PARTS, shared, strict=True):
            asked[name] = Asked(prompts=tuple(prompts), seeds=tuple(range(first, first + len(prompts))))
            first += len(prompts)
        self.asked = asked

    @property
    def evaluations(self) -> int:
        """Of the UNet, for one picture."""
        return self._request(self.asked["search"].first(1)).program.evaluations

    def latents(self, asked: Asked, unet: Engine, encoders: Mapping[str, Engine] | None = None) -> Float32:
        """What a UNet makes of them, float32 [N, C, h, w]. encoders: text encoders that take the plain ones' place."""
        plain = self.pipeline.text
        if encoders:
            self.pipeline.text = TextEncoders(self.pipeline.bundle, {**self.pipeline.engines, **encoders})
        try:
            return np.concatenate(self._latents(asked, unet))
        finally:
            self.pipeline.text = plain

    def _latents(self, asked: Asked, unet: Engine) -> list[Float32]:
        made = []
        for at in range(0, len(asked), AT_ONCE):
            part = Asked(prompts=asked.prompts[at : at + AT_ONCE], seeds=asked.seeds[at : at + AT_ONCE])
            prepared = self.pipeline.prepare(self._request(part))
            slots = self.pipeline.device.make_slots(unet, prepared.shape, len(part))
            admitted = [slots.admit(*pair) for pair in zip(prepared.samplings, prepared.gaussians, strict=True)]
            for _ in range(prepared.request.program.evaluations):
                slots.tick(admitted)
            latents = np.empty_like(prepared.gaussians)
            for slot, into in zip(admitted, latents, strict=True):
                slots.result(slot, into)
            made.append(latents)
        return made

    def pictures(self, latents: Float32, decoder: Engine) -> UInt8:
        """What a decoder makes of latents, uint8 [N, H, W, 3]."""
        vae = Vae(self.pipeline.bundle, decoder, self._no_encoder)
        parts = [vae.decode_unguarded(latents[i : i + AT_ONCE]) for i in range(0, len(latents), AT_ONCE)]
        return np.concatenate(parts)

    def plain(self, part: str) -> tuple[Float32, UInt8]:
        """The plain engines' latents and pictures of a part, made once."""
        if part not in self._plain:
            latents = self.latents(self.asked[part], self.pipeline.engines["unet"])
            self._plain[part] = latents, self.pictures(latents, self.pipeline.engines["vae_decoder"])
        return self._plain[part]

    def damage(self, part: str, engines: Mapping[str, Engine]) -> Float32:
        """By picture of a part, the mean squared error in levels with these engines instead of the plain ones."""
        plain_latents, plain = self.plain(part)
        encoders = {n: e for n, e in engines.items() if n in self.pipeline.bundle.text_encoders}
        unet, latents = engines.get("unet"), plain_latents
        if unet is not None or encoders:
            latents = self.latents(self.asked[part], unet or self.pipeline.engines["unet"], encoders)
        made = self.pictures(latents, engines.get("vae_decoder", self.pipeline.engines["vae_decoder"]))
        apart = made.astype(np.float32) - plain.astype(np.float32)
        return np.asarray(np.mean(apart**2, axis=(1, 2, 3)))

    def milliseconds(self, engines: Sequence[Engine], times: int = 12) -> list[float]:
        """The median time of one evaluation by each of a component's engines, taken in turns, for one picture."""
        bindings = [self._bound(engine) for engine in engines]
        taken: list[list[float]] = [[] for _ in engines]
        for turn in range(times + 1):
            for binding, into in zip(bindings, taken, strict=True):
                began = time.perf_counter()
                binding.enqueue()
                if turn:
                    into.append(1e3 * (time.perf_counter() - began))
        return [float(np.median(t)) for t in taken]

    @property
    def dims(self) -> dict[str, int]:
        """The sizes of an evaluation for one picture."""
        bundle, (width, height) = self.pipeline.bundle, self.settings.size
        request = self._request(self.asked["search"].first(1))
        rows = 2 if request.guided and not bundle.guidance_embedding else 1
        tokens = bundle.tokenizers[0].length if bundle.tokenizers else 1
        sides = {"height": height // bundle.latent.factor, "width": width // bundle.latent.factor}
        return {"rows": rows, "batch": 1, "prompts": rows, "tokens": tokens, **sides}

    def _bound(self, engine: Engine) -> Binding:
        binding = engine.bind(self.dims)
        rng = np.random.default_rng(0)
        for array in binding.inputs.values():
            if array.dtype.kind == "f":  # tokens are zeros
                array[...] = rng.standard_normal(array.shape, np.float32)
        return binding

    def _request(self, asked: Asked) -> Request:
        return self.pipeline.request(
            list(asked.prompts), seed=list(asked.seeds), size=self.settings.size, **self.settings.calls
        )

    @staticmethod
    def _no_encoder() -> Engine:
        raise FewstepError("pictures are only decoded here")
