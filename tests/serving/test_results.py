"""A result is the same whoever asks: a direct call, a stream, a group of devices, a server."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import fewstep
import numpy as np
import pytest

LONG = "a red circle " * 60
CALL: dict[str, Any] = {"steps": 2, "sampler": "euler", "guidance": 2.0, "seed": [4, 9]}


@pytest.fixture(scope="module")
def results() -> dict[str, fewstep.Result]:
    import fewstep.export
    from fewstep.export.embedded import embedded_bundle

    bundle = embedded_bundle("student")[0]
    direct = fewstep.load(bundle, backend="ort-cpu")
    with fewstep.Server(direct, most_slots=4, most_rows=4) as server:
        served = server.generate(LONG, **CALL)
    made = {"direct": direct(LONG, **CALL), "served": served}
    made["group"] = fewstep.load(bundle, backend="ort-cpu", devices=["cpu", "cpu:torch"])(LONG, **CALL)
    for mode in ("latency", "shared"):
        for graphs in (False, True):
            options = {"backend": "torch", "device": "cpu:torch", "mode": mode, "graphs": graphs}
            made[f"{mode}, {'recorded' if graphs else 'eager'}"] = fewstep.load(bundle, **options)(LONG, **CALL)
    made["latency on NumPy"] = fewstep.load(bundle, backend="ort-cpu", mode="latency")(LONG, **CALL)
    return made


def test_every_field_is_the_direct_calls(results: dict[str, fewstep.Result]) -> None:
    direct = results["direct"]
    assert direct.truncated == (True, True)
    for name, result in results.items():
        assert np.abs(result.images.astype(int) - direct.images).max() <= 1, name
        np.testing.assert_allclose(result.latents, direct.latents, atol=1e-3, err_msg=name)
        assert result.timings.keys() == direct.timings.keys(), name
        for field in fields(fewstep.Result):
            if field.name not in {"images", "latents", "timings", "tensor"}:
                assert getattr(result, field.name) == getattr(direct, field.name), (name, field.name)


def test_timings_add_up(results: dict[str, fewstep.Result]) -> None:
    for name, result in results.items():
        timings = result.timings
        stages = sum(timings[k] for k in ("queue", "text", "encode_image", "denoise", "decode"))
        assert 0 < stages <= timings["total"] * 1.01, name
        assert len(timings["devices"]) == (2 if name == "group" else 1), name
        assert all(d["denoise"] > 0 for d in timings["devices"]), name


def test_steps_show_the_same_in_every_mode() -> None:
    """Latents of the last step are the result's; inpainting and previews are done on every device and in every mode."""
    import fewstep.export
    from fewstep.export.embedded import embedded_bundle

    bundle = embedded_bundle("student")[0]
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    call = {"steps": 3, "sampler": "dpmpp_2m", "seed": 1, "image": picture, "mask": mask}
    made: dict[tuple[Any, ...], Any] = {}
    for device in ("cpu", "cpu:torch"):
        for mode in ("latency", "shared"):
            for graphs in (False, True)[: 1 if device == "cpu" else 2]:
                pipe = fewstep.load(bundle, backend="torch", device=device, mode=mode, graphs=graphs)
                steps: list[Any] = []
                result = pipe("a star", on_step=lambda s, to=steps: to.append(s.latents()), **call)
                np.testing.assert_allclose(steps[-1], result.latents, rtol=1e-5, atol=1e-5)
                stream, seen = pipe.stream(pipe.request("a star", **call), previews=True), []
                for step in stream:
                    seen.append((step.preview(), step.latents()))
                made[device, mode, graphs] = result.images, seen
    images, seen = made["cpu", "shared", False]
    assert len(seen) == 3
    for key, (others, steps) in made.items():
        assert np.abs(others.astype(int) - images).max() <= 1, key
        for (preview, latents), (expected, theirs) in zip(steps, seen, strict=True):
            assert np.abs(preview.astype(int) - expected).max() <= 1, key
            np.testing.assert_allclose(latents, theirs, atol=1e-3)
