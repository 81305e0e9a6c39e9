"""ControlNets beside a UNet: what is exported, what is refused, and by which words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapters import drawing, make_controlnet, make_ip_adapter
from checkpoints import copy
from fewstep.bundle import Bundle, read_bundle
from fewstep.cli import main
from fewstep.errors import ArgumentError, CorruptError, FewstepError, MissingError, UnsafeFileError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.export.checkpoint.compose import compose_checkpoint
from fewstep.export.plan import plan_components
from safetensors.numpy import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
Adapted = tuple[Path, dict[str, Path], Path, Bundle]


def traced(nets: dict[str, Path]) -> dict[str, Path]:
    """All networks that the fixture's graph has, so that none is traced anew."""
    return {**nets, "sketch": nets["canny"].parent / "sketch"}


def unet_key(checkpoint: Path, **controlnets: Path) -> str:
    plans = plan_components(compose_checkpoint(checkpoint, controlnets=controlnets))
    return next(p.key for p in plans if p.kind == "unet")


def test_the_gate_compares_with_control(adapted_sd1: Adapted) -> None:
    bundle = adapted_sd1[3]
    assert bundle.gate["status"] == "passed"
    assert bundle.gate["pictures"]["controlled"]["status"] == "passed"


def test_weights_keep_their_names_behind_the_controls(adapted_sd1: Adapted) -> None:
    _, controlnets, _, bundle = adapted_sd1
    stored = load_file(bundle.path(bundle.component("unet").weights))
    sketch = {"sketch": controlnets["canny"].parent / "sketch"}
    for name, folder in {**controlnets, **sketch}.items():
        own = load_file(folder / WEIGHTS)
        assert {k for k in stored if k.startswith(f"controls.{name}.")} == {f"controls.{name}.{k}" for k in own}
    assert bundle.component("unet").source["controls"].keys() == {*controlnets, *sketch}


def test_the_graph_depends_on_names_and_configurations_alone(adapted_sd1: Adapted, tmp_path: Path) -> None:
    checkpoint, nets, _, _ = adapted_sd1
    key = unet_key(checkpoint, **nets)
    assert key == unet_key(checkpoint, **dict(reversed(nets.items())))
    assert key == unet_key(checkpoint, canny=nets["depth"], depth=nets["canny"]), "their configurations are equal"
    pooled = make_controlnet(checkpoint, tmp_path / "pooled", 1, global_pool_conditions=True)
    others = [unet_key(checkpoint), unet_key(checkpoint, canny=nets["canny"])]
    others += [unet_key(checkpoint, one=nets["canny"], depth=nets["depth"])]
    others += [unet_key(checkpoint, **{**nets, "canny": pooled})]
    assert len({key, *others}) == 5


def test_from_the_command_line(adapted_sd1: Adapted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, nets, ip_adapter, _ = adapted_sd1
    named = ",".join(f"{n}={p}" for n, p in traced(nets).items())
    more = ["--ip-adapter", str(ip_adapter), "--image-encoder", str(ip_adapter.parent / "image_encoder")]
    assert main(["export", str(checkpoint), str(tmp_path / "b"), "--controlnet", named, *more, "--no-gate"]) == 0
    drawing(1).save(tmp_path / "edges.png")
    (tmp_path / "out.png").unlink(missing_ok=True)
    words = ["--prompt", "a ring", "--seed", "3", "--steps", "2", "--output", str(tmp_path / "out.png")]
    prompted = ["--ip-adapter-image", str(tmp_path / "edges.png"), "--ip-adapter-scale", "0.5"]
    shown = [
        *prompted,
        "--control",
        f"canny={tmp_path / 'edges.png'}:0.5",
        "--control-guidance-end",
        "canny=0.5",
        "--guess-mode",
    ]
    assert main(["run", str(tmp_path / "b"), *words, *shown]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out.png")]) == 0
    said = capsys.readouterr().out
    for word in (
        "--ip-adapter-image=edges.png",
        "--ip-adapter-scale=0.5",
        "--control=canny=edges.png:0.5",
        "--control-guidance-end=canny=0.5",
        "--guess-mode",
    ):
        assert word in said
    assert main(["run", str(tmp_path / "b"), *words, "--control", "edges.png"]) == 2


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    made = copy(source, target)
    config = json.loads((made / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (made / "config.json").write_text(json.dumps(config))
    return made


REFUSED: list[tuple[dict[str, Any], type[FewstepError], str]] = [
    ({"_class_name": "ControlNetUnionModel"}, UnsupportedError, "several kinds of pictures in one"),
    ({"_class_name": "UNet2DConditionModel"}, UnsupportedError, "no ControlNet"),
    ({"cross_attention_dim": 48}, ArgumentError, "made for SD 1.x"),
    ({"conditioning_embedding_out_channels": [8, 8, 16]}, ArgumentError, "pixels a cell"),
    ({"block_out_channels": ...}, CorruptError, "does not state block_out_channels"),
    ({"conditioning_channels": -1}, CorruptError, "conditioning_channels"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED)
def test_networks_that_do_not_belong(
    adapted_sd1: Adapted, tmp_path: Path, changes: dict[str, Any], error: type[FewstepError], words: str
) -> None:
    checkpoint, nets, _, _ = adapted_sd1
    made = with_config(nets["canny"], tmp_path / "net", **changes)
    with pytest.raises(error, match=words):
        compose_checkpoint(checkpoint, controlnets={"canny": made})


@pytest.mark.parametrize("name", ["Canny", "a-b", "x_scale", "", "1", "a" * 33])
def test_names_that_inputs_cannot_have(adapted_sd1: Adapted, name: str) -> None:
    checkpoint, nets, _, _ = adapted_sd1
    with pytest.raises(ArgumentError, match="as a ControlNet's name"):
        compose_checkpoint(checkpoint, controlnets={name: nets["canny"]})


def test_another_family_files_and_what_is_missing(adapted_sd1: Adapted, tiny_sdxl: Path, tmp_path: Path) -> None:
    checkpoint, nets, ip_adapter, _ = adapted_sd1
    with pytest.raises(ArgumentError, match="the base that this one was made for"):
        compose_checkpoint(tiny_sdxl, controlnets=nets)
    with pytest.raises(UnsafeFileError, match="pickle"):
        compose_checkpoint(checkpoint, controlnets={"canny": tmp_path / "net.pth"})
    with pytest.raises(MissingError, match="nowhere"):
        compose_checkpoint(checkpoint, controlnets={"canny": tmp_path / "nowhere"})
    with pytest.raises(UnsupportedError, match="single file"):
        compose_checkpoint(checkpoint, controlnets={"canny": nets["canny"] / WEIGHTS})
    short = copy(nets["canny"], tmp_path / "short")
    tensors = load_file(short / WEIGHTS)
    tensors.pop("controlnet_mid_block.weight")
    save_file(tensors, short / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CorruptError, match=r"controls\.canny\.controlnet_mid_block\.weight"):
        export_bundle(
            checkpoint, tmp_path / "b", controlnets=traced(nets) | {"canny": short}, ip_adapter=ip_adapter, gate=False
        )


@pytest.mark.parametrize(
    "controls",
    [[], {"a b": {}}, {"canny": 1}, {"canny": {"_class_name": "X"}}, {"canny": {"_class_name": "ControlNetModel"}}],
)
def test_manifests_that_misstate_controls(adapted_sd1: Adapted, tmp_path: Path, controls: Any) -> None:
    bundle = adapted_sd1[3]
    folder = copy(bundle.folder, tmp_path / "b")
    stated = json.loads((folder / "bundle.json").read_text())
    stated["components"]["unet"]["config"]["_controls"] = controls
    (folder / "bundle.json").write_text(json.dumps(stated))
    with pytest.raises(CorruptError):
        read_bundle(folder)


def test_another_unet_is_refused(adapted_sd1: Adapted) -> None:
    from diffusers import UNet2DConditionModel
    from fewstep.export.swap import swap_parts

    checkpoint, _, _, bundle = adapted_sd1
    with pytest.raises(UnsupportedError, match="--controlnet"):
        swap_parts(replace(bundle), {"unet": UNet2DConditionModel.from_pretrained(checkpoint / "unet")})


def with_tensors(source: Path, target: Path, **changes: Any) -> Path:
    """An adapter's file with some tensors renamed (`None`: left out), in a folder with the same encoder."""
    copy(source.parent, target)
    tensors = load_file(source)
    for old, new in changes.items():
        value = tensors.pop(old.replace("__", "."))
        tensors |= {} if new is None else {new: value}
    save_file(tensors, target / source.name, metadata={"format": "pt"})
    return target / source.name


def test_ip_adapters_that_are_refused(adapted_sd1: Adapted, tiny_sdxl: Path, tmp_path: Path) -> None:
    checkpoint, _, file, _ = adapted_sd1
    larger = make_ip_adapter(tiny_sdxl, tmp_path / "larger", 31, kind="plus")
    with pytest.raises(UnsafeFileError, match="pickle"):
        compose_checkpoint(checkpoint, ip_adapter=tmp_path / "ip-adapter.bin")
    with pytest.raises(MissingError, match="no IP-Adapter file"):
        compose_checkpoint(checkpoint, ip_adapter=tmp_path / "ip.safetensors")
    with pytest.raises(MissingError, match="--image-encoder"):
        compose_checkpoint(checkpoint, ip_adapter=file, image_encoder=tmp_path)
    with pytest.raises(ArgumentError, match="without an IP-Adapter"):
        compose_checkpoint(checkpoint, image_encoder=file.parent / "image_encoder")
    with pytest.raises(ArgumentError, match=r"made for SD 1\.x"):
        compose_checkpoint(checkpoint, ip_adapter=larger)
    face = with_tensors(file, tmp_path / "face", image_proj__proj__weight="image_proj.proj.2.weight")
    with pytest.raises(UnsupportedError, match="FaceID"):
        compose_checkpoint(checkpoint, ip_adapter=face)
    with pytest.raises(CorruptError, match="holds no IP-Adapter"):
        compose_checkpoint(checkpoint, ip_adapter=checkpoint / "unet" / WEIGHTS)
    gone = with_tensors(larger, tmp_path / "gone", image_proj__latents=None)
    with pytest.raises(CorruptError, match="none that is known"):
        compose_checkpoint(tiny_sdxl, ip_adapter=gone)
    config = with_config(file.parent / "image_encoder", tmp_path / "encoder", projection_dim=24)
    with pytest.raises(ArgumentError, match="vectors of width 24"):
        compose_checkpoint(checkpoint, ip_adapter=file, image_encoder=config)


def test_t2i_adapters_of_another_base(adapted_sd1: Adapted, tmp_path: Path) -> None:
    checkpoint, nets, _, _ = adapted_sd1
    sketch = nets["canny"].parent / "sketch"
    xl = with_config(sketch, tmp_path / "xl", adapter_type="full_adapter_xl")
    with pytest.raises(ArgumentError, match=r"channels \[8, 16\]"):
        compose_checkpoint(checkpoint, controlnets={"sketch": xl})
    cells = with_config(sketch, tmp_path / "cells", adapter_type="full_adapter_xl", channels=[8, 16, 16])
    with pytest.raises(ArgumentError, match="pictures of 1 pixels a cell"):
        compose_checkpoint(checkpoint, controlnets={"sketch": cells})
    wide = with_config(sketch, tmp_path / "wide", channels=[8, 32])
    with pytest.raises(ArgumentError, match="channels"):
        compose_checkpoint(checkpoint, controlnets={"sketch": wide})
