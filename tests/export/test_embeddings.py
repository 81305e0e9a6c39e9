"""Textual inversion from every kind of file, against diffusers' `load_textual_inversion`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from checkpoints import copy
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from fewstep.commands.export import embedding
from fewstep.errors import ArgumentError, CorruptError, MissingError, UnsafeFileError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.runtime.prompts.tokenizer import PromptTokenizer
from refusals import refused
from safetensors.torch import load_file, save_file

LEAST_PSNR = 80.0
PROMPT, NEGATIVE = "a <toy> on easyneg, <flat> circle", "easyneg <other>, blurry"
TEXTS = (PROMPT, NEGATIVE, "<toy><toy>", "<TOY> toy", "x<toy>y easynegs", "no words", "<toy>_1 alone", "")


def vectors(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


def decibels(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = np.mean((ours.astype(np.float64) - np.round(255.0 * theirs)) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 1e-12)))


@pytest.fixture(scope="module")
def learned(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, StableDiffusionPipeline]:
    """A bundle with four words, gated, and diffusers' pipeline with the same."""
    place = tmp_path_factory.mktemp("embeddings")
    files = [
        (None, saved(place / "anything.safetensors", {"<toy>": vectors(1, 3, 32)})),
        (None, saved(place / "easyneg.safetensors", {"emb_params": vectors(2, 2, 32, dtype=torch.float16)})),
        ("<flat>", saved(place / "x.safetensors", {"<its own>": vectors(3, 32, dtype=torch.bfloat16)})),
        ("<other>", saved(place / "folder" / "learned_embeds.safetensors", {"<o>": vectors(4, 1, 32)}).parent),
    ]
    bundle = export_bundle(tiny_sd1, place / "bundle", embeddings=files)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipe.load_textual_inversion(str(files[0][1]))
    pipe.load_textual_inversion(str(files[1][1]), token="easyneg")
    pipe.load_textual_inversion(str(files[2][1]), token="<flat>")
    pipe.load_textual_inversion(str(files[3][1]), token="<other>")
    pipe.set_progress_bar_config(disable=True)
    return bundle, pipe


def test_words_are_diffusers_words(learned: tuple[Any, StableDiffusionPipeline]) -> None:
    bundle, pipe = learned
    assert bundle.gate["status"] == "passed"
    assert bundle.component("text_encoder").config["vocab_size"] == len(pipe.tokenizer)
    source = bundle.component("text_encoder").source["embeddings"]
    assert [(s["word"], s["tokens"]) for s in source] == [("<toy>", 3), ("easyneg", 2), ("<flat>", 1), ("<other>", 1)]
    tokenizer = PromptTokenizer(bundle, bundle.tokenizers[0])
    for text in TEXTS:
        theirs = pipe.tokenizer(pipe.maybe_convert_prompt(text, pipe.tokenizer), add_special_tokens=False).input_ids
        assert tokenizer.words(text) == theirs, text


def test_pictures_of_learned_words_are_diffusers(learned: tuple[Any, StableDiffusionPipeline]) -> None:
    bundle, pipe = learned
    ours = fewstep.load(bundle, threads=1)

    def theirs(prompt: str) -> np.ndarray:
        return pipe(prompt, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=4.0, output_type="np",
                    generator=torch.Generator().manual_seed(5)).images[0]  # fmt: skip

    def own(prompt: str, **more: Any) -> np.ndarray:
        return ours(prompt, negative=NEGATIVE, steps=4, guidance=4.0, seed=5, compat="diffusers", **more).images[0]

    found = own(PROMPT)
    assert decibels(found, theirs(PROMPT)) >= LEAST_PSNR
    assert decibels(found, theirs(PROMPT.replace("<toy>", "toy"))) < 60, "the word shows"
    assert decibels(own(PROMPT.replace("<toy>", "(<toy>:1.4)"), prompt_syntax="a1111"), found / 255.0) < 70


def test_words_of_two_encoders(tiny_sdxl: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.set_progress_bar_config(disable=True)
    first, second = (e.config.hidden_size for e in (pipe.text_encoder, pipe.text_encoder_2))
    tensors = {"clip_l": vectors(1, 2, first), "clip_g": vectors(2, 2, second)}
    path = saved(tmp_path / "style.safetensors", tensors)
    bundle = export_bundle(tiny_sdxl, tmp_path / "b", embeddings=[(None, path)], gate=False)
    state = load_file(path)
    pipe.load_textual_inversion(state["clip_g"], token="style", text_encoder=pipe.text_encoder_2,
                                tokenizer=pipe.tokenizer_2)  # fmt: skip
    pipe.load_textual_inversion(state["clip_l"], token="style", text_encoder=pipe.text_encoder,
                                tokenizer=pipe.tokenizer)  # fmt: skip
    theirs = pipe("a circle, style", num_inference_steps=3, guidance_scale=3.0, output_type="np", height=32, width=32,
                  generator=torch.Generator().manual_seed(5)).images[0]  # fmt: skip
    ours = fewstep.load(bundle, threads=1)("a circle, style", size=(32, 32), steps=3, guidance=3.0, seed=5,
                                           compat="diffusers")  # fmt: skip
    assert decibels(ours.images[0], theirs) >= LEAST_PSNR


def test_files_and_names_that_are_no_words(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    target, place = tmp_path / "b", tmp_path / "files"
    good = saved(place / "toy.safetensors", {"emb_params": vectors(1, 2, 32)})

    def asked(kind: type[Exception], words: str, *given: Any, source: Path = tiny_sd1) -> None:
        refused(source, target, kind, words, embeddings=given, gate=False)

    (place / "toy.pt").write_bytes(b"\x80\x04.")
    asked(UnsafeFileError, "pickle", (None, place / "toy.pt"))
    asked(MissingError, "no embedding", (None, place / "none.safetensors"))
    asked(MissingError, "no embedding", (None, place))
    asked(ArgumentError, "empty name", (" ", good))
    asked(ArgumentError, "'toy', and the tokenizer knows 'toy'", (None, good), (None, good))
    asked(ArgumentError, "knows 'zqzq_1'", ("zqzq_1", good), ("zqzq", good))
    asked(ArgumentError, "knows '!'", ("!", good))
    for name, tensors, kind, words in (
        ("wide", {"emb_params": vectors(1, 2, 33)}, ArgumentError, "vectors.*2, 33"),
        ("deep", {"emb_params": vectors(1, 2, 2, 32)}, CorruptError, "shape"),
        ("whole", {"emb_params": torch.ones(2, 32, dtype=torch.int64)}, CorruptError, "dtype I64"),
        ("nan", {"emb_params": torch.full((2, 32), torch.nan)}, CorruptError, "NaN"),
        ("many", {"a": vectors(1, 32), "b": vectors(2, 32)}, CorruptError, "no embedding: it holds a, b"),
        ("two", {"clip_l": vectors(1, 1, 32), "clip_g": vectors(1, 1, 32)}, ArgumentError, "two text encoders"),
        ("none", {}, CorruptError, "holds nothing"),
    ):
        asked(kind, words, (None, saved(place / f"{name}.safetensors", tensors)))
    short = copy(tiny_sd1, tmp_path / "short")
    path = short / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("token_embedding.weight"))
    save_file({**weights, name: weights[name][:-1].clone()}, path)
    asked(CorruptError, "tokenizer knows 598 tokens, and the text encoder 597", (None, good), source=short)


def test_vectors_of_one_width_of_several(tiny_sdxl: Path, tmp_path: Path) -> None:
    """A file that says nothing is for the encoder whose width it has, if there is one alone."""
    from fewstep.export.tokenizers import read_tokenizer
    from fewstep.weights.embeddings import read_words

    def tokenizers() -> list[Any]:
        return [read_tokenizer(tiny_sdxl / n)[0] for n in ("tokenizer", "tokenizer_2")]

    path = saved(tmp_path / "s.safetensors", {"<s>": vectors(1, 2, 48)})
    words, known = read_words([(None, path)], {"one": 32, "two": 48}, tokenizers())
    assert {e: [w.tokens for w in of] for e, of in words.items()} == {"two": [("<s>", "<s>_1")]}
    assert known == {"two": 600}
    with pytest.raises(UnsupportedError, match="one and two"):
        read_words([(None, path)], {"one": 48, "two": 48}, tokenizers())


def test_names_on_the_command_line() -> None:
    assert embedding("<toy>=a/b.safetensors") == ("<toy>", "a/b.safetensors")
    assert embedding("a/b.safetensors") == (None, "a/b.safetensors")
