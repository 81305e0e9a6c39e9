"""LoRAs at run time: each picture is diffusers' with the same adapters set, alone and among others in one batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import fewstep
import numpy as np
import pytest
import torch
from checkpoints import make_lora, psnr, write_lora
from fewstep.errors import FewstepError
from fewstep.runtime import diffusers_adapter

pytest.importorskip("peft")
LEAST = 75.0
CALL: dict[str, Any] = {"steps": 3, "guidance": 4.0, "size": (64, 64)}
FAMILIES = ("sd1", "sdxl")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"tiny_{family}"))


@pytest.fixture(scope="module")
def pipe(family: str, request: pytest.FixtureRequest) -> Any:
    return fewstep.load(request.getfixturevalue(f"{family}_bundle"))


@pytest.fixture(scope="module")
def theirs(family: str, folder: Path) -> Any:
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs of one checkpoint in several makers' names: two over all layers, one of the UNet's attention alone."""
    place = tmp_path_factory.mktemp("loras")
    made = {"kohya": make_lora(folder, seed=1), "diffusers": make_lora(folder, seed=2)}
    made["attention"] = make_lora(folder, seed=3, text=False)
    attention = {m: p for m, p in made["attention"]["unet"].items() if ".attn" in m}
    made["attention"] = {"unet": attention}
    styles = {"kohya": "kohya", "diffusers": "diffusers", "attention": "kohya"}
    return {n: write_lora(lora, place / f"{n}.safetensors", styles[n], folder=folder) for n, lora in made.items()}


def expected(pipe: Any, files: dict[str, Path], loras: dict[str, float], **call: Any) -> np.ndarray:
    pipe.unload_lora_weights()
    for name in loras:
        pipe.load_lora_weights(files[name], adapter_name=name)
    if loras:
        pipe.set_adapters(list(loras), adapter_weights=list(loras.values()))
    given = {**CALL, **call}
    images = pipe(
        given["prompt"],
        num_inference_steps=given["steps"],
        guidance_scale=given["guidance"],
        width=given["size"][0],
        height=given["size"][1],
        generator=torch.Generator().manual_seed(given["seed"]),
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)[0]


@pytest.mark.parametrize("loras", [{"kohya": 0.8}, {"diffusers": -0.4, "kohya": 1.1}, {"attention": 30.0}], ids=str)
def test_a_picture_is_that_of_the_library(
    pipe: Any, theirs: Any, files: dict[str, Path], loras: dict[str, float]
) -> None:
    plain = pipe("a red circle", seed=3, **CALL).images[0]
    ours = pipe("a red circle", seed=3, loras={files[n]: s for n, s in loras.items()}, **CALL).images[0]
    reference = expected(theirs, files, loras, prompt="a red circle", seed=3)
    assert psnr(reference, ours) >= LEAST
    assert psnr(plain, ours) < 40, "the LoRA changes nothing"


def test_four_loras_of_different_ranks_share_a_batch(pipe: Any, folder: Path, tmp_path: Path) -> None:
    """Each image of a batch has its own LoRA, or none, and is what it is alone; ranks of 4 to 64."""
    files = [grown(folder, tmp_path, rank, seed) for seed, rank in enumerate((4, 9, 32, 64))]
    asked = [{files[0]: 0.7}, {files[1]: -1.2}, {files[2]: 0.3, files[0]: 0.2}, None, {files[3]: 1.0}]
    prompts = [f"a red circle {i}" for i in range(len(asked))]
    together = pipe(prompts, seed=7, loras=asked, **CALL)
    plain = pipe(prompts, seed=7, **CALL)
    for i, loras in enumerate(asked):
        lone = pipe(prompts[i], seed=7 + i, loras=loras, **CALL)
        assert psnr(lone.images[0], together.images[i]) >= LEAST
        assert (psnr(plain.images[i], together.images[i]) >= LEAST) == (loras is None)


def grown(folder: Path, place: Path, rank: int, seed: int) -> Path:
    """A LoRA of the UNet's attention of some rank, random in both matrices."""
    generator = torch.Generator().manual_seed(seed)
    lora = {
        module: (
            torch.randn((rank, down.shape[1]), generator=generator) * 0.2,
            torch.randn((up.shape[0], rank), generator=generator) * 0.2,
        )
        for module, (down, up) in make_lora(folder, text=False)["unet"].items()
        if ".attn" in module
    }
    return write_lora({"unet": lora}, place / f"rank{rank}.safetensors", "kohya", folder=folder)


@pytest.mark.parametrize("family", FAMILIES[:1], indirect=True)
def test_diffusers_own_methods(pipe: Any, theirs: Any, files: dict[str, Path]) -> None:
    """One sequence of calls on both: what is active, and the picture after each.

    For one family: which LoRA is active is nobody's but the adapter's, and the pictures of both families are above.
    """
    ours = getattr(diffusers_adapter, type(theirs).__name__).from_pretrained(pipe)
    theirs.unload_lora_weights()
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "np"}

    def same(**more: Any) -> np.ndarray:
        for query in ("get_active_adapters", "get_list_adapters"):
            assert getattr(ours, query)() == getattr(theirs, query)()
        made = [
            p("a red circle", generator=torch.Generator().manual_seed(5), **call, **more).images[0]
            for p in (theirs, ours)
        ]
        a, b = (np.round(m * 255).astype(np.uint8) for m in made)
        assert psnr(a, b) >= LEAST
        return np.asarray(a)

    seen = [same()]
    steps: list[Callable[[Any], Any]] = [
        lambda p: p.load_lora_weights(files["kohya"].parent, weight_name=files["kohya"].name),
        lambda p: p.load_lora_weights(files["attention"], adapter_name="b"),
        lambda p: p.set_adapters(["default_0", "b"], [0.5, 20.0]),
        lambda p: p.set_adapters(["default_0", "b"], [{"unet": 0.7}, 10.0]),
        lambda p: p.disable_lora(),
        lambda p: p.enable_lora(),
        lambda p: p.set_adapters("b", 25.0),
        lambda p: p.delete_adapters("b"),
        lambda p: p.unload_lora_weights(),
    ]
    for step in steps:
        for pipeline in (theirs, ours):
            step(pipeline)
        seen.append(same())
    assert psnr(seen[0], seen[-1]) == np.inf
    assert psnr(seen[0], seen[5]) == np.inf, "disabled"
    assert sum(psnr(a, b) < LEAST for a, b in pairwise(seen)) >= 7
    for pipeline in (theirs, ours):
        pipeline.load_lora_weights(files["kohya"])
    same(cross_attention_kwargs={"scale": 0.4})
    for pipeline in (theirs, ours):
        pipeline.fuse_lora(lora_scale=0.6)
    fused = same()
    for pipeline in (theirs, ours):
        pipeline.unfuse_lora()
        pipeline.unload_lora_weights()
    assert psnr(same(), fused) < LEAST
    for wrong in (
        lambda: ours.set_adapters("absent"),
        lambda: ours.load_lora_weights({}),
        lambda: ours.load_lora_weights("/nowhere/at/all"),
        lambda: ours.load_lora_weights(files["kohya"], low_speed=True),
    ):
        with pytest.raises(FewstepError):
            wrong()
