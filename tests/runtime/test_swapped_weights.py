"""Weights replaced in a loaded pipeline: pictures are those of diffusers with these weights, and nothing adds up."""

from __future__ import annotations

import copy
import hashlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import fewstep
import numpy as np
import peft
import pytest
import torch
from checkpoints import make_lora, psnr, randomise, write_lora
from fewstep.bundle import Bundle, read_bundle
from fewstep.engines import Store
from fewstep.errors import ArgumentError, GateError, MismatchError, UnsupportedError
from fewstep.export import export_bundle
from safetensors.torch import load_file, save_file

LEAST = 75.0
CALL: dict[str, Any] = {"steps": 3, "guidance": 4.0, "size": (64, 64), "seed": 3}
PROMPT = "a red circle"


Once = Callable[[str, Callable[[Path], object]], Path]


class Pair:
    """Two checkpoints of one architecture: the folder of each, and its bundle."""

    def __init__(self, family: str, folder: Path, bundle: Bundle, made_once: Once) -> None:
        self.family, self.folder, self.bundle = family, folder, bundle
        self.kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline

        def make(place: Path) -> None:
            pipe = self.kind.from_pretrained(folder)
            for i, name in enumerate(("unet", "text_encoder", "text_encoder_2", "vae")):
                if getattr(pipe, name, None) is not None:
                    randomise(getattr(pipe, name), 70 + i)
            pipe.save_pretrained(place / "checkpoint")
            export_bundle(place / "checkpoint", place / "bundle", quick_gate=True)

        place = made_once(f"another-{family}", make)
        self.other_folder, self.other = place / "checkpoint", read_bundle(place / "bundle")

    def theirs(self, folder: Path) -> Any:
        pipe = self.kind.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pair(request: pytest.FixtureRequest, made_once: Once) -> Pair:
    family = request.param
    folder, bundle = (request.getfixturevalue(n.format(family)) for n in ("tiny_{}", "{}_bundle"))
    return Pair(family, folder, bundle, made_once)


@pytest.fixture(scope="module")
def pipe(pair: Pair) -> fewstep.Pipeline:
    return fewstep.load(pair.bundle, swappable=True, threads=1)


@pytest.fixture(autouse=True)
def base_again(request: pytest.FixtureRequest) -> Any:
    yield
    if "pipe" in request.fixturenames:
        request.getfixturevalue("pipe").load_weights()


def made(pipe: Any, **more: Any) -> np.ndarray:
    return np.asarray(pipe(PROMPT, **{**CALL, **more}).images)


def reference(theirs: Any) -> np.ndarray:
    images = theirs(
        PROMPT,
        num_inference_steps=CALL["steps"],
        guidance_scale=CALL["guidance"],
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(CALL["seed"]),
        output_type="np",
    ).images
    return np.asarray(np.round(images * 255).astype(np.uint8))


def test_another_bundles_weights(pair: Pair, pipe: fewstep.Pipeline) -> None:
    """In every component, those opened later included; and the first ones again to the last bit."""
    first = made(pipe)
    took = pipe.load_weights(pair.other.folder)
    assert set(took) >= {"unet", "vae_decoder", "text_encoder"}
    swapped = made(pipe)
    assert psnr(swapped, reference(pair.theirs(pair.other_folder))) >= LEAST
    picture = np.full((64, 64, 3), 90, np.uint8)
    picture[16:40, 20:50] = 200
    fresh = fewstep.load(pair.other, threads=1)
    expected = made(fresh, image=picture, strength=0.7)
    assert psnr(made(pipe, image=picture, strength=0.7), expected) >= LEAST, "an encoder that was not open yet"
    (told,) = pipe(PROMPT, **CALL).parameters
    assert told["unet_sha256"] == pair.other.component("unet").weights_sha256
    assert pipe.load_weights()
    assert np.array_equal(made(pipe), first)
    assert pipe.load_weights() == {}, "nothing to do"


def test_torchs_modules_take_them_too(pair: Pair) -> None:
    pipe = fewstep.load(pair.bundle, backend="torch", threads=1)
    first = made(pipe)
    addresses = [p.data_ptr() for p in pipe.engines["unet"]._held.parameters()]
    pipe.load_weights(pair.other)
    assert psnr(made(pipe), reference(pair.theirs(pair.other_folder))) >= LEAST
    assert addresses == [p.data_ptr() for p in pipe.engines["unet"]._held.parameters()], "a CUDA graph may hold them"
    pipe.load_weights()
    assert np.array_equal(made(pipe), first)


def test_loras_merged_and_loras_by_request(pair: Pair, pipe: fewstep.Pipeline, tmp_path: Path) -> None:
    """Merged into either bundle's weights; and by request on top of whatever is loaded."""
    one, two = (make_lora(pair.folder, seed=s) for s in (1, 2))
    files = [
        write_lora(lora, tmp_path / f"{i}.safetensors", style, folder=pair.folder)
        for i, (lora, style) in enumerate(((one, "kohya"), (two, "diffusers")))
    ]
    for folder, bundle in ((pair.folder, None), (pair.other_folder, pair.other)):
        theirs = pair.theirs(folder)
        theirs.load_lora_weights(files[0], adapter_name="one")
        theirs.load_lora_weights(files[1], adapter_name="two")
        theirs.set_adapters(["one", "two"], adapter_weights=[0.8, -0.4])
        expected = reference(theirs)
        pipe.load_weights(bundle, loras={files[0]: 0.8, files[1]: -0.4})
        assert psnr(made(pipe), expected) >= LEAST
        pipe.load_weights(bundle, loras={files[0]: 0.8})
        assert psnr(made(pipe, loras={files[1]: -0.4}), expected) >= LEAST
        pipe.load_weights(bundle)
        assert psnr(made(pipe, loras={files[0]: 0.8, files[1]: -0.4}), expected) >= LEAST


def test_dora_as_peft_merges_it(pair: Pair, pipe: fewstep.Pipeline, tmp_path: Path) -> None:
    theirs = pair.theirs(pair.folder)
    modules = {m: p for m, p in make_lora(pair.folder, text=False)["unet"].items() if m.endswith(("to_q", "to_v"))}
    path = write_lora({"unet": modules}, tmp_path / "dora.safetensors", "kohya", folder=pair.folder)
    tensors = load_file(path)
    for module, (down, up) in modules.items():
        layer, flat = theirs.unet.get_submodule(module), f"lora_unet_{module.replace('.', '_')}"
        magnitude = layer.weight.norm(dim=1, keepdim=True).detach() * 1.3
        tensors[f"{flat}.dora_scale"] = magnitude.contiguous()
        factor = 0.9 * float(tensors[f"{flat}.alpha"]) / len(down)
        layer.weight.data = by_peft(layer.weight.data, down, up, magnitude, factor)
    save_file(tensors, path)
    pipe.load_weights(loras={path: 0.9})
    assert psnr(made(pipe), reference(theirs)) >= LEAST
    pipe.load_weights()
    with pytest.raises(UnsupportedError, match="DoRA"):
        pipe(PROMPT, loras={path: 0.9}, **CALL)


def by_peft(weight: Any, down: Any, up: Any, magnitude: Any, factor: float) -> Any:
    """A linear layer's weight with a DoRA, as PEFT merges it."""
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight.clone()
    config = peft.LoraConfig(r=len(down), lora_alpha=factor * len(down), use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down.clone(), up.clone()
    layer.lora_magnitude_vector["default"].weight.data = magnitude.reshape(-1)
    return model.merge_and_unload()[0].weight.detach()


def test_a_thousand_swaps_leave_the_base_as_it_is(tmp_path: Path) -> None:
    """To the last bit, in the file and in the engine; and memory is what it was."""
    from fewstep.export.embedded import embedded_bundle

    bundle = embedded_bundle("student")[0]
    pipe = fewstep.load(bundle, swappable=True, threads=1)
    engine: Any = pipe.engines["unet"]
    before = {n: a.copy() for n, a in engine.held.arrays.items()}
    first, part = made(pipe), bundle.component("unet")
    files = [random_lora(bundle, tmp_path / f"{i}.safetensors", i) for i in range(4)]
    resident = []
    for i in range(500):
        pipe.load_weights(loras={files[i % 4]: 0.5 + i / 1000})
        assert pipe.load_weights()
        if i in (50, 499):
            resident.append(resident_bytes())
    assert np.array_equal(made(pipe), first)
    assert all(np.array_equal(before[n], a) for n, a in engine.held.arrays.items())
    assert hashlib.sha256(bundle.path(part.weights).read_bytes()).hexdigest() == part.weights_sha256
    assert engine.loaded == part.weights_sha256
    assert resident[1] - resident[0] < 16 << 20, resident


def random_lora(bundle: Bundle, path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in load_file(bundle.path(bundle.component("unet").weights)).items():
        if name.endswith(("to_q.weight", "conv1.weight")):
            module = name.removeprefix("model.").removesuffix(".weight")
            up = torch.randn((value.shape[0], 4, *[1] * (value.ndim - 2)), generator=generator) * 0.1
            tensors[f"unet.{module}.lora_A.weight"] = torch.randn((4, *value.shape[1:]), generator=generator) * 0.1
            tensors[f"unet.{module}.lora_B.weight"] = up
    save_file(tensors, path)
    return path


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_request_in_flight_keeps_its_weights(pair: Pair, pipe: fewstep.Pipeline) -> None:
    first, begun, done = made(pipe, steps=12), threading.Event(), []

    def long() -> None:
        done.append(np.asarray(pipe(PROMPT, on_step=lambda step: begun.set(), **{**CALL, "steps": 12}).images))

    thread = threading.Thread(target=long)
    thread.start()
    assert begun.wait(60)
    pipe.load_weights(pair.other)
    assert len(done) == 1, "the change waited"
    thread.join()
    assert np.array_equal(done[0], first)
    assert psnr(made(pipe, steps=12), first) < 40
    open_stream = pipe.stream(pipe.request(PROMPT, **CALL))
    next(open_stream)
    with pytest.raises(ArgumentError, match="not finished"):
        pipe.load_weights()
    open_stream.close()


def test_what_does_not_fit_changes_nothing(
    pair: Pair, pipe: fewstep.Pipeline, sd1_bundle: Bundle, sdxl_bundle: Bundle, tmp_path: Path
) -> None:
    first, loaded = made(pipe), pipe.engines["unet"].loaded  # type: ignore[attr-defined]
    stranger = sdxl_bundle if pair.family == "sd1" else sd1_bundle
    with pytest.raises(MismatchError, match="another architecture"):
        pipe.load_weights(stranger)
    shutil.copytree(pair.other.folder, tmp_path / "wrong")
    shutil.copy(pair.bundle.folder / "reference.safetensors", tmp_path / "wrong" / "reference.safetensors")
    wrong = replace(read_bundle(tmp_path / "wrong"), gate=copy.deepcopy(pair.bundle.gate))
    with pytest.raises(GateError, match="disagrees with torch"):
        pipe.load_weights(wrong)
    with pytest.raises(UnsupportedError, match="swappable=True"):
        fewstep.load(pair.bundle, store=Store(tmp_path / "store"), threads=1).load_weights(pair.other)
    engine: Any = pipe.engines["unet"]
    weights = dict(engine.held.weights)
    name = next(n for n, w in weights.items() if w.ndim == 2)
    for broken in ({**weights, name: weights[name][:-1]}, {n: w for n, w in weights.items() if n != name}):
        with pytest.raises(MismatchError):
            engine.load_weights(broken, "broken")
    assert engine.loaded == loaded
    assert np.array_equal(made(pipe), first)
