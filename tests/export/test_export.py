"""Exports: what a bundle holds, and that nothing half-written stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy
from fewstep.bundle import read_bundle
from fewstep.errors import (
    ArgumentError,
    GateError,
    MissingError,
    UnknownNameError,
)
from fewstep.export import export_bundle, open_checkpoint
from fewstep.export.embedded import embedded_bundle, embedded_checkpoint
from fewstep.export.plan import plan_components
from fewstep.export.trace.graphs import find_graph, graph_key
from refusals import refused
from safetensors.numpy import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_bundle_follows_the_contract(family: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(f"{family}_bundle")
    assert bundle.family == family
    assert read_bundle(bundle.folder).to_json() == bundle.to_json()
    unet = {s.name for s in bundle.components["unet"].inputs}
    assert unet >= {"sample", "timestep", "encoder_hidden_states"}
    assert ({"text_embeds", "time_ids"} <= unet) == (family == "sdxl")
    assert [s.dtype for s in bundle.components["vae_decoder"].outputs] == ["uint8", "bool"]
    assert bundle.latent.factor == 2, "the VAE's factor must come from its configuration"
    assert bundle.gate["status"] == "passed"
    assert all(c["worst_relative_l2"] <= c["limit"] for c in bundle.gate["components"].values())
    for component in bundle.components.values():
        weights = load_file(bundle.path(component.weights))
        assert sum(v.nbytes for v in weights.values()) > 0


def test_graphs_hold_no_weights_and_no_paths(sd1_bundle: Any) -> None:
    import onnx

    for name, component in sd1_bundle.components.items():
        path = sd1_bundle.path(component.graph)
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        names = set(load_file(sd1_bundle.path(component.weights)))
        external = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        assert external == names, name
        text = path.read_bytes()
        assert b".py" not in text
        assert os.fsencode(str(Path.home())) not in text


def test_a_graph_depends_on_the_configuration_alone(tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path) -> None:
    other = copy(tiny_sd1, tmp_path / "other")
    weights = load_file(other / UNET)
    save_file({k: v * np.float32(0.5) for k, v in weights.items()}, other / UNET, metadata={"format": "pt"})
    bundle = export_bundle(other, tmp_path / "bundle", gate=False)
    before, after = sd1_bundle.components["unet"], bundle.components["unet"]
    assert before.graph_key == after.graph_key
    assert before.graph_sha256 == after.graph_sha256
    assert before.weights_sha256 != after.weights_sha256
    config = plan_components(open_checkpoint(tiny_sd1))[1].config
    assert graph_key("unet", {**config, "layers_per_block": 2}, "float32") != before.graph_key


def test_half_precision_weights_are_converted_tensor_by_tensor(tiny_sd1: Path, tmp_path: Path) -> None:
    import ml_dtypes
    from fewstep.weights.stored import Stored, convert

    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    values[:2] = (1.0 + 2**-8, 1.0 + 3 * 2**-8)
    stored = Stored(dtype="F32", shape=(1000,), data=values.view(np.uint8))
    expected = values.astype(ml_dtypes.bfloat16)
    found = convert(stored, "bfloat16", "x")
    np.testing.assert_array_equal(found, expected.view(np.uint16))
    back = convert(Stored(dtype="BF16", shape=(1000,), data=found.view(np.uint8)), "float32", "x")
    np.testing.assert_array_equal(back, expected.astype(np.float32))


def test_the_embedded_model_is_exported_from_packaged_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(embedded_checkpoint("base"))
    assert all(find_graph(p.key) is not None for p in plan_components(checkpoint)), "run tools/package_graphs.py"
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path))
    bundle, made = embedded_bundle("base")
    again, made_again = embedded_bundle("base")
    assert (made, made_again) == (True, False)
    assert again.to_json() == bundle.to_json()
    assert bundle.gate["status"] == "passed"
    size = sum(
        f.stat().st_size
        for f in embedded_checkpoint("base").rglob("*.safetensors")
        if f.name != "reference.safetensors"
    )
    assert size <= 12_000_000


def test_the_gate_refuses_weights_under_wrong_names(tiny_sd1: Path, tmp_path: Path) -> None:
    """Two weights of one shape change places in the bundle only: what torch made of the checkpoint is the reference."""
    from fewstep.export import plan as module

    real = module.open_tensors

    def swapped(paths: Any) -> Any:
        found = real(paths)
        a, b = "mid_block.resnets.0.conv1.weight", "mid_block.resnets.0.conv2.weight"
        if a in found:
            found[a], found[b] = found[b], found[a]
        return found

    module.open_tensors = swapped
    try:
        refused(tiny_sd1, tmp_path / "bundle", GateError, "disagrees with torch")
    finally:
        module.open_tensors = real


def test_only_what_is_needed_is_fetched_from_a_hub() -> None:
    from fewstep.export.checkpoint.folder import hub_files
    from huggingface_hub.utils import filter_repo_objects

    there = [
        *(
            "model_index.json",
            "README.md",
            "sd_turbo.safetensors",
            "scheduler/scheduler_config.json",
            "vae_1_0/x.safetensors",
        ),
        *(
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
        ),
        *("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/model.onnx", "tokenizer/merges.txt"),
        *("text_encoder/model.safetensors", "safety_checker/model.safetensors", "reference.safetensors"),
    ]
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": [], "text_encoder": []}
    plain = set(filter_repo_objects(there, allow_patterns=hub_files(index, None)))
    assert plain == {
        *(
            "model_index.json",
            "README.md",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "tokenizer/merges.txt",
        ),
        *("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model-00001-of-00002.safetensors"),
        "text_encoder/model.safetensors",
    }
    half = set(filter_repo_objects(there, allow_patterns=hub_files(index, "fp16")))
    assert {f for f in half if f.startswith("unet/diff")} == {"unet/diffusion_pytorch_model.fp16.safetensors"}


def test_parts_without_the_variant_are_fetched_plain(tmp_path: Path) -> None:
    from fewstep.export.checkpoint.folder import plain_files

    for name in ("unet", "vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    (tmp_path / "vae" / "config.json").touch()
    index: dict[str, Any] = {"unet": [], "vae": [], "text_encoder": [], "tokenizer": [], "scheduler": []}
    wanted = {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert {p for p in plain_files(tmp_path, index, "fp16") if "[" not in p} == wanted


def test_a_reference_inside_a_checkpoint_is_not_trusted(tiny_sd1: Path, tmp_path: Path) -> None:
    """A folder that carries its own truth, here that of another model, is compared with torch all the same."""
    other = copy(tiny_sd1, tmp_path / "other")
    (other / "reference.safetensors").write_bytes((embedded_checkpoint("base") / "reference.safetensors").read_bytes())
    assert export_bundle(other, tmp_path / "b").gate["status"] == "passed"


def test_the_working_folder_may_be_the_target(
    tiny_sd1: Path, sd1_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export_bundle(tiny_sd1, ".", gate=False).name == "here"
    assert read_bundle(tmp_path / "here").family == "sd1"


def test_an_existing_bundle_is_kept_unless_asked(tiny_sd1: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    export_bundle(tiny_sd1, target, gate=False)
    before = (target / "bundle.json").read_bytes()
    with pytest.raises(ArgumentError, match="--overwrite"):
        export_bundle(tiny_sd1, target, gate=False)
    assert (target / "bundle.json").read_bytes() == before
    export_bundle(tiny_sd1, target, gate=False, overwrite=True, name="again")
    assert read_bundle(target).name == "again"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    with pytest.raises(ArgumentError, match="no bundle"):
        export_bundle(tiny_sd1, tmp_path / "mine", gate=False, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_hub_id_through_the_hubs_cache(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as huggingface_hub lays it out, links included, found without a network."""
    import huggingface_hub.constants as constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--tiny-sd"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for file in tiny_sd1.rglob("*"):
        if file.is_file():
            blob = repo / "blobs" / file.relative_to(tiny_sd1).as_posix().replace("/", "--")
            link = repo / "snapshots" / revision / file.relative_to(tiny_sd1)
            blob.parent.mkdir(exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(file.read_bytes())
            link.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    bundle = export_bundle("someone/tiny-sd", tmp_path / "b", offline=True, gate=False)
    assert bundle.source["revision"] == revision
    refused("someone/other", tmp_path / "c", MissingError, "not in the hub's cache", offline=True)


def test_names_are_suggested() -> None:
    error = UnknownNameError("sampler", "eulr", ["euler", "heun", "ddim"])
    assert error.near[0] == "euler"
    assert error.exit_code == 2


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_tokenizers_without_their_json_are_the_same(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Older checkpoints carry vocabulary and merges only; "!" as padding must still be a token of its own."""
    import tokenizers as fast
    from fewstep.export.tokenizers import export_tokenizer

    checkpoint: Path = request.getfixturevalue(f"tiny_{family}")
    for folder in open_checkpoint(checkpoint).tokenizers:
        made = export_tokenizer(folder, tmp_path / "own.json", 77)
        vocabulary = json.loads((tmp_path / "own.json").read_text())["model"]
        bare = tmp_path / folder.name
        bare.mkdir()
        (bare / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
        merges = [m if isinstance(m, str) else " ".join(m) for m in vocabulary["merges"]]
        (bare / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (bare / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
        again = export_tokenizer(bare, tmp_path / "bare.json", 77)
        assert (again.pad_id, again.bos_id, again.eos_id, again.length) == (
            made.pad_id,
            made.bos_id,
            made.eos_id,
            made.length,
        )
        a, b = (fast.Tokenizer.from_file(str(tmp_path / n)) for n in ("own.json", "bare.json"))
        for prompt in ("a red circle", "hello! it's Émile 🎉", "", "!! A\tB", "日本語"):
            assert a.encode(prompt).ids == b.encode(prompt).ids, prompt


def test_a_folder_has_no_revision(tiny_sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="revision 'main' of a file or folder"):
        export_bundle(tiny_sd1, tmp_path / "b", revision="main")
