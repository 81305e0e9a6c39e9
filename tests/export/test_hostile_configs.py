"""Edited checkpoints: read to the plan of an export, or refused by a typed error, within a moment."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counts import count
from fewstep.errors import CorruptError, FewstepError
from fewstep.export.checkpoint.compose import compose_checkpoint
from fewstep.export.embedded import embedded_checkpoint
from fewstep.export.export import _defaults
from fewstep.export.plan import check_scheduler, choose_precisions, plan_components
from fewstep.export.tokenizers import export_tokenizer
from fewstep.weights.lora import match_loras
from hostile import edits, places
from safetensors.numpy import save_file

FILES = (
    *("model_index.json", "fewstep.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"),
    *("text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
    "tokenizer/tokenizer.json",
)
DEEP = "[" * 50_000 + "]" * 50_000


def alone(checkpoint: Path, file: str) -> Path:
    """The path of a file that is read: a vocabulary is where nothing holds all of a tokenizer."""
    if file == "tokenizer/vocab.json":
        (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    return checkpoint / file


def read_whole(checkpoint: Path, target: Path) -> None:
    """What an export reads of a checkpoint before it traces and writes."""
    found = compose_checkpoint(checkpoint)
    check_scheduler(found.scheduler, replaced=False)
    precisions = choose_precisions(found, "float32", None)
    plan_components(found, {kind: p.dtype for kind, p in precisions.items()})
    for folder in found.tokenizers:
        export_tokenizer(folder, target, 77)
    _defaults(found, 64, 64, None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The embedded student, its weights linked: only what is JSON is its own."""
    source, folder = embedded_checkpoint("student"), tmp_path / "checkpoint"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in source.rglob("*.safetensors"):
        (folder / path.relative_to(source)).symlink_to(path)
    plain = json.loads((folder / "fewstep.json").read_text()) if (folder / "fewstep.json").is_file() else {}
    (folder / "fewstep.json").write_text(json.dumps({"defaults": {"steps": 4, "guidance": 1.0}, **plain}))
    return folder


@pytest.mark.parametrize("file", FILES)
def test_no_edit_of_a_configuration_surprises(checkpoint: Path, tmp_path: Path, file: str) -> None:
    """60 edits a file, 540 in all; or twice as many."""
    path = alone(checkpoint, file)
    data = json.loads(path.read_text(encoding="utf-8"))
    known = list(places(data))
    among = known[:: max(1, len(known) // 200)]  # of vocabularies, some words
    untyped, refused, slowest = [], 0, 0.0
    for name, changed in edits(data, count(60, 120), seed=len(file), among=among):
        path.write_text(json.dumps(changed))
        began = time.perf_counter()
        try:
            read_whole(checkpoint, tmp_path / "tokenizer.json")
        except FewstepError:
            refused += 1
        except Exception as error:
            untyped.append(f"{name}: {error!r}"[:400])
        slowest = max(slowest, time.perf_counter() - began)
    assert not untyped, "\n".join(untyped)
    assert refused
    assert slowest < 20


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "text",
    [DEEP, "[]", "", "5", '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}"],
    ids=["deep", "list", "empty", "number", "nan", "1e999", "digits"],
)
def test_files_that_are_no_configuration(checkpoint: Path, tmp_path: Path, file: str, text: str) -> None:
    alone(checkpoint, file).write_text(text)
    with pytest.raises(CorruptError):
        read_whole(checkpoint, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("file", FILES)
def test_a_key_that_is_there_twice_is_refused(checkpoint: Path, tmp_path: Path, file: str) -> None:
    """Of two values, one reader takes the first and another the last; here neither counts."""
    path = alone(checkpoint, file)
    text = path.read_text(encoding="utf-8").lstrip()
    first = next(iter(json.loads(text)))
    path.write_text(f"{{{json.dumps(first)}: 1, {text[1:]}", encoding="utf-8")
    with pytest.raises(CorruptError, match="there twice") as refusal:
        read_whole(checkpoint, tmp_path / "tokenizer.json")
    assert path.name in str(refusal.value)


WRONG: list[tuple[str, str, Any]] = [
    ("model_index.json", "force_zeros_for_empty_prompt", "no"),
    ("scheduler/scheduler_config.json", "timestep_spacing", 5),
    ("scheduler/scheduler_config.json", "beta_schedule", None),
    ("scheduler/scheduler_config.json", "prediction_type", []),
    ("scheduler/scheduler_config.json", "set_alpha_to_one", "x"),
    ("unet/config.json", "sample_size", 10**9),
    ("unet/config.json", "transformer_layers_per_block", 10**6),
    ("unet/config.json", "layers_per_block", 10**6),
    ("unet/config.json", "block_out_channels", [8] * 5000),
    ("vae/config.json", "scaling_factor", 10**300),
    ("vae/config.json", "latents_mean", "x"),
    ("text_encoder/config.json", "num_hidden_layers", 10**7),
    ("tokenizer/tokenizer_config.json", "model_max_length", float("inf")),
    ("tokenizer/tokenizer_config.json", "model_max_length", "77"),
    ("tokenizer/tokenizer_config.json", "model_max_length", 1),
    ("tokenizer/tokenizer_config.json", "bos_token", {}),
    ("tokenizer/tokenizer_config.json", "bos_token", {"x": 1}),
    ("tokenizer/tokenizer_config.json", "eos_token", [1]),
]


@pytest.mark.parametrize(("file", "key", "value"), WRONG, ids=[f"{f}-{k}={str(v)[:12]}" for f, k, v in WRONG])
def test_values_that_mean_nothing_are_refused(
    checkpoint: Path, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    data = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps({**data, key: value}))
    with pytest.raises(CorruptError):
        read_whole(checkpoint, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("placed", [5, [], {"a": 5}, {"a": ["x"]}, {"a": None}, {"a": "../x"}, {"a": "x" * 5000}])
def test_shard_indices_name_files(checkpoint: Path, tmp_path: Path, placed: Any) -> None:
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(FewstepError):
        read_whole(checkpoint, tmp_path / "tokenizer.json")


CONFIGS = [
    *("[" * 50_000, "[]", "5", '{"lora_alpha": "x"}', '{"lora_alpha": 1e999}', '{"lora_alpha": [1]}'),
    *(f'{{"lora_alpha": {"9" * 400}}}', '{"alpha_pattern": 5}', '{"lora_alpha": 4, "use_rslora": "no"}'),
]


@pytest.mark.parametrize("text", CONFIGS, ids=[t[:24] for t in CONFIGS])
@pytest.mark.parametrize("beside", [False, True])
def test_configurations_of_loras(checkpoint: Path, tmp_path: Path, text: str, beside: bool) -> None:
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = tmp_path / "adapter_model.safetensors"
    pair = {f"base_model.model.{module}.lora_{n}.weight": np.ones((2, 2), np.float32) for n in "AB"}
    save_file(pair, lora, metadata=None if beside else {"lora_adapter_metadata": text})
    if beside:
        (tmp_path / "adapter_config.json").write_text(text)
    found = compose_checkpoint(checkpoint, loras=[(lora, 1.0)])
    shapes = {"unet": (found.parts["unet"].config, {f"{module}.weight": (2, 2)})}
    with pytest.raises(CorruptError, match="adapter configuration"):
        match_loras(found.loras, shapes)
