"""Every implementation of slots is held to one protocol: the NumPy slots, and torch's, eager and recorded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from device_models import (
    NOISE,
    SDXL,
    SHAPE,
    TOKENS,
    Image,
    decoder,
    engine,
    program,
    psnr,
    unet,
    unet_of_variance,
)
from fewstep.engines import Engine
from fewstep.errors import ArgumentError
from fewstep.runtime import Slots
from fewstep.runtime.device.base import VARIANCE, Device
from fewstep.runtime.device.cuda_graphs import GraphCache, TapeRecorder
from fewstep.runtime.device.numpy_slots import NumpyDevice, NumpySlots
from fewstep.runtime.device.torch_device import TorchDevice
from fewstep.runtime.device.torch_slots import TorchSlots
from fewstep.schedules import program_from_diffusers
from fewstep.schedules.solvers.registry import SAMPLERS

Make = Callable[..., Slots]
NAMES = sorted(set(SAMPLERS) - {"edm_euler"})


def eager(model: Engine, count: int) -> Slots:
    return TorchSlots(model, slots=count, shape=SHAPE, device="cpu")


def recorded(model: Engine, count: int) -> Slots:
    return TorchSlots(model, slots=count, shape=SHAPE, device="cpu", graphs=GraphCache(TapeRecorder(), most=64))


def numpy(model: Engine, count: int) -> Slots:
    return NumpySlots(model, slots=count, shape=SHAPE)


@pytest.fixture(scope="module")
def model() -> Engine:
    return unet()


@pytest.fixture(params=[numpy, eager, recorded], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def reference(model: Engine, image: Image) -> np.ndarray:
    """The program's own loop in float64 on the engine's output, with diffusers' rule of inpainting written out."""
    sampling, gaussian, latent = image.sampling()
    rows, tokens = sampling.rows, sampling.tokens
    binding = model.bind({"rows": rows, "height": SHAPE[1], "width": SHAPE[2], "tokens": tokens})
    plan = sampling.program

    def network(x: np.ndarray, t: float) -> Any:
        binding.inputs["sample"][...] = x
        binding.inputs["timestep"][...] = t
        for row, arrays in enumerate(sampling.conditioning.parts(0)):
            for name, values in arrays.items():
                binding.inputs[name][row] = values
        binding.enqueue()
        out = binding.outputs["out"].astype(np.float64)
        out = out[0] if rows == 1 else out[0] + sampling.guidance * (out[1] - out[0])
        return out if plan.spread is None else (out, binding.outputs[VARIANCE][rows - 1].astype(np.float64))

    assert sampling.blend is None
    state = plan.run(network, gaussian.astype(np.float64), lambda: sampling.noise.randn(SHAPE), latent)
    return np.asarray(state)


def finish(slots: Slots, slot: int) -> np.ndarray:
    out = np.empty(SHAPE, np.float32)
    slots.result(slot, out)
    slots.release(slot)
    return out


def alone(slots: Slots, image: Image) -> np.ndarray:
    slot = slots.admit(*image.sampling())
    for _ in range(image.program.evaluations):
        slots.tick([slot])
    return finish(slots, slot)


def test_no_implementation_lacks_or_adds_a_word() -> None:
    """What callers may use of slots and devices is what the protocol names, with the same arguments."""
    public = {n for n in vars(Slots) if not n.startswith("_")}
    for kind in (NumpySlots, TorchSlots):
        assert not inspect.isabstract(kind)
        for name in public - {"recordings", "bytes", "count", "free"}:
            assert inspect.signature(getattr(kind, name)) == inspect.signature(getattr(Slots, name)), (kind, name)
    wanted = {n for n in vars(Device) if not n.startswith("_")}
    for device in (NumpyDevice(), TorchDevice("cpu:torch")):
        assert wanted <= set(dir(device)), wanted - set(dir(device))
        for name in wanted:
            if callable(getattr(Device, name)):
                ours, theirs = (inspect.signature(getattr(d, name)) for d in (type(device), Device))
                assert list(ours.parameters) == list(theirs.parameters), (device, name)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_sampler_is_its_programs_own_loop(model: Engine, make: Make, guidance: float) -> None:
    slots = make(model, 1)
    for i, name in enumerate(NAMES):
        image = Image(program(name, 4, start=i % 2), seed=i, guidance=guidance)
        assert psnr(alone(slots, image), reference(model, image)) >= 80.0, name


@pytest.fixture(scope="module")
def by_numpy(model: Engine) -> Callable[[Image], np.ndarray]:
    """What an image comes to alone on the NumPy slots, made once."""
    slots = NumpySlots(model, slots=1, shape=SHAPE)
    return functools.cache(lambda image: alone(slots, image))


@pytest.mark.parametrize("masked", ["binary", "soft"])
def test_inpainting_is_the_same_everywhere(
    model: Engine, make: Make, masked: str, by_numpy: Callable[[Image], np.ndarray]
) -> None:
    """All samplers that admit the mask in one batch beside an image without one; what is kept is the picture."""
    names = [n for n in NAMES if masked == "binary" or not program(n).anchored]
    assert len(names) > 5
    images = [Image(program(n, 3), i, (2.0, 1.0)[i % 2], masked=masked) for i, n in enumerate(names)]
    images.append(Image(program("euler", 3), 99, 2.0))
    slots = make(model, len(images))
    held = [slots.admit(*image.sampling()) for image in images]
    while going := [s for s in held if not slots.sampling(s).done]:
        slots.tick(going)
    for slot, image in zip(held, images, strict=True):
        (sampling, _, latent), name = image.sampling(), image.program.sampler
        out = finish(slots, slot)
        assert psnr(out, by_numpy(image)) >= 80.0, name
        if sampling.blend is not None:
            kept = np.broadcast_to(sampling.blend.mask == 0.0, SHAPE)
            np.testing.assert_allclose(out[kept], latent[kept], rtol=1e-4, atol=1e-4, err_msg=name)
            assert np.abs(out[~kept] - latent[~kept]).max() > 0.1, "nothing was made anew"


def test_latents_and_previews_follow_each_tick(model: Engine, make: Make) -> None:
    """`latent` is the state in diffusers' coordinates after each evaluation, a preview what the evaluation saw."""
    image = Image(program("dpmpp_2m", 5, prediction="v_prediction"), 2, 3.0)
    slots, plain = make(model, 2), NumpySlots(model, slots=1, shape=SHAPE)
    ours, theirs = slots.admit(*image.sampling()), plain.admit(*image.sampling())
    for i in range(5):
        x0 = np.empty((2, *SHAPE), np.float32)
        slots.tick([ours], {ours: x0[0]})
        plain.tick([theirs], {theirs: x0[1]})
        assert psnr(x0[0], x0[1]) >= 80.0
        assert psnr(slots.latent(ours), plain.latent(theirs)) >= 80.0
        assert slots.sampling(ours).position == i + 1
    np.testing.assert_allclose(slots.latent(ours), finish(slots, ours), rtol=1e-5, atol=1e-6)


def test_a_whole_request_is_its_ticks_and_the_decoder(model: Engine, make: Make) -> None:
    vae, slots = decoder(), make(model, 2)
    images = [Image(program("dpmpp_2m_sde", 3), 1, 2.0, masked="binary"), Image(program("euler", 3), 2, 2.0)]
    held = [slots.admit(*i.sampling()) for i in images]
    decoded = slots.run(held, vae)
    binding = vae.bind({"batch": 2, "height": SHAPE[1], "width": SHAPE[2]})
    plain = NumpySlots(model, slots=1, shape=SHAPE)
    for slot, image, latent, into in zip(held, images, decoded.latents, binding.inputs["latent"], strict=True):
        into[...] = alone(plain, image)
        assert psnr(latent, into) >= 80.0
        assert slots.sampling(slot).done
    binding.enqueue()
    assert np.abs(decoded.images.astype(int) - binding.outputs["image"]).max() <= 1
    assert decoded.finite.tolist() == [True, True]
    with pytest.raises(ArgumentError, match="slots of one request at its beginning"):
        slots.run(held, vae)


def test_conditioning_is_checked_by_name_and_shape(make: Make) -> None:
    slots = make(engine("unet", SDXL, 4), 1)
    good, gaussian, _ = Image(program("euler", 2), 1, extra=True).sampling()
    arrays = dict(good.conditioning.positive)

    def refuse(words: str, **changes: Any) -> None:
        told = {n: a for n, a in {**arrays, **changes}.items() if a is not None}
        with pytest.raises(ArgumentError, match=words):
            slots.admit(replace(good, conditioning=replace(good.conditioning, positive=told)), gaussian)
        assert slots.free == [0]

    refuse("lacks 'time_ids'", time_ids=None)
    refuse("has 'control_image'", control_image=np.zeros((3, 8, 8), np.float32))
    refuse(r"time_ids has shape \[5\].*\[6\]", time_ids=np.zeros(5, np.float32))
    refuse(r"encoder_hidden_states has shape", encoder_hidden_states=arrays["encoder_hidden_states"][:, :-1])
    refuse(r"encoder_hidden_states has shape", encoder_hidden_states=arrays["encoder_hidden_states"][: TOKENS - 1])
    assert slots.admit(good, gaussian) == 0


def test_slots_are_counted_and_refused(model: Engine, make: Make) -> None:
    slots = make(model, 2)
    image = Image(program("euler", 2), 1)
    assert (slots.count, slots.free, slots.shape) == (2, [0, 1], SHAPE)
    for use in (lambda: slots.tick([0]), lambda: slots.latent(0), lambda: slots.result(0, np.empty(SHAPE, np.float32))):
        with pytest.raises(ArgumentError, match="slot 0 is free"):
            use()
    held = [slots.admit(*image.sampling()) for _ in range(2)]
    with pytest.raises(ArgumentError, match="all 2 slots are in use"):
        slots.admit(*image.sampling())
    sampling, gaussian, _ = Image(program("euler", 4, start=2), 1).sampling()
    slots.release(held[0])
    with pytest.raises(ArgumentError, match="starts from a latent and none was given"):
        slots.admit(sampling, gaussian)
    assert slots.free == [0]
    assert slots.bytes > 0


def test_times_are_those_since_they_were_taken(model: Engine, make: Make) -> None:
    slots = make(model, 1)
    slot = slots.admit(*Image(program("euler", 3), 1, 2.0).sampling())
    slots.take_times()
    for _ in range(2):
        slots.tick([slot])
    times = slots.take_times()
    assert len(times.evaluations) == 2
    assert min(times.evaluations) > 0
    assert slots.take_times().evaluations == []


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler"])
def test_clipping_is_done(model: Engine, make: Make, name: str) -> None:
    """Beside an image whose sampler does not clip, in the same evaluations."""
    config = {**NOISE.config, "_class_name": name, "clip_sample": True, "clip_sample_range": 0.7}
    image = Image(program_from_diffusers(config, steps=4), seed=3, guidance=2.0)
    other = Image(program_from_diffusers({**NOISE.config, "_class_name": "DDIMScheduler"}, steps=4), seed=5)
    slots = make(model, 2)
    admitted = [slots.admit(*i.sampling()) for i in (image, other)]
    previews = {s: np.zeros(SHAPE, np.float32) for s in admitted}
    for _ in range(image.sampling()[0].program.evaluations):
        slots.tick([s for s in admitted if not slots.sampling(s).done], previews)
        assert np.abs(previews[admitted[0]]).max() <= np.float32(0.7)
    assert np.abs(previews[admitted[1]]).max() > 0.7
    for slot, one in zip(admitted, (image, other), strict=True):
        out = np.zeros(SHAPE, np.float32)
        slots.result(slot, out)
        assert psnr(out, reference(model, one)) >= 80.0


BOUNDED = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.3}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_thresholding_and_learned_variance_are_done(make: Make, guidance: float) -> None:
    """Images of several samplers in the same evaluations, recorded ones too; the variance is the prompt's row's."""
    model = unet_of_variance()
    kinds: list[dict[str, Any]] = [
        {"_class_name": "DDPMScheduler", "variance_type": "learned_range", **BOUNDED},
        {"_class_name": "DPMSolverMultistepScheduler", **BOUNDED, "dynamic_thresholding_ratio": 0.95},
        {"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 0.7},
        {"_class_name": "EulerDiscreteScheduler"},
    ]
    images = [
        Image(program_from_diffusers({**NOISE.config, **k}, steps=4), seed=i, guidance=guidance if i % 2 == 0 else 1.0,
              tokens=77)
        for i, k in enumerate(kinds)
    ]  # fmt: skip
    slots = make(model, len(images))
    for _ in range(2):  # what is recorded is replayed for other slots
        held = [slots.admit(*i.sampling()) for i in images]
        previews = {s: np.zeros(SHAPE, np.float32) for s in held}
        while active := [s for s in held if not slots.sampling(s).done]:
            slots.tick(active, previews)
            assert np.abs(previews[held[0]]).max() <= 1.0
            assert np.abs(previews[held[2]]).max() <= np.float32(0.7)
        for slot, image in zip(held, images, strict=True):
            assert psnr(finish(slots, slot), reference(model, image)) >= 80.0, image.program.sampler
    plain = replace(images[0].program, clip=None)
    assert psnr(reference(model, replace(images[0], program=plain)), reference(model, images[0])) < 40
    narrow = replace(images[0].program, spread=None)
    assert psnr(reference(model, replace(images[0], program=narrow)), reference(model, images[0])) < 60


def test_a_variance_that_no_network_says(model: Engine, make: Make) -> None:
    config = {**NOISE.config, "_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    image = Image(program_from_diffusers(config, steps=3), seed=1)
    with pytest.raises(ArgumentError, match="the UNet says none"):
        make(model, 1).admit(*image.sampling())
