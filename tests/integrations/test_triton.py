"""A model repository is read by Triton's schema, and its model runs on what stands in for Triton's utilities."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from commandline import call
from fewstep.errors import ArgumentError
from fewstep.export.embedded import embedded_bundle
from fewstep.integrations.triton import write_repository
from fewstep.integrations.triton.repository import config_text
from standin_triton import Tensor, TritonModelException, TritonServer, as_module
from triton_config import parse_config

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_repository(embedded_bundle("student")[0], folder, name="shapes", max_batch=4, backend="auto")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    """The model's file loaded as Triton's stub loads it, with the arguments that it gives."""
    sys.modules["triton_python_backend_utils"] = as_module()
    try:
        config = parse_config((repository / "shapes" / "config.pbtxt").read_text())
        spec = importlib.util.spec_from_file_location("model", repository / "shapes" / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": "CPU",
                "model_instance_name": "shapes_0",
                "model_instance_device_id": "0",
                "model_repository": str(repository / "shapes"),
                "model_version": "1",
                "model_name": "shapes",
            }
        )
        yield TritonServer(config, model)
        model.finalize()
    finally:
        del sys.modules["triton_python_backend_utils"]


def texts(*words: str) -> np.ndarray:
    return np.array([w.encode() for w in words], np.object_)[:, None]


def asked(*prompts: str, seed: int = 1, **more: Any) -> dict[str, np.ndarray]:
    return {"prompt": texts(*prompts), "seed": np.array([[seed + i] for i in range(len(prompts))], np.uint64), **more}


def test_the_configuration_is_triton_s(repository: Path) -> None:
    config = parse_config((repository / "shapes" / "config.pbtxt").read_text())
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("shapes", "python", 4)
    assert config["dynamic_batching"] == {"preferred_batch_size": [2, 4], "max_queue_delay_microseconds": 5000}
    assert [i["name"] for i in config["input"] if not i.get("optional")] == ["prompt"]
    assert config["output"][0] == {"name": "image", "data_type": "TYPE_UINT8", "dims": [64, 64, 3]}
    assert config["parameters"]["bundle"]["string_value"] == "bundle"
    cpu, gpu = (
        parse_config(config_text("x", (64, 64), max_batch=1, delay_us=0, backend=b)) for b in ("ort-cpu", "tensorrt")
    )
    assert (cpu["instance_group"][0]["kind"], gpu["instance_group"][0]["kind"]) == ("KIND_CPU", "KIND_GPU")
    odd = config_text('a "quoted" \\ name', (64, 64), max_batch=1, delay_us=0, backend="auto")
    assert parse_config(odd)["name"] == 'a "quoted" \\ name'


@pytest.mark.parametrize(
    "text",
    ['colour: "red"', "max_batch_size: 4 max_batch_size: 5", "input { data_type: TYPE_FLOAT }", "name: shapes", "}"],
)
def test_the_parser_refuses_what_protobuf_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse_config(text)


def test_requests_of_a_batch_get_what_they_get_alone(server: TritonServer) -> None:
    pipe = fewstep.load(embedded_bundle("student")[0])
    two = np.array([[2]], np.int32)
    one, several, other = server.infer(
        asked(PROMPT), asked("a green ring", "a small star", seed=5), asked(PROMPT, seed=9, steps=two)
    )
    outputs = {t.name(): t.as_numpy() for t in several.output_tensors()}
    assert outputs["image"].shape == (2, 64, 64, 3)
    assert outputs["seed"].tolist() == [[5], [6]]
    expected = pipe(["a green ring", "a small star"], seed=[5, 6]).images
    assert np.abs(outputs["image"].astype(int) - expected).max() <= 1
    for response, call_ in ((one, {"seed": 1}), (other, {"seed": 9, "steps": 2})):
        image = response.output_tensors()[0].as_numpy()[0].astype(int)
        assert np.abs(image - pipe(PROMPT, **call_).images[0]).max() <= 1
    said = json.loads(other.output_tensors()[2].as_numpy()[0, 0])
    assert (said["steps"], said["seed"]) == (2, 9)


def test_what_is_wrong_with_one_request_is_its_own_error(server: TritonServer) -> None:
    none = np.array([[0]], np.int32)
    bad, unknown, fine = server.infer(
        asked("x", steps=none), asked("x", sampler=texts("eulr")), {"prompt": texts(PROMPT)}
    )
    assert "steps is 0" in bad.error().message()
    assert "eulr" in unknown.error().message()
    assert not fine.has_error(), "without a seed it is drawn"
    uneven, good = server.infer({"prompt": texts("a"), "seed": np.zeros((2, 1), np.uint64)}, asked("b"))
    assert "different lengths" in uneven.error().message()
    assert not good.has_error()
    garbage, _ = server.infer({"prompt": np.array([[b"\xff\xfe"]], np.object_)}, asked("b"))
    assert garbage.has_error()


def test_one_that_fails_among_those_that_ask_alike_is_alone(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that is black throughout is an error of its own, and not its company's."""
    check = fewstep.runtime.pictures.vae.check_images
    red = fewstep.load(embedded_bundle("student")[0])(PROMPT, seed=1).images[0]

    def some_are_black(images: np.ndarray, finite: np.ndarray) -> None:
        images = images.copy()
        for i, image in enumerate(images):
            images[i] = 0 if np.abs(image.astype(int) - red).max() <= 1 else image
        check(images, finite)

    monkeypatch.setattr(fewstep.runtime.pictures.vae, "check_images", some_are_black)
    bad, fine = server.infer(asked(PROMPT), asked("a green ring", seed=4))
    assert "black" in bad.error().message()
    assert not fine.has_error()


def test_the_stand_in_refuses_what_the_real_one_refuses(server: TritonServer) -> None:
    for wrong in ({"prompt": texts(*"abcde")}, {"seed": np.zeros((1, 1), np.uint64)}, {"prompt": np.zeros((1, 1))}):
        with pytest.raises(TritonModelException):
            server.infer(wrong)
    for value in (np.zeros(2, np.complex64), np.array([1], np.object_)):
        with pytest.raises(TritonModelException):
            Tensor("x", value)
    with pytest.raises(TypeError):
        Tensor("x", [1, 2])  # type: ignore[arg-type]


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "models")
    code, text, err = call(capsys, "triton", "student", out, "--link", "--size", "64x72", "--max-batch", "3", "--json")
    assert code == 0, err
    model = Path(json.loads(text)["folder"])
    config = parse_config((model / "config.pbtxt").read_text())
    assert config["output"][0]["dims"] == [72, 64, 3]
    assert config["dynamic_batching"]["preferred_batch_size"] == [2, 3]
    assert (model / "1" / "bundle" / "bundle.json").is_file()
    assert call(capsys, "triton", "student", out)[0] == 2, "it is there already"
    assert call(capsys, "triton", "student", out, "--name", "../up")[0] == 2
    with pytest.raises(ArgumentError):
        write_repository(embedded_bundle("student")[0], tmp_path, size=(63, 64))


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(fewstep.integrations.triton.repository, "config_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_repository(embedded_bundle("student")[0], tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())
