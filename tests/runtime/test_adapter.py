"""The same call on diffusers' pipeline and on the adapter: 75 dB, the same signature, the same generator afterwards."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import diffusers
import fewstep
import numpy as np
import pytest
import torch
from fewstep.errors import ArgumentError, UnsupportedError
from fewstep.runtime import diffusers_adapter
from fewstep.runtime.noise.torch_cuda import TorchCudaGenerator
from fewstep.runtime.noise.torch_state import read_generator, write_back
from peers import pipelines, psnr
from test_tasks import disc, drawing

LEAST = 75.0
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"num_images_per_prompt": 2, "negative_prompt": "grey"}),
    ("text", {"prompt": ["a cat", "a dog"], "generator": [3, 4], "height": 40, "width": 32}),
    ("text", {"scheduler": "EulerAncestralDiscreteScheduler", "num_images_per_prompt": 2}),
    ("text", {"scheduler": "DDIMScheduler", "eta": 0.7, "guidance_scale": 1.0}),
    ("text", {"scheduler": "TCDScheduler"}),
    ("text", {"scheduler": "TCDScheduler", "eta": 0.6}),
    ("text", {"scheduler": "EulerDiscreteScheduler", "timesteps": [900, 500, 100]}),
    ("text", {"latents": "made", "negative_prompt": "grey"}),
    ("image", {"strength": 0.6, "num_images_per_prompt": 2}),
    ("image", {"strength": 1.0, "generator": [3, 4], "num_images_per_prompt": 2}),
    ("image", {"prompt": ["a", "b"], "image": [drawing(), drawing(shift=80)], "generator": [3, 4]}),
    ("inpaint", {}),
    ("inpaint", {"strength": 0.7, "num_images_per_prompt": 2, "generator": [3, 4]}),
    ("inpaint", {"strength": 0.7, "num_images_per_prompt": 2, "scheduler": "EulerAncestralDiscreteScheduler"}),
    ("inpaint", {"prompt": ["a", "b"], "image": [drawing(), drawing(shift=80)], "mask_image": [disc(), disc()]}),
]
XL_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"prompt_2": "square", "negative_prompt": "x", "negative_prompt_2": "y", "original_size": (40, 70)}),
    ("text", {"negative_original_size": (9, 8), "negative_target_size": (7, 6), "crops_coords_top_left": (3, 4)}),
    ("text", {"clip_skip": 1, "negative_prompt": "grey"}),
    ("image", {"strength": 0.6, "negative_original_size": (9, 8), "crops_coords_top_left": (3, 4)}),
    ("inpaint", {"strength": 0.6, "target_size": (50, 60), "negative_crops_coords_top_left": (3, 4)}),
]
CASES = [(f, *c) for f in ("sd1", "sdxl") for c in CALLS] + [("sdxl", *c) for c in XL_CALLS]


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest) -> dict[str, Any]:
    made = {}
    for name in ("sd1", "sdxl"):
        ours = fewstep.load(request.getfixturevalue(f"{name}_bundle"))
        made[name] = {"ours": ours, **pipelines(request.getfixturevalue(f"tiny_{name}"), big=name == "sdxl")}
    return made


def run(pipe: Any, call: dict[str, Any]) -> tuple[np.ndarray, list[bytes]]:
    """The images as uint8 [B, H, W, 3], and the generators' states afterwards."""
    seeds = call.pop("generator", 7)
    generators = [torch.Generator().manual_seed(s) for s in (seeds if isinstance(seeds, list) else [seeds])]
    generator = generators if isinstance(seeds, list) else generators[0]
    scheduler = call.pop("scheduler", None)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    out = pipe(generator=generator, **call)
    return np.stack([np.asarray(p) for p in out.images]), [g.get_state().numpy().tobytes() for g in generators]


@pytest.mark.parametrize(("family", "task", "given"), CASES, ids=[f"{f}-{t}-{i}" for i, (f, t, _) in enumerate(CASES)])
def test_the_same_call(pairs: dict[str, Any], family: str, task: str, given: dict[str, Any]) -> None:
    theirs = pairs[family][task]
    theirs = type(theirs)(**theirs.components)  # with a scheduler of its own
    theirs.set_progress_bar_config(disable=True)
    ours = getattr(diffusers_adapter, type(theirs).__name__).from_pretrained(pairs[family]["ours"])
    call = {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 3.0, **given}
    if task != "text":
        call = {"image": drawing(), **call}
    if task == "inpaint":
        call = {"mask_image": disc(), "height": 32, "width": 32, **call}
    if call.get("timesteps"):
        del call["num_inference_steps"]
    if "latents" in call:
        call["latents"] = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    expected, left = run(theirs, dict(call))
    found, after = run(ours, dict(call))
    assert psnr(found, expected) >= LEAST
    for mine, his in zip(after, left, strict=True):
        a, b = torch.Generator(), torch.Generator()
        a.set_state(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        b.set_state(torch.frombuffer(bytearray(his), dtype=torch.uint8))
        assert torch.equal(torch.randn(5, generator=a), torch.randn(5, generator=b)), "the generator goes on as theirs"


@pytest.mark.parametrize("ours", diffusers_adapter.PIPELINES, ids=lambda c: c.__name__)
def test_signatures_are_diffusers_own(ours: Any) -> None:
    theirs = inspect.signature(getattr(diffusers, ours.__name__).__call__)
    named = {n: p.default for n, p in theirs.parameters.items() if n not in ("self", "kwargs")}
    assert list(ours.ARGUMENTS.items()) == list(named.items())


REFUSED = [
    {"ip_adapter_image": drawing()},
    {"cross_attention_kwargs": {"gligen": 0.5}},
    {"guidance_rescale": 0.7},
    {"output_type": "bytes"},
    {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    {"callback_on_step_end": lambda p, i, t, k: {"latents": k["latents"] * 0}},
    {"callback_on_step_end": lambda p, i, t, k: None},
    {"generator": "seed"},
    {"generator": [1, 2, 3]},
]


@pytest.mark.parametrize("given", REFUSED, ids=[f"{next(iter(g))}-{i}" for i, g in enumerate(REFUSED)])
def test_what_cannot_be_honoured_is_refused_by_name(pairs: dict[str, Any], given: dict[str, Any]) -> None:
    pipe = diffusers_adapter.StableDiffusionPipeline.from_pretrained(pairs["sd1"]["ours"])
    with pytest.raises(ArgumentError, match=next(iter(given)).split("_")[0]):
        pipe("x", num_inference_steps=2, **given)


def test_results_callbacks_and_classes(pairs: dict[str, Any]) -> None:
    pipe = diffusers_adapter.StableDiffusionPipeline.from_pretrained(pairs["sd1"]["ours"])
    theirs = pairs["sd1"]["text"]
    seen: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def watch(into: list[Any]) -> Any:
        def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            into.append((index, float(timestep), kwargs["latents"].numpy().copy()))
            return kwargs

        return callback

    for side, each in (("ours", pipe), ("theirs", theirs)):
        generator = torch.Generator().manual_seed(3)
        each("x", num_inference_steps=3, generator=generator, callback_on_step_end=watch(seen[side]))
    assert [s[:2] for s in seen["ours"]] == [s[:2] for s in seen["theirs"]]
    for mine, his in zip(seen["ours"], seen["theirs"], strict=True):
        np.testing.assert_allclose(mine[2], his[2], atol=2e-3)
    out = pipe("x", None, None, 2, generator=3)
    assert out.images[0].size == (32, 32)
    assert out["images"] is out[0]
    assert out.nsfw_content_detected is None
    images, flags = pipe("x", num_inference_steps=2, generator=3, return_dict=False, output_type="latent")
    assert tuple(images.shape) == (1, 4, 16, 16)
    assert flags is None
    with pytest.raises(ArgumentError, match="expected StableDiffusionXLPipeline"):
        diffusers_adapter.StableDiffusionPipeline.from_pretrained(pairs["sdxl"]["ours"])
    image = diffusers_adapter.StableDiffusionImg2ImgPipeline.from_pretrained(pairs["sd1"]["ours"])
    with pytest.raises(UnsupportedError, match="image is ndarray"):
        image("x", image=np.zeros((32, 32, 3)), num_inference_steps=2)
    assert image("x", image=drawing(35, 32), num_inference_steps=2).images[0].size == (34, 32)


class CudaGenerator:
    """The bytes of a CUDA generator's state: seed and offset."""

    device = "cuda"

    def __init__(self, seed: int, offset: int) -> None:
        self.state = torch.tensor(list(seed.to_bytes(8, "little") + offset.to_bytes(8, "little")), dtype=torch.uint8)

    def get_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_state(self, state: torch.Tensor) -> None:
        self.state = state

    def initial_seed(self) -> int:
        return 0


def test_generators_in_the_middle_of_their_stream() -> None:
    for before in (0, 3, 16, 100, 623, 624, 1000):
        theirs = torch.Generator().manual_seed(11)
        torch.randn(before, generator=theirs)
        ours = read_generator(theirs)
        for count in (1, 2, 40, 700):
            np.testing.assert_allclose(ours.randn((count,)), torch.randn(count, generator=theirs).numpy(), atol=2e-6)
        copied = torch.Generator().manual_seed(5)
        write_back(copied, ours)
        assert torch.equal(torch.randn(50, generator=copied), torch.randn(50, generator=theirs))
    cuda = CudaGenerator(9, 8)
    drawn = read_generator(cuda)
    np.testing.assert_array_equal(drawn.randn((4, 8)), TorchCudaGenerator(9, offset=8).randn((4, 8)))
    write_back(cuda, drawn)
    assert int.from_bytes(cuda.get_state().numpy().tobytes()[8:], "little") == 12
