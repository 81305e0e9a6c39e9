"""A family is a file: one that fewstep has never heard of is added here, exported, gated, run, served, taken away."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fewstep
import numpy as np
import pytest
import torch
from checkpoints import BETAS, _text, _unet, _vae, tokenizer
from diffusers import EulerDiscreteScheduler
from fewstep.bundle import Bundle
from fewstep.errors import ArgumentError, CorruptError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.export.checkpoint.folder import open_checkpoint
from fewstep.export.gate.reference import make_reference
from fewstep.families.base import (
    TEXT_KEYS,
    Condition,
    Config,
    Family,
    FamilyPart,
    Float32,
    TextEncoder,
    register_family,
    unregister_family,
)

POOLED = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy(Family):
    """One projected text encoder, whose pooled vector the UNet takes as its class, and which attends to layer 1."""

    def more_conditions(self, unet: Config) -> tuple[Condition, ...]:
        return (Condition(name="class_labels", shape=(POOLED,), argument="pooled_prompt_embeds"),)

    def join(self, outputs: Sequence[Mapping[str, Float32]]) -> dict[str, Float32]:
        return {**Family.join(self, outputs), "class_labels": outputs[0]["pooled"]}


ENCODER = TextEncoder(
    name="text_encoder",
    tokenizer="tokenizer",
    part=FamilyPart(classes={"CLIPTextModelWithProjection": (*TEXT_KEYS, "projection_dim")}),
    layer=2,
)
TOY = Toy(
    name="toy",
    title="Toy",
    pipelines=("ToyPipeline",),
    text_encoders=(ENCODER,),
    unet_options=("class_embed_type",),
    steps=7,
    guidance=3.0,
)


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    register_family(TOY)
    yield
    unregister_family(TOY.name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    vocab = tokenizer(tmp_path_factory.mktemp("toy-tok") / "tokenizer")
    return {
        "tokenizer": vocab,
        "text_encoder": _text(31, vocab, projected=True),
        "unet": _unet(32, class_embed_type="projection", projection_class_embeddings_input_dim=POOLED),
        "vae": _vae(33),
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    }


@pytest.fixture(scope="module")
def checkpoint(models: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "model"
    index: dict[str, object] = {"_class_name": "ToyPipeline", "_diffusers_version": "0.42.0"}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        library = "transformers" if name in {"tokenizer", "text_encoder"} else "diffusers"
        index[name] = [library, type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    """Gated like any other; its reference is made here, because a process of its own would not know the family."""
    make_reference(open_checkpoint(checkpoint), checkpoint.parent / "reference.safetensors", dtypes={})
    return export_bundle(
        checkpoint, checkpoint.parent / "bundle", reference=checkpoint.parent / "reference.safetensors"
    )


@torch.no_grad()
def by_diffusers(models: dict, prompt: str, negative: str, seed: int, steps: int, guidance: float) -> np.ndarray:
    """The picture by the libraries' own modules, in a loop written out here; uint8 [H, W, 3]."""

    def encode(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = models["tokenizer"](text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        out = models["text_encoder"](ids.input_ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds

    (c, c_pooled), (u, u_pooled) = encode(prompt), encode(negative)
    scheduler = EulerDiscreteScheduler.from_config(models["scheduler"].config)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        outs = [models["unet"](given, t, h, class_labels=p).sample for h, p in ((u, u_pooled), (c, c_pooled))]
        x = scheduler.step(outs[0] + guidance * (outs[1] - outs[0]), t, x).prev_sample
    pixels = models["vae"].decode(x / models["vae"].config.scaling_factor).sample
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)[0].numpy().astype(np.uint8)


def test_its_pictures_are_the_libraries(models: dict, bundle: Bundle) -> None:
    assert (bundle.family, bundle.defaults.steps, bundle.defaults.guidance) == ("toy", 7, 3.0)
    assert {c["status"] for c in bundle.gate["components"].values()} == {"passed"}
    assert bundle.gate["status"] == "passed in part"
    assert all("no attribute ToyPipeline" in p["status"] for p in bundle.gate["pictures"].values())
    expected = by_diffusers(models, "a red circle", "", seed=3, steps=7, guidance=3.0)
    for options in ({"device": "cpu"}, {"device": "cpu:torch"}):
        pipe = fewstep.load(bundle, backend="ort-cpu", **options)
        image = pipe("a red circle", seed=3).images[0]
        assert np.abs(image.astype(int) - expected).max() <= 1
    with fewstep.Server(pipe, most_slots=2, most_rows=4) as server:
        served = server.generate("a red circle", seed=3).images[0]
    assert np.abs(served.astype(int) - expected).max() <= 1


def test_what_it_is_told_is_checked_by_its_own_words(bundle: Bundle) -> None:
    pipe = fewstep.load(bundle, backend="ort-cpu")
    hidden, pooled = np.zeros((1, 77, 32), np.float32), np.ones((1, POOLED), np.float32)
    told = pipe(prompt_embeds=hidden, pooled_prompt_embeds=pooled, steps=1, seed=0, guidance=1.0)
    other = pipe(prompt_embeds=hidden, pooled_prompt_embeds=0 * pooled, steps=1, seed=0, guidance=1.0)
    assert np.abs(told.latents - other.latents).max() > 1e-3, "the class has no effect"
    with pytest.raises(ArgumentError, match="prompt_embeds without pooled_prompt_embeds"):
        pipe(prompt_embeds=hidden)
    with pytest.raises(ArgumentError, match="told no sizes"):
        pipe("x", original_size=(64, 64))
    with pytest.raises(ArgumentError, match="prompt_2 for a model with one text encoder"):
        pipe("x", prompt_2="y")


def test_without_its_file_it_is_nobodys(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    unregister_family(TOY.name)
    try:
        with pytest.raises(UnsupportedError, match="the checkpoint is a ToyPipeline"):
            export_bundle(checkpoint, tmp_path / "out")
        with pytest.raises(CorruptError, match="names the family 'toy'"):
            fewstep.load(bundle.folder)
    finally:
        register_family(TOY)
