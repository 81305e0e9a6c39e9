"""LoRAs as inputs of TensorRT-RTX engines, a whole life: the real builder, and stand-ins for its runtime and the GPU.

The engine with inputs for LoRAs is built for ranks of a span, gated, stored, opened when the first image asks for one,
recorded and replayed; pictures are diffusers' with the same adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import fewstep
import numpy as np
import pytest
import torch
from checkpoints import make_lora, psnr, write_lora
from fewstep.bundle import Bundle
from fewstep.engines import BuildOptions, Store, build_engines, open_engine, profiles_for
from fewstep.engines.low_rank import with_low_rank
from fewstep.engines.profile import MOST_RANK
from fewstep.errors import MismatchError
from standin_tensorrt import stand_in_tensorrt

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("peft")

CAPTURABLE = BuildOptions(compute_capabilities=("8.9",), capturable=True)
LEAST = 75.0
RANKS = (4, 9, 32, 64)


def lora_of(folder: Path, place: Path, rank: int, seed: int) -> Path:
    """A LoRA of the UNet's attention, random in both matrices."""
    generator = torch.Generator().manual_seed(seed)

    def matrices(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.randn((rank, down.shape[1]), generator=generator)
        return low * 0.2, torch.randn((up.shape[0], rank), generator=generator) * 0.2

    modules = make_lora(folder, text=False)["unet"].items()
    lora = {m: matrices(*pair) for m, pair in modules if ".attn" in m}
    return write_lora({"unet": lora}, place / f"rank{rank}.safetensors", "kohya", folder=folder)


def diffusers_pipeline(family: str, folder: Path) -> Callable[..., np.ndarray]:
    """A picture by diffusers of a prompt and a seed, with these LoRAs at these scales."""
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def picture(prompt: str, seed: int, loras: dict[Path, float], *, steps: int, guidance: float, size: Any) -> Any:
        pipe.unload_lora_weights()
        for file in loras:
            pipe.load_lora_weights(file, adapter_name=file.stem)
        if loras:
            pipe.set_adapters([f.stem for f in loras], adapter_weights=list(loras.values()))
        images = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=size[0],
            height=size[1],
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        return np.round(images * 255).astype(np.uint8)[0]

    return picture


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_life_with_loras_as_inputs(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{family}_bundle")
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    side = 32
    files = [lora_of(folder, tmp_path, rank, seed) for seed, rank in enumerate(RANKS)]
    call: dict[str, Any] = {"steps": 2, "guidance": 3.0, "size": (side, side)}
    prompts, asked = [f"a red circle {i}" for i in range(4)], [{f: 2.0 - 0.2 * i} for i, f in enumerate(files)]
    theirs = diffusers_pipeline(family, folder)
    expected = [theirs(p, 7 + i, a, **call) for i, (p, a) in enumerate(zip(prompts, asked, strict=True))]
    plain = theirs(prompts[0], 7, {}, **call)
    assert psnr(plain, expected[0]) < 50, "the LoRA changes nothing"
    scales = {s: theirs(prompts[0], 7, {files[0]: s}, **call) for s in (0.3, -0.9, 1.2)}
    with stand_in_tensorrt(monkeypatch) as library:
        store = Store(tmp_path / "store")
        adapted = with_low_rank(bundle, "unet", kernels=False)
        for one, components in ((bundle, None), (adapted, ["unet"])):
            sizes = profiles_for(one, sizes=[(side, side)], batches=[1, 4], guidance=True)
            built = build_engines(
                one, backend="tensorrt-rtx", store=store, components=components, options=CAPTURABLE, profiles=sizes
            )
            assert all(b.entry.gate["passed"] for b in built.values())
        spans = [p.spans["rank"] for p in built["unet"].entry.key.profiles]
        assert [(s.minimum, s.maximum) for s in spans] == [(1, MOST_RANK)] * 2
        pipe = fewstep.load(
            bundle, backend="tensorrt-rtx", device="cuda", store=store, build="never", size=(side, side), batch=4
        )
        together = pipe(prompts, seed=7, loras=asked, **call).images
        for i, one in enumerate(expected):
            assert psnr(one, together[i]) >= LEAST
        alone = [pipe(prompts[i], seed=7 + i, loras=asked[i], **call).images[0] for i in range(4)]
        assert all(psnr(a, b) >= LEAST for a, b in zip(alone, expected, strict=True))
        assert psnr(pipe(prompts[0], seed=7, **call).images[0], plain) >= LEAST
        before = dict(pipe.graph_counts)
        for scale, picture in scales.items():
            assert psnr(picture, pipe(prompts[0], seed=7, loras={files[0]: scale}, **call).images[0]) >= LEAST
        counts = pipe.graph_counts
        assert counts["captures"] == before["captures"], "another scale records nothing"
        assert counts["replays"] - before["replays"] >= 3
        assert counts["failures"] == 0
        assert library.driver.device_synchronisations == 0
        assert library.slow_runs == 0
        engine = open_engine(adapted, "unet", backend="tensorrt-rtx", store=store, build="never")
        dims = dict(built["unet"].entry.key.profiles[0].optimum)
        engine.bind({**dims, "rank": 1}).enqueue()
        with pytest.raises(MismatchError, match=f"rank={MOST_RANK + 1}"):
            engine.bind({**dims, "rank": MOST_RANK + 1})
        sums = dict.fromkeys(files, 1.0) | {lora_of(folder, tmp_path, 65, 9): 1.0}  # 174 together
        with pytest.raises(MismatchError, match="rank=256"):
            pipe(prompts[0], seed=7, loras=sums, **call)
        assert np.isfinite(together).all()
