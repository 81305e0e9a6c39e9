"""The pipeline as its users meet it: requests, slots, progress, previews, cancelling, guards, threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.errors import (
    ArgumentError,
    BlackImageError,
    CancelledError,
    CorruptError,
    FewstepError,
    MissingError,
    NonFiniteError,
)
from fewstep.runtime.conditioning import Conditioning
from fewstep.runtime.device.base import Sampling
from fewstep.runtime.device.numpy_slots import NumpySlots
from fewstep.runtime.pictures.parameters import command_line, read_parameters
from fewstep.runtime.pictures.reading import open_image
from fewstep.runtime.programs import choose_program
from fewstep.runtime.request import make_request
from PIL import Image

CALL = {"steps": 3, "guidance": 3.0, "sampler": "dpmpp_2m"}


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Any) -> fewstep.Pipeline:
    return fewstep.load(sd1_bundle)


def test_a_seed_is_an_image_whatever_the_batch(pipe: fewstep.Pipeline) -> None:
    together = pipe("a", seed=[4, 9, 2], **CALL)
    for i, seed in enumerate((4, 9, 2)):
        alone = pipe("a", seed=seed, **CALL)
        assert np.abs(alone.images[0].astype(int) - together.images[i]).max() <= 1
    assert pipe("a", seed=4, images_per_prompt=3, **CALL).seeds == (4, 5, 6)
    again = pipe("a", seed=[4, 9, 2], **CALL)
    np.testing.assert_array_equal(again.images, together.images)
    assert pipe("a", **CALL).seeds != pipe("a", **CALL).seeds, "no seed must mean a fresh one"


def test_slots_mix_programs_prompts_and_guidance(pipe: fewstep.Pipeline) -> None:
    """Requests that share every evaluation end where they end alone, though they join and leave between ticks."""
    specs = [("euler", 5, 4.0), ("dpmpp_2m", 3, 1.0), ("lcm", 4, 1.0), ("heun", 3, 2.0), ("lms", 6, 7.5)]
    shape = (4, 16, 16)
    slots = NumpySlots(pipe.engines["unet"], slots=3, shape=shape)

    def sampling(index: int) -> tuple[Sampling, np.ndarray]:
        from fewstep.runtime.noise.seeds import TorchCpuGenerator

        sampler, steps, guidance = specs[index]
        noise = TorchCpuGenerator(index)
        positive, negative = pipe.text.encode([f"prompt {index}", ""])
        program = choose_program(pipe.bundle, sampler=sampler, schedule=None, steps=steps, options={})
        gaussian = noise.randn(shape)
        told = Conditioning(
            positive=positive.arrays, negative=negative.arrays if guidance > 1 else None, tokens=positive.tokens
        )
        return Sampling(program=program, noise=noise, conditioning=told, guidance=guidance), gaussian

    def finish(slot: int) -> np.ndarray:
        out = np.empty(shape, np.float32)
        slots.result(slot, out)
        slots.release(slot)
        return out

    alone = []
    for i in range(len(specs)):
        one, gaussian = sampling(i)
        slot = slots.admit(one, gaussian)
        while not one.done:
            slots.tick([slot])
        alone.append(finish(slot))
    waiting, active, shared = list(range(len(specs))), {}, {}
    while waiting or active:
        while waiting and slots.free:
            one, gaussian = sampling(waiting[0])
            active[slots.admit(one, gaussian)] = waiting.pop(0)
        slots.tick(list(active))
        for slot in [s for s in active if slots.sampling(s).done]:
            shared[active.pop(slot)] = finish(slot)
    for i, expected in enumerate(alone):
        np.testing.assert_allclose(shared[i], expected, atol=2e-4, err_msg=str(specs[i]))


def test_a_nan_of_the_former_image_is_gone(pipe: fewstep.Pipeline) -> None:
    shape = (4, 16, 16)
    slots = NumpySlots(pipe.engines["unet"], slots=1, shape=shape)
    program = choose_program(pipe.bundle, sampler="dpmpp_3m", schedule=None, steps=4, options={})
    (embedding,) = pipe.text.encode(["x"])
    told = Conditioning(positive=embedding.arrays, negative=None, tokens=embedding.tokens)

    def run(gaussian: np.ndarray) -> np.ndarray:
        slot = slots.admit(
            Sampling(program=program, noise=None, conditioning=told),  # type: ignore[arg-type]
            gaussian,
        )
        try:
            for _ in range(program.evaluations):
                slots.tick([slot])
            out = np.empty(shape, np.float32)
            slots.result(slot, out)
            return out
        finally:
            slots.release(slot)

    good = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before = run(good)
    with pytest.raises(NonFiniteError, match="latent holds NaN"):
        run(np.full(shape, np.nan, np.float32))
    np.testing.assert_array_equal(run(good), before)


def test_progress_previews_and_cancelling(pipe: fewstep.Pipeline) -> None:
    request = pipe.request("a", seed=1, steps=4, guidance=2.0)
    stream, steps = pipe.stream(request, previews=True), []
    while True:
        try:
            steps.append(next(stream))
        except StopIteration as stop:
            result = stop.value
            break
    assert [s.index for s in steps] == list(range(request.program.evaluations))
    assert steps[0].preview().shape == result.images.shape
    assert np.abs(steps[-1].preview().astype(int) - result.images).mean() < 3, "the last preview is the picture"
    assert {"text", "denoise", "decode", "total"} <= set(result.timings)
    assert len(result.timings["evaluations"]) == len(steps)
    first = pipe.stream(request)
    next(first)
    first.close()
    cancel = threading.Event()
    with pytest.raises(CancelledError, match="after 2 of"):
        pipe("a", seed=1, steps=6, cancel=cancel, on_step=lambda s: cancel.set() if s.index == 1 else None)
    np.testing.assert_array_equal(pipe("a", seed=1, steps=4, guidance=2.0).images, result.images)


def test_several_threads_share_a_pipeline(pipe: fewstep.Pipeline) -> None:
    expected = [pipe(f"thing {i % 3}", seed=i, **CALL).images for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: pipe(f"thing {i % 3}", seed=i, **CALL).images, range(6)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps is 0"),
    ({"steps": 2.5}, "steps is 2.5"),
    ({"steps": True}, "steps is True"),
    ({"guidance": float("nan")}, "guidance is nan"),
    ({"guidance": float("inf")}, "guidance is inf"),
    ({"guidance": "7"}, "guidance is '7'"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": [1, 2.0]}, "seed is 2.0"),
    ({"seed": []}, "0 images"),
    ({"size": (33, 32)}, "width is 33; expected a multiple of 2. Use 32 or 34"),
    ({"size": (32, 0)}, "height is 0"),
    ({"size": 32}, "size is 32"),
    ({"sampler": "eulr"}, "expected one like euler"),
    ({"schedule": "karas", "sampler": "euler"}, "karras"),
    ({"prompt": "\ud800"}, "surrogate"),
    ({"prompt": 5}, "the prompt is int"),
    ({"negative": 5}, "the negative prompt is int"),
    ({"prompt": "x" * 30_000}, "30000 characters"),
    ({"negative": ["a", "b"]}, "2 negative prompts for 1 images"),
    ({"images_per_prompt": 0}, "images_per_prompt is 0"),
    ({"image": Image.new("RGB", (32, 32)), "strength": 0.1, "steps": 4}, "leaves no step.*Use steps=10"),
    ({"image": Image.new("RGB", (32, 32)), "strength": 1.5}, "strength is 1.5"),
    ({"image": np.zeros((4, 4), np.uint8)}, "uint8 \\[H, W, 3\\]"),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=[f"{next(iter(g))}-{i}" for i, (g, _) in enumerate(BAD)])
def test_bad_requests_say_what_mends_them(pipe: fewstep.Pipeline, given: dict[str, Any], words: str) -> None:
    given = {"prompt": "x", "steps": 2, **given}
    with pytest.raises(ArgumentError, match=words) as caught:
        pipe(given.pop("prompt"), **given)
    assert caught.value.exit_code == 2


MORE_BAD: list[tuple[dict[str, Any], str]] = [
    ({"sigmas": 5}, "sigmas is 5; expected a list of numbers"),
    ({"timesteps": []}, "timesteps is"),
    ({"sigmas": [1.0, float("nan")]}, "finite numbers"),
    ({"image": 5}, "the image is int"),
    ({"image": "a" * 5000}, "no file"),
    ({"image": np.zeros((8, 8, 3), np.uint8), "strength": 1e-320}, "leaves no step"),
    ({"sampler": "euler", "prediction": "sample"}, "prediction cannot be set"),
    ({"seed": 2**64 - 1, "images_per_prompt": 2}, "seed is 18446744073709551616"),
    ({"compat": "comfy"}, "unknown compat 'comfy'"),
    ({"compat": "comfy", "sampler": "euler"}, "unknown compat 'comfy'"),
    ({"sampler": ""}, "unknown sampler ''"),
    ({"timesteps": [999, 500, 1]}, "steps is 2, and the timesteps make 3"),
    ({"sigmas": [14.0, 0.0], "sampler": "euler"}, "steps is 2, and the sigmas make 1"),
    ({"options": "eta"}, "options is 'eta'"),
    ({"options": {3: 0.5}}, "options is"),
    ({"shared_stream": "no"}, "shared_stream is 'no'; expected True or False"),
    ({"strength": 0.5}, "strength 0.5 without an image"),
    ({"image": []}, "the image is an empty list"),
    ({"pooled_prompt_embeds": np.zeros((1, 4), np.float32)}, "pooled_prompt_embeds for a model with one"),
]


@pytest.mark.parametrize(
    ("given", "words"), MORE_BAD, ids=[f"{next(iter(g))}-{i}" for i, (g, _) in enumerate(MORE_BAD)]
)
def test_odd_arguments_are_typed_errors(pipe: fewstep.Pipeline, given: dict[str, Any], words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        pipe("x", **{"steps": 2, **given})


def test_arguments_that_broadcast(pipe: fewstep.Pipeline) -> None:
    assert len(pipe(["x"], negative=["y"], seed=range(2), steps=1).images) == 2
    assert pipe("x", seed=np.array(5), steps=1).seeds == (5,)
    levels = pipe("x", seed=1, sampler="euler", guidance=1.0, sigmas=np.array([14.6, 3.0, 0.0]))
    assert len(levels.timings["evaluations"]) == 2


def test_a_stream_runs_the_request_it_was_made_for(pipe: fewstep.Pipeline) -> None:
    picture = np.full((32, 32, 3), 90, np.uint8)
    request = pipe.request("x", image=picture, strength=0.5, steps=4, seed=0, sampler="ddim", eta=0.5)
    stream = pipe.stream(request)
    assert next(stream).total == 2
    stream.close()
    np.testing.assert_array_equal(
        pipe.run(request).images,
        pipe("x", image=picture, strength=0.5, steps=4, seed=0, sampler="ddim", eta=0.5).images,
    )


def test_contexts_come_back_whatever_happens(sd1_bundle: Any) -> None:
    pipe = fewstep.load(sd1_bundle, most_contexts=1)

    def fail(step: fewstep.runtime.Step) -> None:
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller") as held:
        pipe("x", steps=2, seed=0, on_step=fail)
    assert len(pipe._pool) == 1, held.value
    pipe("x", steps=1, seed=[0, 1])
    assert len(pipe._pool) == 1
    assert len(fewstep.load(sd1_bundle, most_contexts=0)("x", steps=1, seed=0).images) == 1
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError, match="before it began"):
        pipe("x", steps=2, cancel=cancelled)


@pytest.mark.parametrize(
    "given",
    [{"batch": 0}, {"batch": "a"}, {"size": (33, 32)}, {"size": "x"}, {"most_contexts": -1}, {"threads": "2"}],
)
def test_bad_constructor_arguments(sd1_bundle: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        fewstep.load(sd1_bundle, **given)


def test_a_program_is_compiled_once_for_all_who_ask_for_the_same(sd1_bundle: Any) -> None:
    asked = {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 4}
    one = choose_program(sd1_bundle, **asked, options={"rho": 7.0})
    assert choose_program(sd1_bundle, **asked, options={"rho": np.float64(7.0)}) is one
    assert choose_program(sd1_bundle, **asked, options={"rho": 5.0}).sigmas[1] != one.sigmas[1]
    listed = choose_program(sd1_bundle, sampler="euler", schedule=None, steps=2, timesteps=[999, 500], options={})
    array = np.array([999, 500])
    assert choose_program(sd1_bundle, sampler="euler", schedule=None, steps=2, timesteps=array, options={}) is listed
    other = replace(sd1_bundle, scheduler={**sd1_bundle.scheduler, "beta_end": 0.011})
    assert choose_program(other, **asked, options={"rho": 7.0}).sigmas[0] != one.sigmas[0]
    with pytest.raises(ArgumentError):
        choose_program(sd1_bundle, **asked, options={"rho": object()})


def test_explicit_levels_go_before_a_presets_schedule(sd1_bundle: Any) -> None:
    """A bundle that names its sampler and schedule takes timesteps as one that does not."""
    preset = replace(sd1_bundle, defaults=replace(sd1_bundle.defaults, sampler="euler", schedule="trailing"))
    assert choose_program(preset, sampler="euler", schedule="trailing", steps=2, options={}).evaluations == 2
    request = make_request(preset, "x", timesteps=[999, 500], seed=0)
    assert (request.sampler, request.schedule, request.steps) == ("euler", None, 2)
    assert request.program.timesteps.tolist() == [999, 500]
    with pytest.raises(ArgumentError, match="beside explicit timesteps"):
        make_request(preset, "x", timesteps=[999, 500], schedule="karras", seed=0)


def test_warm_up_binds_everything_that_requests_use(sd1_bundle: Any) -> None:
    pipe = fewstep.load(sd1_bundle)
    with pytest.raises(ArgumentError, match="batch is 0"):
        pipe.warm_up(batch=0)
    pipe.warm_up(image=True)
    before = (set(pipe.text._bindings), set(pipe.vae._bindings))
    pipe("first", negative="none", steps=2, seed=0, guidance=5.0)
    pipe("second", steps=2, seed=0, guidance=1.0, image=np.full((32, 32, 3), 9, np.uint8), strength=0.9)
    assert (set(pipe.text._bindings), set(pipe.vae._bindings)) == before


def test_a_batch_of_one_stream_is_reproduced_whole(pipe: fewstep.Pipeline) -> None:
    result = pipe(["a", "b"], seed=4, shared_stream=True, sampler="ddim", eta=0.7, steps=2)
    command = command_line(result.parameters[1], "x.png")
    assert "--prompt=a --prompt=b" in command
    assert "--seed=4 --shared-stream --eta=0.7" in command


def test_memory_stays_flat(pipe: fewstep.Pipeline) -> None:
    import gc
    import tracemalloc

    sizes = [(32, 32), (36, 32), (40, 32), (32, 40), (44, 44), (48, 32)]

    def some() -> None:
        for i in range(18):
            pipe(f"prompt {i}", seed=i, steps=1, size=sizes[i % len(sizes)])

    some()
    tracemalloc.start()
    try:
        some()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            some()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 300_000, f"{grown} bytes more after 54 requests"


def test_pictures_that_cannot_be_read(pipe: fewstep.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        open_image(tmp_path / "none.png")
    for name, data in (("empty.png", b""), ("text.png", b"hello"), ("bmp.png", b"BM" + bytes(60))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorruptError, match=name):
            open_image(tmp_path / name)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(CorruptError):
        open_image(tmp_path / "cut.png")


def test_a_picture_knows_the_command_that_made_it(pipe: fewstep.Pipeline, tmp_path: Path) -> None:
    result = pipe('it\'s "quoted" ünïcode', negative="none", seed=3, **CALL)
    (name,) = result.save(tmp_path / "out.png")
    found = read_parameters(name)
    assert found["prompt"] == 'it\'s "quoted" ünïcode'
    assert "--seed=3" in command_line(found, "again.png")
    with Image.open(name) as image:
        assert image.text["parameters"].splitlines()[1] == "Negative prompt: none"
        np.testing.assert_array_equal(np.asarray(image), result.images[0])
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(CorruptError, match="no parameters"):
        read_parameters(tmp_path / "plain.png")
    from PIL.PngImagePlugin import PngInfo

    for text in ('{"a": 1}', "[" * 50_000, "{", "5"):
        info = PngInfo()
        info.add_text("fewstep", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=info)
        with pytest.raises(CorruptError):
            read_parameters(tmp_path / "odd.png")
    with pytest.raises(ArgumentError, match=r"ends in \.png, \.jpg"):
        result.save(tmp_path / "x.bmp")
    with pytest.raises(ArgumentError, match="name of a picture"):
        result.save(tmp_path)
    with pytest.raises(MissingError, match="no folder"):
        result.save(tmp_path / "nowhere" / "out.png")


def test_black_and_broken_images_are_errors(pipe: fewstep.Pipeline) -> None:
    latents = np.zeros((2, 4, 16, 16), np.float32)
    latents[1] = np.nan
    with pytest.raises(NonFiniteError, match="image 1"):
        pipe.vae.decode(latents)
    real = pipe.vae._decode
    try:
        pipe.vae._decode = lambda z, *_: (np.zeros((len(z), 32, 32, 3), np.uint8), np.ones(len(z), bool))  # type: ignore[method-assign]
        with pytest.raises(BlackImageError, match="image 0"):
            pipe.vae.decode(latents[:1])
    finally:
        pipe.vae._decode = real  # type: ignore[method-assign]


def test_a_missing_bundle_and_a_missing_engine(sd1_bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="fewstep export"):
        fewstep.load(tmp_path)
    from fewstep.engines import Store

    with pytest.raises(FewstepError, match="fewstep build"):
        fewstep.load(sd1_bundle, build="never", store=Store(tmp_path / "engines"))


def test_ays_takes_the_table_of_the_family(sd1_bundle: Any, sdxl_bundle: Any) -> None:
    for bundle, name in ((sd1_bundle, "ays_sd"), (sdxl_bundle, "ays_sdxl")):
        assert choose_program(bundle, sampler="euler", schedule="ays", steps=10, options={}).schedule == name


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_torch_backend_is_a_second_opinion(family: str, request: pytest.FixtureRequest) -> None:
    import fewstep.export

    bundle = request.getfixturevalue(f"{family}_bundle")
    ours = fewstep.load(bundle)("a cat", seed=2, **CALL)
    theirs = fewstep.load(bundle, backend="torch")("a cat", seed=2, **CALL)
    assert np.abs(ours.images.astype(int) - theirs.images).max() <= 2
