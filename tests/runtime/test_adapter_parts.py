"""What a caller sets on diffusers' pipelines, on the adapter too: it changes the picture as theirs, or is refused."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import diffusers
import fewstep
import numpy as np
import onnx
import pytest
import torch
from checkpoints import _text, _unet, _vae, psnr
from commandline import call
from fewstep.errors import ArgumentError, FewstepError, MissingError, UnknownNameError, UnsupportedError
from fewstep.runtime import diffusers_adapter
from fewstep.runtime.diffusers_adapter import base, calling, loading
from fewstep.runtime.diffusers_adapter.methods import INSTEAD, REFUSED
from peers import pipelines
from test_tasks import disc, drawing
from transformers import CLIPTokenizer

LEAST = 75.0
CALL: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def loaded(sd1_bundle: Any) -> Any:
    return fewstep.load(sd1_bundle)


@pytest.fixture
def pair(tiny_sd1: Path, loaded: Any) -> tuple[Any, Any]:
    """diffusers' pipeline and ours, each its own."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1)
    theirs.set_progress_bar_config(disable=True)
    return theirs, diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded)


def picture(pipe: Any, **given: Any) -> np.ndarray:
    call = {**CALL, **given}
    if "generator" not in call:
        call["generator"] = torch.Generator().manual_seed(7)
    return np.stack([np.asarray(p) for p in pipe(**call).images])


def alike(theirs: Any, ours: Any, **given: Any) -> np.ndarray:
    expected = picture(theirs, **given)
    assert expected.std() > 2, "the reference shows nothing"
    assert psnr(expected, picture(ours, **given)) >= LEAST
    return expected


def test_replaced_components(pair: tuple[Any, Any], loaded: Any) -> None:
    """Each changes the picture, and to diffusers', as what is changed in place afterwards. Both bundles stay whole."""
    theirs, ours = pair
    seen = [alike(theirs, ours)]
    tokenizer = CLIPTokenizer.from_pretrained(Path(str(theirs.tokenizer.name_or_path)))
    tokenizer.pad_token = "!"
    parts = {"vae": _vae(51), "unet": _unet(52), "text_encoder": _text(53, tokenizer), "tokenizer": tokenizer}
    for name, part in parts.items():
        for pipe in pair:
            setattr(pipe, name, part)
        assert getattr(ours, name) is part
        seen.append(alike(theirs, ours))
    parts["unet"].load_state_dict(_unet(54).state_dict())
    seen.append(alike(theirs, ours))
    with torch.no_grad():
        parts["vae"].decoder.conv_out.bias += 0.3
    seen.append(alike(theirs, ours))
    tokenizer.pad_token = "a"
    seen.append(alike(theirs, ours))
    for before, after in pairwise(seen):
        assert psnr(before, after) < LEAST, "what was set changed nothing"
    assert ours.pipeline.bundle.gate["components"]["unet"]["status"] == "passed"
    for bundle in (loaded.bundle, ours.pipeline.bundle):
        for component in bundle.components.values():
            onnx.load(bundle.path(component.graph))  # refuses weights that another folder shares by a hard link


def test_components_under_another_class(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ours.vae = theirs.vae = _vae(55)
    image = {"image": drawing(), "strength": 0.6}
    expected = picture(diffusers.StableDiffusionImg2ImgPipeline(**theirs.components), **image)
    made = [
        diffusers_adapter.StableDiffusionImg2ImgPipeline(**ours.components),
        diffusers_adapter.StableDiffusionImg2ImgPipeline.from_pipe(ours),
        diffusers_adapter.AutoPipelineForImage2Image.from_pipe(ours),
    ]
    for pipe in made:
        assert psnr(expected, picture(pipe, **image)) >= LEAST
    assert set(ours.components) == set(theirs.components)
    assert made[1].pipeline is ours.pipeline


def test_a_component_of_another_pipeline(pair: tuple[Any, Any], tiny_sd1: Path, loaded: Any) -> None:
    theirs, ours = pair
    other = diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded, vae=_vae(56))
    theirs.vae = _vae(56)
    plain = diffusers_adapter.StableDiffusionPipeline.from_pretrained(other.pipeline)
    ours.vae = plain.vae
    alike(theirs, ours)
    with pytest.raises(ArgumentError, match="the unet of a pipeline as its vae"):
        ours.vae = ours.unet


def test_a_pruned_bundle_is_exported_again(
    pair: tuple[Any, Any], loaded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What replacing a component left in the cache is listed and deleted with the engines, and made anew when asked."""
    theirs, ours = pair
    tokenizer = CLIPTokenizer.from_pretrained(Path(str(theirs.tokenizer.name_or_path)))
    tokenizer.pad_token = "b"
    theirs.tokenizer = ours.tokenizer = tokenizer
    folder = ours.pipeline.bundle.folder
    name = f"swapped/{folder.name}"
    assert name in call(capsys, "engines", "list")[1]
    assert call(capsys, "engines", "prune", name)[0] == 0
    assert not folder.exists()
    alike(theirs, diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded, tokenizer=tokenizer))
    assert folder.is_dir()


def test_no_generator_is_torchs_own(tiny_sd1: Path, loaded: Any) -> None:
    """`torch.manual_seed` gives diffusers' numbers for every task, and what follows goes on as there."""
    theirs = pipelines(tiny_sd1, big=False)
    tasks: dict[str, dict[str, Any]] = {
        "text": {"num_images_per_prompt": 2},
        "image": {"image": drawing(), "strength": 0.6},
        "inpaint": {"image": drawing(), "mask_image": disc(), "height": 32, "width": 32, "strength": 0.7},
    }
    for task, given in tasks.items():
        after = []
        made = []
        ours = getattr(diffusers_adapter, type(theirs[task]).__name__).from_pretrained(loaded)
        for pipe in (theirs[task], ours):
            torch.manual_seed(20)
            made.append([picture(pipe, generator=None, **given), picture(pipe, generator=None, **given)])
            after.append(torch.randn(4))
        assert torch.equal(*after), task
        assert psnr(made[0][0], made[0][1]) < LEAST, "two calls draw different noise"
        for expected, found in zip(*made, strict=True):
            assert psnr(expected, found) >= LEAST, task


def own(base: Any) -> Any:
    """A subclass of diffusers' class whose `set_timesteps` leaves out the first two of two steps more."""

    class Own(base):
        def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **given: Any) -> None:
            super().set_timesteps(num_inference_steps + 2, device=device, **given)
            self.timesteps = self.timesteps[2:]
            if getattr(self, "sigmas", None) is not None:
                self.sigmas = self.sigmas[2:]
            self.num_inference_steps = num_inference_steps

    return Own


CLASSES = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "DDIMScheduler"),
    *("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"),
    *("LCMScheduler", "TCDScheduler"),
)


@pytest.mark.parametrize("name", CLASSES)
def test_a_subclass_with_its_own_timesteps(pair: tuple[Any, Any], name: str) -> None:
    theirs, ours = pair
    stock = getattr(diffusers, name)
    config = {**theirs.scheduler.config, "clip_sample": False}
    for pipe in pair:
        pipe.scheduler = own(stock).from_config(config)
    changed = alike(theirs, ours)
    image = [getattr(lib, "StableDiffusionImg2ImgPipeline") for lib in (diffusers, diffusers_adapter)]  # noqa: B009
    alike(*(c(**p.components) for c, p in zip(image, pair, strict=True)), image=drawing(), strength=0.6)
    ours.scheduler = stock.from_config(config)
    assert psnr(changed, picture(ours)) < LEAST, "the subclass changed nothing"


class Steps(diffusers.EulerDiscreteScheduler):
    def step(self, *given: Any, **named: Any) -> Any:
        return super().step(*given, **named)


class TwoStages(diffusers.HeunDiscreteScheduler):
    def set_timesteps(self, *given: Any, **named: Any) -> None:
        super().set_timesteps(*given, **named)


class Patched(diffusers.EulerDiscreteScheduler):
    """Changes nothing in its class."""


def patched(config: Any) -> Any:
    scheduler = Patched.from_config(config)
    scheduler.scale_model_input = lambda sample, timestep: sample
    return scheduler


def with_other_tables(config: Any) -> Any:
    scheduler = Patched.from_config(config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    return scheduler


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Steps.from_config, "changes step of diffusers' EulerDiscreteScheduler"),
        (patched, "changes scale_model_input"),
        (with_other_tables, "alphas_cumprod of the scheduler"),
        (TwoStages.from_config, "subclass of HeunDiscreteScheduler"),
        (own(diffusers.PNDMScheduler).from_config, "subclass of PNDMScheduler"),
        (lambda config: "euler", "the scheduler is str"),
        (lambda config: diffusers.FlowMatchEulerDiscreteScheduler(), "flow matching"),
    ],
    ids=["step", "instance", "tables", "two stages", "pndm", "text", "flow"],
)
def test_other_changes_of_a_scheduler_are_refused(pair: tuple[Any, Any], make: Any, words: str) -> None:
    ours = pair[1]

    def use() -> None:
        ours.scheduler = make(ours.scheduler.config)
        picture(ours)

    with pytest.raises(ArgumentError, match=words):
        use()


def test_a_harmless_subclass_runs_as_its_class(pair: tuple[Any, Any]) -> None:
    for pipe in pair:
        pipe.scheduler = Patched.from_config(pipe.scheduler.config)
    alike(*pair)


SET: list[tuple[str, Any]] = [
    ("vae", 3),
    ("unet", None),
    ("vae", torch.nn.Linear(2, 2)),
    ("vae", _vae(57, latent_channels=8)),
    ("unet", _unet(58, cross_attention_dim=16)),
    ("safety_checker", object()),
    ("_interrupt", True),
    ("_guidance_scale", 2.0),
    ("note", "mine"),
]


@pytest.mark.parametrize(("name", "value"), SET, ids=[f"{n}-{type(v).__name__}" for n, v in SET])
def test_what_cannot_be_set_is_refused_and_changes_nothing(loaded: Any, name: str, value: Any) -> None:
    pipe = diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded)
    with pytest.raises(ArgumentError, match=name):
        setattr(pipe, name, value)
    assert pipe.pipeline is loaded


def test_compiling_changes_nothing(pair: tuple[Any, Any]) -> None:
    """`torch.compile` of an engine's component is that component, and of a module the module."""
    theirs, ours = pair
    before = ours.pipeline
    ours.unet = torch.compile(ours.unet, mode="reduce-overhead", fullgraph=True)
    assert ours.unet.to(memory_format=torch.channels_last) is not None
    assert ours.pipeline is before
    theirs.vae = _vae(51)
    ours.vae = torch.compile(theirs.vae)
    assert ours.vae is theirs.vae
    alike(theirs, ours)
    with pytest.raises(UnsupportedError, match=r"unet\.to"):
        ours.unet.to("cuda")


def test_empty_components_are_empty(loaded: Any) -> None:
    pipe = diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded, safety_checker=None)
    pipe.safety_checker = None
    assert pipe.safety_checker is None


OPTIONS: list[dict[str, Any]] = [
    {"surprise": 1},
    {"torch_dtype": torch.float16},
    {"torch_dtype": torch.int8},
    {"use_safetensors": False},
    {"variant": "fp16"},
    {"revision": "main"},
    {"safety_checker": object()},
    {"add_watermarker": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[f"{next(iter(o))}-{i}" for i, o in enumerate(OPTIONS)])
def test_options_of_loading_are_refused_by_name(sd1_bundle: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        diffusers_adapter.DiffusionPipeline.from_pretrained(sd1_bundle.folder, **options)


def test_methods_that_change_no_picture_say_what_is_done(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe = diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded)
    before = picture(pipe)
    with caplog.at_level(logging.WARNING, "fewstep"):
        for name in INSTEAD:
            getattr(pipe, name)()
        pipe.enable_attention_slicing("max")
    said = [r.message for r in caplog.records]
    assert sum(m.startswith("enable_attention_slicing does nothing here: attention") for m in said) == 1
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.pipeline.vae.slicing is True
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert np.array_equal(picture(pipe), before)


def test_what_diffusers_has_and_this_has_not_is_refused_by_name(loaded: Any) -> None:
    pipe = diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded)
    theirs = {n for n in dir(diffusers.StableDiffusionPipeline) if not n.startswith("_")}
    known = {n for n in theirs if n in INSTEAD or hasattr(pipe, n)}
    assert {"components", "config", "device", "dtype", "to", "from_pipe", "enable_attention_slicing"} <= known
    for name in (theirs - known) | set(REFUSED):
        for owner in (pipe, type(pipe)):
            with pytest.raises(diffusers_adapter.UnsupportedAttributeError, match=name):
                getattr(owner, name)
    with pytest.raises(UnknownNameError, match="callback_steps"):
        pipe("x", callback_steps=2)
    with pytest.raises(UnsupportedError, match=r"vae\.decode"):
        pipe.vae.decode(None)


def test_devices_and_precisions(loaded: Any) -> None:
    pipe = diffusers_adapter.StableDiffusionPipeline.from_pretrained(loaded)
    assert pipe.to("cpu").to(torch.float32).to(device=torch.device("cpu"), dtype=torch.float32) is pipe
    assert pipe.pipeline is loaded
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    for given, words in ((torch.float16, "float16"), ("mps", "mps")):
        with pytest.raises(UnsupportedError, match=words):
            pipe.to(given)
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="CUDA"):
            pipe.to("cuda")
    assert pipe.unet.config.sample_size == pipe.unet.config["sample_size"] == 16
    assert pipe.vae.config.scaling_factor == pytest.approx(0.18215)
    assert (pipe.tokenizer.model_max_length, pipe.vae_scale_factor) == (77, 2)
    with pytest.raises(FewstepError, match="sample_size"):
        pipe.unet.config.sample_size = 32


def test_the_classes_that_choose(loaded: Any, sdxl_bundle: Any) -> None:
    chosen = {
        "DiffusionPipeline": "StableDiffusion{}Pipeline",
        "AutoPipelineForText2Image": "StableDiffusion{}Pipeline",
        "AutoPipelineForImage2Image": "StableDiffusion{}Img2ImgPipeline",
        "AutoPipelineForInpainting": "StableDiffusion{}InpaintPipeline",
    }
    xl = fewstep.load(sdxl_bundle)
    for name, pattern in chosen.items():
        for source, family in ((loaded, ""), (xl, "XL")):
            made = getattr(diffusers_adapter, name).from_pretrained(source)
            assert type(made).__name__ == pattern.format(family)
        with pytest.raises(ArgumentError, match=name):
            getattr(diffusers_adapter, name)()
    older = replace(loaded.bundle, guidance_embedding=8, pipeline=None)
    assert base.class_for(older, "text").__name__ == "LatentConsistencyModelPipeline"


def test_the_document_names_what_is_quiet_and_what_is_refused() -> None:
    text = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\w+", text))
    own = {*calling.REFUSED, *loading.IGNORED, *loading.ABSENT, *loading.READ}
    assert {*INSTEAD, *REFUSED, *own} <= listed
    assert {p.__name__ for p in diffusers_adapter.PIPELINES if "XL" not in p.__name__} - listed == {
        "StableDiffusionInpaintPipeline"
    }


BARE = """
import sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None
from fewstep.runtime.diffusers_adapter import StableDiffusionPipeline
assert "fewstep.export" not in sys.modules
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
picture = pipe("a red circle", num_inference_steps=2, generator=3).images[0]
assert "fewstep.export" not in sys.modules
shown = pipe.scheduler
assert shown.config.steps_offset == 1 and repr(shown).startswith("PNDMScheduler {")
for use in (lambda: shown.compatibles, lambda: setattr(pipe, "vae", object())):
    try:
        use()
    except Exception as error:
        print(type(error).__name__, error)
print(picture.size)
"""


def test_without_diffusers_and_torch(sd1_bundle: Any) -> None:
    command = [sys.executable, "-c", BARE, str(sd1_bundle.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, size = done.stdout.splitlines()
    assert first.startswith("UnsupportedAttributeError scheduler.compatibles without diffusers")
    assert second.startswith("MissingExtraError Exporting a component needs the module 'diffusers'")
    assert size == "(32, 32)"
