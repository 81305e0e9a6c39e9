"""What a family of checkpoints says of itself, and the families by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UnknownNameError
from .conditions import Condition as Condition
from .conditions import Config as Config
from .control import control_conditions
from .image_prompt import IMAGE_ENCODER, image_prompt_conditions

Float32 = npt.NDArray[np.float32]
Pair = tuple[int, int]

UNET_KEYS = ("block_out_channels", "cross_attention_dim", "in_channels", "out_channels")
VAE_KEYS = ("block_out_channels", "latent_channels", "in_channels", "out_channels")
TINY_KEYS = ("encoder_block_out_channels", "decoder_block_out_channels", "latent_channels", "in_channels")
LATENT_STATISTICS = ("latents_mean", "latents_std")
VAE_SCALING = 0.18215
"""What a VAE's latents are multiplied by where its configuration does not say."""
SIZED_UP_BLOCKS = frozenset(
    f"{kind}{of}" for kind in ("UpBlock", "CrossAttnUpBlock") for of in ("2D", "SpatioTemporal")
)
"""Blocks that interpolate to a given size (`upsample_size` in the forward of diffusers' UNets)."""
TEXT_KEYS = ("hidden_size", "max_position_embeddings", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyPart:
    """A part of a checkpoint: the classes that it may be of, each with the keys that its configuration must state."""

    classes: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """A text encoder, by the name of its part and of its component.

    layer: which hidden states the UNet attends to: 0 the last through the final norm, n > 0 the n-th last as it is.
    prefixes: what its tensors' names begin with in single files. lora: what its modules' names begin with in LoRAs of
    kohya's trainer. one_pass: whether longer texts are cut, since states of several passes are none of its own.
    """

    name: str
    tokenizer: str
    part: FamilyPart
    layer: int = 0
    prefixes: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    one_pass: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of checkpoint whose parts fit together in one way; subclasses say what is different.

    name: in manifests; title: for people. pipelines: diffusers' classes in `model_index.json`, the first the plain one.
    respacing: those of them that space the steps from a picture anew by its strength, the one for text first; the
    others leave out the first steps.
    unet, vae: their classes and keys; without a VAE it samples pixels. unet_options: keys of the UNet's configuration
    that other families have not. addition_types: values of the UNet's `addition_embed_type` that its pipelines feed.
    learned_variance: whether its UNets may say their variance, in as many channels again. pictures: what a request's
    picture is: what sampling starts from (`"start"`), what the UNet is told of (`"told"`), noised to `noise_level`, or
    nothing (`"none"`). vae_statistics: whether its pipelines normalise latents by `latents_mean` and `latents_std` of
    the VAE's configuration.
    clips: whether its UNets make the frames of a clip together. image_encoder: what encodes the picture that a clip
    begins with, for the UNet to attend to.
    text_width: of the vectors that published UNets of it attend to, to tell files of several families apart.
    schedule: the published Align Your Steps table for it. steps, guidance, force_zeros: what a checkpoint that says
    nothing gets. size_arguments: those of a call that say sizes and corners, with the least and largest number in each.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    respacing: tuple[str, ...] = ()
    text_encoders: tuple[TextEncoder, ...] = ()
    clips: bool = False
    image_encoder: FamilyPart | None = None
    unet: FamilyPart = FamilyPart(classes={"UNet2DConditionModel": UNET_KEYS})
    vae: FamilyPart | None = FamilyPart(classes={"AutoencoderKL": VAE_KEYS, "AutoencoderTiny": TINY_KEYS})
    unet_options: tuple[str, ...] = ()
    addition_types: tuple[str, ...] = ()
    learned_variance: bool = False
    pictures: Literal["start", "told", "none"] = "start"
    noise_level: int | None = None
    vae_statistics: bool = False
    text_width: int | None = None
    schedule: str = "ays"
    steps: int = 25
    guidance: float = 7.5
    force_zeros: bool = False
    size_arguments: Mapping[str, Pair] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, FamilyPart]:
        """Its parts in a diffusers folder, by name."""
        vae = {} if self.vae is None else {"vae": self.vae}
        pictured = {} if self.image_encoder is None else {IMAGE_ENCODER: self.image_encoder}
        return {"unet": self.unet, **vae, **{e.name: e.part for e in self.text_encoders}, **pictured}

    @property
    def components(self) -> tuple[str, ...]:
        """What a bundle of it holds, in the order of an export."""
        encoder = () if self.vae is None else ("vae_encoder",)
        pictured = () if self.image_encoder is None else (IMAGE_ENCODER,)
        return (*(e.name for e in self.text_encoders), *pictured, "unet", "vae_decoder", *encoder)

    def encoder(self, name: str) -> TextEncoder:
        return next(e for e in self.text_encoders if e.name == name)

    def recognises(self, configs: Mapping[str, Config]) -> bool:
        """Whether a checkpoint of one of its pipelines, with these configurations by part, is one of its own."""
        return True

    def refusal(self, index: Mapping[str, Any]) -> str | None:
        """What a checkpoint of one of its pipelines is that lacks a part, where that is known."""
        return None

    def part_refusal(self, name: str, config: Config) -> str | None:
        """What a part of this configuration asks of its pipelines that is not done, where that is known."""
        return None

    def loaded_scheduler(self, pipeline: str, config: Config) -> dict[str, Any]:
        """A scheduler's configuration as diffusers' pipeline of that name leaves it once it is made.

        `_use_default_values` then names the keys that the checkpoint did not state: another scheduler class that is
        made from this configuration takes its own defaults for them, as diffusers' `from_config` does.
        """
        return dict(config)

    def loaded_unet(self, pipeline: str, config: Config) -> dict[str, Any]:
        """A UNet's configuration as diffusers' pipeline of that name leaves it."""
        return dict(config)

    def loaded_text(self, config: Config) -> dict[str, Any]:
        """A text encoder's configuration with what its graph and the runtime read under CLIP's names."""
        return dict(config)

    def loaded_vae(self, config: Config) -> dict[str, Any]:
        """A VAE's configuration with only that normalisation of latents which the family's pipelines do.

        They multiply by `scaling_factor` and know no `shift_factor`; mean and standard deviation count together.
        """
        kept = {k: v for k, v in config.items() if k not in ("shift_factor", *LATENT_STATISTICS)}
        stated = {k: config.get(k) for k in LATENT_STATISTICS}
        return {**kept, **stated} if self.vae_statistics and None not in stated.values() else kept

    def latents_to_keep(self, latents: Float32, vae: Config) -> Float32:
        """A picture's latents [B, C, h, w] as its pipelines take them for inpainting, from those of its VAE's graph.

        They are scaled alone there, z scaling_factor, and not normalised by mean and standard deviation; decoding is as
        everywhere (`_encode_vae_image` of diffusers' inpainting).
        """
        if any(vae.get(k) is None for k in LATENT_STATISTICS):
            return latents
        mean, std = (np.asarray(vae[k], np.float32)[:, None, None] for k in LATENT_STATISTICS)
        return latents * std + mean * np.float32(vae.get("scaling_factor", VAE_SCALING))

    def conditions(self, unet: Config) -> tuple[Condition, ...]:
        """What a UNet of this configuration is told besides latent and timestep."""
        width = unet["cross_attention_dim"]
        hidden = Condition(
            name="encoder_hidden_states",
            shape=("tokens", width if isinstance(width, int) else width[0]),
            argument="prompt_embeds",
        )
        own = (hidden, *self.more_conditions(unet), *_guidance_condition(unet))
        return (*own, *control_conditions(unet), *image_prompt_conditions(unet))

    def more_conditions(self, unet: Config) -> tuple[Condition, ...]:
        """What its UNets are told besides the prompt's hidden states."""
        return ()

    def join(self, outputs: Sequence[Mapping[str, Float32]]) -> dict[str, Float32]:
        """The text encoders' outputs (`hidden` [P, L, D], `pooled` [P, D]) as inputs of the UNet: joined by feature."""
        return {"encoder_hidden_states": np.concatenate([o["hidden"] for o in outputs], axis=-1)}

    def sizes(
        self, width: int, height: int, asked: Mapping[str, Pair | None]
    ) -> tuple[dict[str, Float32], dict[str, Float32]]:
        """What the UNet is told of sizes in the prompt's row and in the negative's, for a picture of so many pixels.

        asked: `size_arguments` as the call has them, sizes (width, height) and corners (top, left).
        """
        return {}, {}

    def latent_channels(self, unet: Config) -> int:
        """Channels of what a UNet of this configuration takes noise out of."""
        return int(unet["in_channels"])

    def says_variance(self, unet: Config) -> bool:
        """Whether a UNet of this configuration says its variance too."""
        return self.learned_variance and unet.get("out_channels") == 2 * self.latent_channels(unet)

    def clean(self, text: str) -> str:
        """A prompt's text as its tokenizers read it."""
        return text

    def tell_picture(
        self, unet: Config, picture: Float32, noise: Float32, level: int, alpha_bar: float
    ) -> dict[str, Float32]:
        """What the UNet is told of a picture, float32 [3, H, W] in [-1, 1] at the size of the request, in both rows.

        noise: unit noise of its shape. level, alpha_bar: how much of it, as a timestep and as what is left of signal.
        """
        return {}

    def clip_conditions(
        self, hidden: Mapping[str, Float32], latents: Float32, numbers: Mapping[str, float], vae: Config
    ) -> tuple[dict[str, Float32], dict[str, Float32]]:
        """What the UNet is told of a clip in the row of its picture and in the row that guidance leads away from.

        hidden: what `join` made of the image encoder's output. latents: of the picture, float32 [C, h, w] from its
        VAE's graph. numbers: `fps`, `motion_bucket` and `noise_augmentation`.
        """
        return {}, {}

    def frames(self, unet: Config) -> int:
        """How many frames a clip has at most, and by default; 0 where pictures are made."""
        return int(unet["num_frames"]) if self.clips else 0

    def sample_shape(self, unet: Config) -> tuple[int | str, ...]:
        """The shape of the UNet's `sample` and `out`."""
        frames = ("frames",) if self.clips else ()
        return ("rows", *frames, self.latent_channels(unet), "height", "width")

    @property
    def decoder_rows(self) -> str:
        """The decoder's first dimension: pictures, or the frames of one clip that are decoded together."""
        return "chunk" if self.clips else "batch"

    def default_size(self, unet: Config, factor: int) -> tuple[int, int]:
        """(width, height) in pixels of a request that says none; factor: pixels per latent cell."""
        size = unet.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return width * factor, height * factor

    def geometry(self, unet: Config, vae: Config) -> tuple[int, int, int]:
        """The latent's channels, its pixels per cell, and the multiple that the UNet asks of its height and width."""
        return int(vae["latent_channels"]), vae_factor(vae), latent_multiple(unet)


GUIDANCE_INPUT = "timestep_cond"


def _guidance_condition(unet: Config) -> tuple[Condition, ...]:
    """UNets distilled with guidance take its embedding instead of a second row."""
    width = unet.get("time_cond_proj_dim")
    return (Condition(name=GUIDANCE_INPUT, shape=(int(width),)),) if width else ()


def guidance_embedding(guidance: float, width: int) -> Float32:
    """The sinusoidal embedding of guidance - 1, float32 [width] (Luo et al. 2023, arXiv 2310.04378)."""
    half = width // 2
    rates = np.exp(-math.log(10_000.0) / (half - 1) * np.arange(half))
    angles = (guidance - 1.0) * 1000.0 * rates  # w_k = 1000 (g - 1) / 10000^(k / (half - 1))
    vector = np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)
    return np.pad(vector, (0, width - len(vector)))


def halvings(unet: Config) -> int:
    """How often a UNet of this configuration halves height and width on the way down."""
    return len(unet["block_out_channels"]) - 1


def latent_multiple(unet: Config) -> int:
    """What a latent's height and width must be multiples of for a UNet of this configuration.

    1 where diffusers tells every upsampler the size of the skip connection that its output meets; other kinds of blocks
    double, which meets it only where no level's size is odd.
    """
    told = SIZED_UP_BLOCKS.issuperset(unet.get("up_block_types") or ())
    return 1 if told else 1 << halvings(unet)


def vae_factor(vae: Config) -> int:
    """Pixels per latent cell: each block but the last halves."""
    blocks = vae.get("encoder_block_out_channels") or vae["block_out_channels"]
    return 1 << (len(blocks) - 1)


def vae_samples(vae: Config) -> bool:
    """Whether a VAE encodes to a distribution, from which a latent is drawn: tiny autoencoders give the latent."""
    return "encoder_block_out_channels" not in vae


_families: dict[str, Family] = {}


def register_family(family: Family) -> None:
    _families[family.name] = family


def unregister_family(name: str) -> None:
    del _families[name]


def all_families() -> tuple[Family, ...]:
    return tuple(_families.values())


def find_family(name: str) -> Family:
    """The family of a name; `UnknownNameError` for another."""
    if name not in _families:
        raise UnknownNameError("family", str(name), _families)
    return _families[name]


def known_models() -> str:
    """The families in words, for an error's `expected`."""
    *others, last = [f.title for f in all_families()]
    return f"a model of {', '.join(others)} or {last}"
