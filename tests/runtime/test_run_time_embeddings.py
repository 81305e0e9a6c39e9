"""Textual inversion at run time: words of one vector and several, beside LoRAs, as diffusers' own loader reads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import fewstep
import numpy as np
import pytest
import torch
from checkpoints import make_lora, psnr, write_lora
from commandline import call
from fewstep.errors import ArgumentError, MissingError, UnsafeFileError, UnsupportedError
from fewstep.runtime import diffusers_adapter
from PIL import Image
from safetensors.torch import save_file

LEAST = 75.0
CALL: dict[str, Any] = {"steps": 2, "guidance": 4.0, "size": (64, 64), "seed": 3}
PROMPT = "a <toy> and a <flat>, red"


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("words")
    tensors = {"toy": {"<toy>": vectors(1, 3, 32)}, "flat": {"emb_params": vectors(2, 32)}}
    for name, content in tensors.items():
        save_file(content, place / f"{name}.safetensors")
    return {n: place / f"{n}.safetensors" for n in tensors}


@pytest.fixture(scope="module")
def theirs(tiny_sd1: Path, files: dict[str, Path]) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(files["toy"])
    pipe.load_textual_inversion(files["flat"], token="<flat>")
    return pipe


def reference(pipe: Any, prompt: str, **more: Any) -> np.ndarray:
    images = pipe(
        prompt,
        num_inference_steps=CALL["steps"],
        guidance_scale=CALL["guidance"],
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(CALL["seed"]),
        output_type="np",
        **more,
    ).images
    return np.round(images[0] * 255).astype(np.uint8)


def test_words_are_learned_and_forgotten(
    sd1_bundle: Any, tiny_sd1: Path, theirs: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    """The picture is diffusers', with a LoRA of the text encoder too; a word that is forgotten is its letters again."""
    pipe = fewstep.load(sd1_bundle)
    before = pipe(PROMPT, **CALL).images[0]
    assert pipe.load_embedding(files["toy"]) == ("<toy>",)
    assert pipe.load_embedding(files["flat"], "<flat>") == ("<toy>", "<flat>")
    made = pipe(PROMPT, **CALL).images[0]
    assert psnr(reference(theirs, PROMPT), made) >= LEAST
    assert psnr(before, made) < LEAST
    plain = pipe("a red circle", **CALL).images[0]
    assert psnr(reference(theirs, "a red circle"), plain) >= LEAST
    lora = write_lora(make_lora(tiny_sd1, seed=1), tmp_path / "a.safetensors", "kohya", folder=tiny_sd1)
    theirs.load_lora_weights(lora, adapter_name="a")
    theirs.set_adapters(["a"], [0.8])
    both = pipe([PROMPT, "a red circle"], negative="a <flat>", loras=[{lora: 0.8}, None], **CALL).images
    assert psnr(reference(theirs, PROMPT, negative_prompt="a <flat>"), both[0]) >= LEAST
    theirs.unload_lora_weights()
    pipe.unload_embeddings()
    np.testing.assert_array_equal(pipe(PROMPT, **CALL).images[0], before)


def test_torchs_engine_and_the_adapter(sd1_bundle: Any, theirs: Any, files: dict[str, Path]) -> None:
    import fewstep.export

    opened = fewstep.load(sd1_bundle, backend="torch", device="cpu:torch", mode="shared")
    ours = diffusers_adapter.StableDiffusionPipeline.from_pretrained(opened)
    ours.load_textual_inversion([str(files["toy"]), files["flat"]], token=["<toy>", "<flat>"])
    assert psnr(reference(theirs, PROMPT), reference(ours, PROMPT)) >= LEAST
    with pytest.raises(UnsupportedError):
        ours.load_textual_inversion({"<a>": vectors(1, 32)})
    with pytest.raises(UnsupportedError):
        ours.unload_textual_inversion("<toy>")
    ours.unload_textual_inversion()
    assert psnr(reference(theirs, PROMPT), reference(ours, PROMPT)) < LEAST


def test_two_text_encoders(sdxl_bundle: Any, tiny_sdxl: Path, tmp_path: Path) -> None:
    pipe = fewstep.load(sdxl_bundle)
    widths = [int(sdxl_bundle.component(n).config["hidden_size"]) for n in sdxl_bundle.text_encoders]
    state = {"clip_l": vectors(4, 2, widths[0]), "clip_g": vectors(5, 2, widths[1])}
    save_file(state, tmp_path / "style.safetensors")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    theirs.set_progress_bar_config(disable=True)
    second = {"text_encoder": theirs.text_encoder_2, "tokenizer": theirs.tokenizer_2}
    first = {"text_encoder": theirs.text_encoder, "tokenizer": theirs.tokenizer}
    theirs.load_textual_inversion(state["clip_g"], token="style", **second)
    theirs.load_textual_inversion(state["clip_l"], token="style", **first)
    pipe.load_embedding(tmp_path / "style.safetensors")
    made = pipe("a circle in style", **CALL).images[0]
    assert psnr(reference(theirs, "a circle in style"), made) >= LEAST


def test_what_is_refused_leaves_what_was_known(
    sd1_bundle: Any, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = fewstep.load(sd1_bundle, embeddings=[(None, files["toy"])])
    known = pipe(PROMPT, **CALL).images[0]
    save_file({"<wide>": vectors(1, 2, 48)}, tmp_path / "wide.safetensors")
    (tmp_path / "a.pt").write_bytes(b"\x80\x04.")
    for path, name, error in (
        (tmp_path / "wide.safetensors", None, ArgumentError),
        (files["toy"], None, ArgumentError),
        (files["flat"], " ", ArgumentError),
        (tmp_path / "absent.safetensors", None, MissingError),
        (tmp_path / "a.pt", None, UnsafeFileError),
    ):
        with pytest.raises(error):
            pipe.load_embedding(path, name)
    np.testing.assert_array_equal(pipe(PROMPT, **CALL).images[0], known)
    output = tmp_path / "a.png"
    words = [
        "run",
        str(sd1_bundle.folder),
        f"--prompt={PROMPT}",
        "--steps=2",
        "--guidance=4",
        "--size=64x64",
        "--seed=3",
    ]
    code, _, err = call(capsys, *words, f"--embedding={files['toy']}", f"--output={output}")
    assert code == 0, err
    assert psnr(known, np.asarray(Image.open(output))) >= LEAST
