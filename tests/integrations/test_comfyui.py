"""The nodes by ComfyUI's interface: its prompt is validated and executed as its executor does, node by node."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
import torch
from fewstep.errors import ArgumentError
from fewstep.export.embedded import embedded_bundle
from fewstep.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from fewstep.runtime.pictures.workflow import comfy_prompt
from PIL import Image

PROMPT = "a red circle on a blue background"
WIDGETS = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}
SOCKETS = {"FEWSTEP_PIPELINE", "FEWSTEP_SCHEDULE", "LATENT", "IMAGE", "MODEL", "CLIP", "VAE", "CONDITIONING"}


class SaveImage:
    """The core's node, as far as it judges what it is given."""

    OUTPUT_NODE, FUNCTION, RETURN_TYPES, CATEGORY = True, "save_images", (), "image"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

    def save_images(self, images: torch.Tensor, filename_prefix: str) -> Any:
        pixels = [np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8) for image in images]
        return {"ui": {"images": [Image.fromarray(p) for p in pixels]}}


CLASSES: dict[str, Any] = {**NODE_CLASS_MAPPINGS, "SaveImage": SaveImage}


def validated(inputs: dict[str, Any], kind: Any, prompt: dict[str, Any]) -> None:
    """What ComfyUI's `validate_inputs` checks: all that is required, links by type, widgets by kind and range."""
    stated = kind.INPUT_TYPES()
    own = getattr(kind, "VALIDATE_INPUTS", None)
    judged = own.__code__.co_varnames[1 : own.__code__.co_argcount] if own else ()
    for name, (what, *more) in {**stated["required"], **stated.get("optional", {})}.items():
        if name not in inputs:
            assert name not in stated["required"], f"required input is missing: {name}"
            continue
        value, limits = inputs[name], more[0] if more else {}
        if isinstance(value, list):
            source = CLASSES[prompt[value[0]]["class_type"]]
            assert source.RETURN_TYPES[value[1]] == what, f"return type mismatch: {name}"
        elif name in judged:
            continue
        elif isinstance(what, list):
            assert value in what, f"value not in list: {name}"
        else:
            value = WIDGETS[what](value)
            assert limits.get("min", value) <= value <= limits.get("max", value), f"out of range: {name}"
    if own:
        assert own(**{k: v for k, v in inputs.items() if k in judged}) is True


def executed(prompt: dict[str, Any]) -> dict[str, Any]:
    """The outputs of each node, those of what it hangs on first."""
    outputs: dict[str, Any] = {}

    def run(number: str) -> Any:
        if number not in outputs:
            node = prompt[number]
            kind = CLASSES[node["class_type"]]
            validated(node["inputs"], kind, prompt)
            given = {k: run(v[0])[v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
            outputs[number] = getattr(kind(), kind.FUNCTION)(**given)
        return outputs[number]

    for number in prompt:
        run(number)
    return outputs


@pytest.fixture(scope="module")
def pipe() -> fewstep.Pipeline:
    return fewstep.load(embedded_bundle("student")[0])


def link(number: int) -> list[Any]:
    return [str(number), 0]


def sampled(**inputs: Any) -> dict[str, Any]:
    usual = {"pipeline": link(1), "prompt": PROMPT, "negative": "", "seed": 3, "guidance": 0.0, "width": 64}
    usual |= {"height": 64, "batch_size": 1, "denoise": 1.0}
    return {"class_type": "FewstepSample", "inputs": {**usual, **inputs}}


LOAD = {"class_type": "FewstepLoad", "inputs": {"bundle": "student", "backend": "auto"}}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_every_node_has_what_comfyui_asks_of_one(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    assert name in NODE_DISPLAY_NAME_MAPPINGS
    assert node.CATEGORY == "fewstep"
    assert callable(getattr(node(), node.FUNCTION))
    assert isinstance(node.RETURN_TYPES, tuple)
    assert set(node.RETURN_TYPES) <= SOCKETS
    assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
    stated = node.INPUT_TYPES()
    assert stated.keys() <= {"required", "optional", "hidden"}
    code = getattr(node, node.FUNCTION).__code__
    taken = code.co_varnames[1 : code.co_argcount]
    assert list(taken) == [*stated["required"], *stated.get("optional", {})], "called by name, in their order"
    for what, *more in (v for part in stated.values() for v in part.values()):
        assert isinstance(what, list) or what in {*WIDGETS, *SOCKETS}
        assert not more or isinstance(more[0], dict)
    json.dumps(stated)


def test_a_graph_is_the_call_bit_for_bit(pipe: fewstep.Pipeline) -> None:
    schedule = {"sampler": "DPM++ 2M", "schedule": "karras", "steps": 3, "options": '{"compat": "diffusers"}'}
    outputs = executed(
        {
            "1": LOAD,
            "2": {"class_type": "FewstepSchedule", "inputs": schedule},
            "3": sampled(schedule=link(2), batch_size=2, height=72),
            "4": {"class_type": "FewstepDecode", "inputs": {"pipeline": link(1), "samples": link(3)}},
            "5": {"class_type": "SaveImage", "inputs": {"images": link(4), "filename_prefix": "x"}},
        }
    )
    call_ = {"sampler": "DPM++ 2M", "schedule": "karras", "steps": 3, "compat": "diffusers", "guidance": 0.0}
    expected = pipe(PROMPT, seed=3, images_per_prompt=2, size=(64, 72), **call_)
    images, samples = outputs["4"][0], outputs["3"][0]["samples"]
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (2, 72, 64, 3))
    assert 0.0 <= float(images.min()) <= float(images.max()) <= 1.0
    np.testing.assert_array_equal((images.numpy() * 255).round().astype(np.uint8), expected.images)
    scale = pipe.bundle.component("vae_decoder").config.get("scaling_factor", 0.18215)
    np.testing.assert_allclose(samples.numpy() * scale, expected.latents, rtol=1e-5, atol=1e-6)


def test_the_prompt_in_a_picture_makes_it_again(pipe: fewstep.Pipeline, tmp_path: Path) -> None:
    result = pipe(PROMPT, negative="blue", seed=8, steps=2, variation=0.2, variation_seed=4, prompt_syntax="a1111")
    named = {**result.parameters[0], "bundle": "student"}
    prompt = comfy_prompt(json.loads(json.dumps(named)))
    assert prompt is not None
    outputs = executed(prompt)
    (saved,) = outputs[str(len(prompt))]["ui"]["images"]
    assert np.abs(np.asarray(saved).astype(int) - result.images[0]).max() <= 1, (
        "ComfyUI's node cuts, and does not round"
    )
    (image,) = outputs[str(len(prompt) - 1)][0].numpy()
    np.testing.assert_array_equal((image * 255).round().astype(np.uint8), result.images[0])


def test_a_latent_begins_a_second_sampling(pipe: fewstep.Pipeline) -> None:
    """As ComfyUI's users make theirs larger: sample, enlarge the latent, sample with a denoise below 1."""
    from fewstep.runtime.second_pass import SecondPass, in_two_passes

    node = NODE_CLASS_MAPPINGS["FewstepSample"]()
    (model,) = NODE_CLASS_MAPPINGS["FewstepLoad"]().load("student", "auto")
    words = {"prompt": PROMPT, "negative": "", "seed": 3, "guidance": 0.0, "width": 64, "height": 64, "batch_size": 1}
    (first,) = node.sample(model, **words, denoise=1.0)
    larger = torch.nn.functional.interpolate(first["samples"], scale_factor=1.5, mode="bilinear")
    (second,) = node.sample(model, **words, denoise=0.5, latent={"samples": larger})
    (image,) = NODE_CLASS_MAPPINGS["FewstepDecode"]().decode(model, second)
    asked = SecondPass(scale=1.5, upscaler="latent")
    expected = in_two_passes(pipe, PROMPT, seed=3, guidance=0.0, second=asked).images
    error = np.mean((image.numpy() * 255.0 - expected) ** 2)
    assert error == 0 or 10 * np.log10(255**2 / error) >= 80
    with pytest.raises(ArgumentError, match="without a latent"):
        node.sample(model, **words, denoise=0.5)
    with pytest.raises(ArgumentError, match="the latent has shape"):
        node.sample(model, **words, denoise=0.5, latent={"samples": torch.zeros(1, 16, 8, 8)})
    with pytest.raises(ArgumentError, match="options is"):
        NODE_CLASS_MAPPINGS["FewstepSchedule"]().choose("", "", 0, "[1]")


def test_loras_are_of_the_node_s_pipeline_alone(pipe: fewstep.Pipeline) -> None:
    (model,) = NODE_CLASS_MAPPINGS["FewstepLoad"]().load("student", "auto")
    add = NODE_CLASS_MAPPINGS["FewstepLora"]().add
    (styled,) = add(model, "style.safetensors", 0.8, 0.5)
    (both,) = add(styled, "ink.safetensors", 1.0, 0.0)
    assert model.loras == {}
    assert styled.pipeline is model.pipeline
    encoders = dict.fromkeys(pipe.bundle.text_encoders, 0.5)
    assert both.loras["style.safetensors"] == {"unet": 0.8, **encoders}
    with pytest.raises(fewstep.FewstepError, match=r"style\.safetensors"):
        NODE_CLASS_MAPPINGS["FewstepSample"]().sample(styled, PROMPT, "", 1, 0.0, 64, 64, 1, 1.0)


def test_comfyui_s_progress_bar_is_told_and_its_button_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its modules are loaded the nodes use them; here they are a stand-in with those two names."""
    told: list[tuple[int, int]] = []

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None) -> None:
            told.append((value, total or self.total))

    class InterruptProcessingException(Exception):
        pass

    def interrupted() -> None:
        if len(told) > 1:
            raise InterruptProcessingException

    utils, management = types.ModuleType("comfy.utils"), types.ModuleType("comfy.model_management")
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = interrupted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    (model,) = NODE_CLASS_MAPPINGS["FewstepLoad"]().load("student", "auto")
    with pytest.raises(InterruptProcessingException):
        NODE_CLASS_MAPPINGS["FewstepSample"]().sample(model, PROMPT, "", 1, 0.0, 64, 64, 1, 1.0)
    assert told == [(1, 4), (2, 4)]
