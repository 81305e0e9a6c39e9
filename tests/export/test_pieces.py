"""T5's tokenizers and DeepFloyd-IF's checkpoints: what is read, and what is refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fewstep.bundle import read_bundle
from fewstep.errors import ArgumentError, CorruptError, FewstepError, MissingError, MissingExtraError, UnsupportedError
from fewstep.export.checkpoint.compose import compose_checkpoint
from fewstep.export.pieces import export_pieces
from fewstep.export.plan import check_scheduler
from fewstep.runtime.prompts.syntax import Prompt
from fewstep.runtime.prompts.tokenizer import PromptTokenizer
from pixel_checkpoints import PUNCTUATED, pieces
from transformers import T5Tokenizer


@pytest.mark.parametrize("saved", [False, True])
def test_ids_are_transformers_own(saved: bool, deepfloyd: Path, tmp_path: Path) -> None:
    """From the pieces, and from what transformers saves of them: with the end, cut, filled up, and masked."""
    folder = pieces(tmp_path / "tokenizer")
    theirs = T5Tokenizer.from_pretrained(folder)
    if saved:
        shutil.rmtree(folder)
        theirs.save_pretrained(folder)
    bundle = read_bundle(deepfloyd / "first")
    record = export_pieces(folder, tmp_path / "made.json", 24)
    shutil.copy(tmp_path / "made.json", bundle.folder / "made.json")
    tokenizer = PromptTokenizer(bundle, record, one_pass=True)
    for text in PUNCTUATED:
        asked = theirs(text.lower().strip(), padding="max_length", max_length=24, truncation=True)
        chunks, cut = tokenizer.chunks(Prompt(text=text), text)
        assert tokenizer.wrap(chunks[0].tokens) == asked.input_ids, text
        assert tokenizer.mask(chunks[0].tokens) == asked.attention_mask, text
        assert cut == (len(theirs(text.lower().strip()).input_ids) > 24)
    assert (record.bos_id, record.eos_id, record.pad_id) == (None, 1, 0)


def test_tokenizers_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, target = tmp_path / "empty", tmp_path / "made.json"
    empty.mkdir()
    with pytest.raises(MissingError, match=r"spiece\.model"):
        export_pieces(empty, target, 77)
    for name, text in (("spiece.model", b"no pieces"), ("tokenizer.json", b"{}"), ("tokenizer.json", b"[")):
        folder = tmp_path / f"damaged-{len(text)}"
        folder.mkdir()
        (folder / name).write_bytes(text)
        with pytest.raises(CorruptError, match="cannot be read"):
            export_pieces(folder, target, 77)
    whole, find = pieces(tmp_path / "whole"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "sentencepiece" else find(n))
    with pytest.raises(MissingExtraError, match="sentencepiece"):
        export_pieces(whole, target, 77)


def changed(deepfloyd: Path, name: str, place: Path, file: str, **values: Any) -> Path:
    """A checkpoint with another value in one of its files."""
    folder = Path(shutil.copytree(deepfloyd / name, place / "changed"))
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("name", "file", "values", "words"),
    [
        ("if-i", "unet/config.json", {"out_channels": 4}, "takes 3 channels and gives 4"),
        ("if-i", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("if-ii", "unet/config.json", {"class_embed_type": "simple_projection"}, "classes of another kind"),
        ("if-i", "unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "other states than a text's"),
        ("if-i", "unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("if-i", "text_encoder/config.json", {"d_model": "x"}, "d_model"),
        ("if-i", "text_encoder/config.json", {"num_layers": 10**9}, "num_layers"),
        ("if-i", "model_index.json", {"unet": [None, None]}, "has no unet"),
        ("if-i", "model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "has a part 'vae'"),
        ("if-i", "model_index.json", {"_class_name": "IFImg2ImgPipeline"}, "starts from pictures"),
        ("if-i", "model_index.json", {"_class_name": "StableDiffusionUpscalePipeline"}, "upscaler"),
        ("if-ii", "image_noising_scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start"),
    ],
)
def test_checkpoints_that_are_refused(
    deepfloyd: Path, tmp_path: Path, name: str, file: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises((UnsupportedError, CorruptError), match=words):
        compose_checkpoint(changed(deepfloyd, name, tmp_path, file, **values))


def test_what_is_left_out(deepfloyd: Path) -> None:
    for without in (["unet"], ["text_encoder", "unet"], ["text_encoder_2"]):
        with pytest.raises(ArgumentError, match="without"):
            compose_checkpoint(deepfloyd / "if-i", without=without)
    with pytest.raises(ArgumentError, match="samples pixels"):
        compose_checkpoint(deepfloyd / "if-i", vae=deepfloyd)
    assert compose_checkpoint(deepfloyd / "if-i", without=["text_encoder"]).components == ("unet", "vae_decoder")


def test_a_variance_that_a_unet_does_not_say() -> None:
    for name in ("DDPMScheduler", "DPMSolverMultistepScheduler"):
        config = {"_class_name": name, "variance_type": "learned_range"}
        with pytest.raises(UnsupportedError, match="its UNet does not say"):
            check_scheduler(config, replaced=False)
        check_scheduler(config, replaced=False, says_variance=True)


@pytest.mark.parametrize("noising", [None, {}, {"beta_start": "x"}, []])
def test_manifests_that_misstate_the_noising(deepfloyd: Path, tmp_path: Path, noising: object) -> None:
    folder = Path(shutil.copytree(deepfloyd / "second", tmp_path / "second"))
    manifest = json.loads((folder / "bundle.json").read_text())
    assert manifest["noising"]["beta_schedule"] == "squaredcos_cap_v2"
    (folder / "bundle.json").write_text(json.dumps({**manifest, "noising": noising}))
    with pytest.raises(CorruptError, match=r"nois|beta_start"):
        read_bundle(folder)


def test_a_manifest_with_half_of_its_parts(deepfloyd: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(deepfloyd / "first", tmp_path / "first"))
    manifest = json.loads((folder / "bundle.json").read_text())
    del manifest["components"]["text_encoder"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(FewstepError, match="tokenizers"):
        read_bundle(folder)
    (folder / "bundle.json").write_text(json.dumps({**manifest, "tokenizers": []}))
    assert read_bundle(folder).text_encoders == ()
