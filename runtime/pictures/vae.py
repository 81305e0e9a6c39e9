"""The autoencoder at run time: latents to pixels with guards against broken images, pictures to latents."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from ...bundle import Bundle
from ...engines.base import Binding, Engine
from ...errors import ArgumentError, BlackImageError, NonFiniteError
from ...families.base import vae_samples
from ...families.decoders import FULL, TINY
from ..arrays import Float32, Shape, UInt8
from ..noise.seeds import RequestNoise
from .tiles import Tiling, check_when, run_tiled

MOST_PIXELS = 1024 * 1024
KEPT_BINDINGS = 4
ENCODER = "encoder"


class Vae:
    """Decodes and encodes; the encoder is opened when it is first needed. Thread-safe: one batch at a time each way.

    tiny: a tiny autoencoder's decoder beside the own one, which previews are decoded by, and images that ask for it.

    tiling: whether large pictures go through in tiles; `"auto"` from `AUTO_PIXELS` on. slicing: whether a batch goes
    through one by one; `"auto"` as many at once as make `MOST_PIXELS`. Frames of clips go through whole, as many at
    once as `decode` is told. samples: whether encoding draws noise.
    """

    def __init__(
        self,
        bundle: Bundle,
        decoder: Engine,
        open_encoder: Callable[[], Engine],
        *,
        tiny: Engine | None = None,
        tiling: str | bool = "auto",
        slicing: str | bool = "auto",
    ) -> None:
        self.tiling, self.slicing = check_when("vae_tiling", tiling), check_when("vae_slicing", slicing)
        self._rows, self._clips = str(decoder.inputs["latent"].shape[0]), bool(bundle.latent.frames)
        for name, asked in (("vae_tiling", tiling), ("vae_slicing", slicing)):
            if self._clips and asked is True:
                raise ArgumentError(
                    f"{name} is True for a model that makes clips",
                    expected="frames that are decoded whole",
                    remedy="Ask for fewer at once: decode_chunk=1 (--decode-chunk 1).",
                )
        self._tile = Tiling.of(bundle.component("vae_decoder").config, bundle.latent.factor)
        self._factor = bundle.latent.factor
        self.samples = vae_samples(bundle.component("vae_decoder").config)
        self._engines = {FULL: decoder} | ({} if tiny is None else {TINY: tiny})
        self._open_encoder = open_encoder
        self._bindings: dict[tuple[str, int, int, int], Binding] = {}
        self._decoding, self._encoding, self._binds = threading.Lock(), threading.Lock(), threading.Lock()

    def decode(self, latents: Float32, chunk: int | None = None, decoder: str = FULL) -> UInt8:
        """Latents float32 [B, C, h, w] to images uint8 [B, H, W, 3]; of clips [B, F, C, h, w] to [B, F, H, W, 3].

        chunk: how many frames of a clip the decoder sees together, all of them if `None`. Raises `NonFiniteError` for
        NaN or infinity before the clamp, `BlackImageError` for an image, or a clip, all of zeros.
        """
        images, finite = self._decode(latents, chunk, decoder)
        check_images(images, finite)
        return images

    def decode_unguarded(self, latents: Float32, chunk: int | None = None) -> UInt8:
        """As `decode`, without its guards: whatever comes out is returned."""
        return self._decode(latents, chunk, FULL)[0]

    def preview(self, latents: Float32, chunk: int | None = None) -> UInt8:
        """The same as fast as it goes: by the tiny decoder, where there is one."""
        return self._decode(latents, chunk, TINY if TINY in self._engines else FULL)[0]

    def in_one_pass(self, count: int, height: int, width: int) -> bool:
        """Whether so many latents of this height and width are decoded whole and at once."""
        if self._clips:
            return False
        return count <= self._at_once(count, height, width) and not self._tile.wanted(self.tiling, height, width)

    def _at_once(self, count: int, height: int, width: int) -> int:
        if self.slicing != "auto":
            return 1 if self.slicing else count
        return max(1, MOST_PIXELS // (height * width * self._factor**2))

    def _decode(self, latents: Float32, chunk: int | None, decoder: str) -> tuple[UInt8, np.ndarray]:
        if self._clips:
            clips = [self._decode_clip(clip, chunk or len(clip)) for clip in latents]
            return np.stack([images for images, _ in clips]), np.array([finite for _, finite in clips])
        count, _, height, width = latents.shape
        images = np.empty((count, height * self._factor, width * self._factor, 3), np.uint8)
        finite = np.empty(count, bool)
        each = self._at_once(count, height, width)
        tiled = self._tile.wanted(self.tiling, height, width)
        with self._decoding:
            for at in range(0, count, each):
                decode = self._decode_tiled if tiled else self._decode_whole
                images[at : at + each], finite[at : at + each] = decode(latents[at : at + each], decoder)
        return images, finite

    def _decode_clip(self, latents: Float32, chunk: int) -> tuple[UInt8, bool]:
        """A clip's frames [F, C, h, w], so many together; as diffusers' `decode_latents` decodes a single clip."""
        frames, _, height, width = latents.shape
        images, finite = np.empty((frames, height * self._factor, width * self._factor, 3), np.uint8), True
        with self._decoding:
            for at in range(0, frames, chunk):
                images[at : at + chunk], fine = self._decode_whole(latents[at : at + chunk], FULL)
                finite = finite and bool(fine.all())
        return images, finite

    def _decode_whole(self, latents: Float32, decoder: str) -> tuple[UInt8, np.ndarray]:
        """In one pass; what it gives back holds until the next one."""
        binding = self._binding(decoder, len(latents), *latents.shape[2:])
        np.copyto(binding.inputs["latent"], latents)
        binding.enqueue()
        return binding.outputs["image"], binding.outputs["finite"]

    def _decode_tiled(self, latents: Float32, decoder: str) -> tuple[UInt8, np.ndarray]:
        count, _, height, width = latents.shape
        finite = np.ones(count, bool)

        def run(part: Float32) -> Float32:
            images, ok = self._decode_whole(part, decoder)
            np.logical_and(finite, ok, out=finite)
            return images.transpose(0, 3, 1, 2).astype(np.float32)

        out = np.empty((count, 3, height * self._factor, width * self._factor), np.float32)
        run_tiled(latents, run, tile=self._tile.cells, tile_out=self._tile.pixels, out=out)
        return np.rint(out).astype(np.uint8).transpose(0, 2, 3, 1), finite

    def encode(self, pictures: Float32, noise: RequestNoise, shape: Shape) -> Float32:
        """Pictures float32 [n, 3, H, W] in [-1, 1], one for all or one an image, to latents float32 [B, C, h, w].

        Each image draws its own sample of the latent's distribution, from its own seed and before its starting noise,
        as diffusers does; images that share a stream share the sample. Of a VAE that gives no distribution none is
        drawn.
        """
        channels, height, width = shape
        with self._encoding:
            self._ensure_encoder()
            moments = []
            for picture in pictures:
                if self._tile.wanted(self.tiling, height, width):
                    out = np.empty((2 * channels, height, width), np.float32)
                    run_tiled(picture, self._moments, tile=self._tile.pixels, tile_out=self._tile.cells, out=out)
                else:
                    out = self._moments(picture)
                moments.append((out[:channels], np.exp(out[channels:])))
        each = [moments[i % len(moments)] for i in range(len(noise.members))]
        if not self.samples:
            return np.stack([mean for mean, _ in each])
        draws = noise.draw_for_pictures(len(pictures), shape)
        return np.stack([mean + std * d for (mean, std), d in zip(each, draws, strict=True)])

    def encode_mean(self, picture: Float32) -> Float32:
        """The mean of a picture's latent: [3, H, W] in [-1, 1] to float32 [C, h, w]."""
        with self._encoding:
            self._ensure_encoder()
            binding = self._binding(ENCODER, 1, *(side // self._factor for side in picture.shape[1:]))
            np.copyto(binding.inputs["image"][0], picture)
            binding.enqueue()
            return np.array(binding.outputs["mean"][0])

    def _ensure_encoder(self) -> None:
        if ENCODER not in self._engines:
            self._engines[ENCODER] = self._open_encoder()

    def _moments(self, picture: Float32) -> Float32:
        """Mean and logarithm of the standard deviation, which tiles blend, float32 [2 C, h, w]."""
        binding = self._binding(ENCODER, 1, *(side // self._factor for side in picture.shape[1:]))
        np.copyto(binding.inputs["image"][0], picture)
        binding.enqueue()
        with np.errstate(divide="ignore"):  # a VAE that gives no distribution says 0
            return np.concatenate([binding.outputs["mean"][0], np.log(binding.outputs["std"][0])])

    def _binding(self, which: str, batch: int, height: int, width: int) -> Binding:
        key = (which, batch, height, width)
        with self._binds:
            if key not in self._bindings:
                while len(self._bindings) >= KEPT_BINDINGS:
                    self._bindings.pop(next(iter(self._bindings)))
                rows = "batch" if which == ENCODER else self._rows
                self._bindings[key] = self._engines[which].bind({rows: batch, "height": height, "width": width})
            return self._bindings[key]


def check_images(images: UInt8, finite: np.ndarray) -> None:
    """Raise `NonFiniteError` unless every image was finite before the clamp, `BlackImageError` for one of zeros."""
    if not finite.all():
        raise NonFiniteError(
            f"the VAE gave NaN or infinity for image {int(np.flatnonzero(~finite)[0])}",
            remedy="Export it with --vae-precision float32 or bfloat16.",
        )
    for i, image in enumerate(images):
        if not image.any():
            raise BlackImageError(
                f"image {i} is black throughout", remedy="Export the VAE with --vae-precision float32."
            )
