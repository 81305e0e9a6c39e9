"""LoRAs by each door: devices, prompts' tags, the command line, a server's batches; and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fewstep
import numpy as np
import pytest
from checkpoints import make_lora, psnr, write_lora
from commandline import call
from fewstep.errors import ArgumentError, CorruptError, MissingError, UnsupportedError
from fewstep.runtime.pictures.parameters import read_parameters
from fewstep.serving import Server
from safetensors.numpy import load_file, save_file

LEAST = 75.0
CALL: dict[str, Any] = {"steps": 2, "guidance": 4.0, "size": (64, 64), "seed": 3}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def loras(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two: one over all layers of UNet and text encoder, one of the attention's alone."""
    place = tmp_path_factory.mktemp("named-loras")
    write_lora(make_lora(tiny_sd1, seed=1), place / "whole.safetensors", "kohya", folder=tiny_sd1)
    attention = {m: p for m, p in make_lora(tiny_sd1, seed=3, text=False)["unet"].items() if ".attn" in m}
    write_lora({"unet": attention}, place / "attention.safetensors", "kohya", folder=tiny_sd1)
    return place


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Any, loras: Path) -> Any:
    return fewstep.load(sd1_bundle, lora_folder=loras)


@pytest.fixture(scope="module")
def expected(pipe: Any) -> np.ndarray:
    return pipe(PROMPT, loras={"whole": 0.8, "attention": 20.0}, **CALL).images[0]


@pytest.mark.parametrize("options", [{"graphs": True}, {"graphs": False, "mode": "shared"}], ids=["recorded", "ticks"])
def test_the_devices_slots_and_torchs_engine_agree(
    sd1_bundle: Any, loras: Path, expected: np.ndarray, options: dict[str, Any]
) -> None:
    import fewstep.export

    torch_pipe = fewstep.load(sd1_bundle, backend="torch", device="cpu:torch", lora_folder=loras, **options)
    for _ in range(2):
        image = torch_pipe(PROMPT, loras={"whole": 0.8, "attention": 20.0}, **CALL).images[0]
        assert psnr(expected, image) >= LEAST
    captures = torch_pipe.graph_counts["captures"]
    other = torch_pipe(PROMPT, loras={"whole": 0.5, "attention": 11.0}, **CALL).images[0]
    assert torch_pipe.graph_counts["captures"] == captures, "another scale was recorded anew"
    assert psnr(other, image) < LEAST


def test_tags_of_a_prompt_are_loras(pipe: Any, expected: np.ndarray, tmp_path: Path) -> None:
    """They leave the prompt; the picture says what made it, by name."""
    tagged = f"{PROMPT} <lora:whole:0.5> <lora:attention:20><lyco:whole:0.3>"
    result = pipe(tagged, prompt_syntax="a1111", **CALL)
    assert psnr(expected, result.images[0]) >= LEAST
    result.save(tmp_path / "a.png")
    said = read_parameters(tmp_path / "a.png")
    assert said["prompt"] == PROMPT
    assert said["loras"] == {"whole": 0.8, "attention": 20.0}
    for tag, error in (
        ("<lora:../whole>", ArgumentError),
        ("<lora:whole:much>", ArgumentError),
        ("<hypernet:whole:1>", UnsupportedError),
        ("<lora:absent:1>", MissingError),
    ):
        with pytest.raises(error):
            pipe(f"{PROMPT} {tag}", prompt_syntax="a1111", **CALL)


def test_the_command_line(
    sd1_bundle: Any, loras: Path, expected: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made.png"
    shared = [str(sd1_bundle.folder), f"--prompt={PROMPT}", "--steps=2", "--guidance=4", "--size=64x64", "--seed=3"]
    given = [f"--lora={loras / 'whole.safetensors'}:0.8", f"--lora={loras / 'attention'}:20", f"--output={output}"]
    code, _, err = call(capsys, "run", *shared, *given)
    assert code == 0, err
    from PIL import Image

    assert psnr(expected, np.asarray(Image.open(output))) >= LEAST
    assert str(loras) not in output.read_bytes().decode("latin-1"), "a path is in the picture"
    code, out, _ = call(capsys, "inspect", str(output))
    assert "--lora=whole.safetensors:0.8" in out
    code, _, err = call(capsys, "run", *shared, "--lora=absent", f"--output={output}")
    assert (code, "no LoRA" in err) == (3, True), err


def test_a_servers_batches_mix_them(pipe: Any, expected: np.ndarray) -> None:
    """Requests with a LoRA, another, and none that are in progress together are each what they are alone."""
    asked = [{"whole": 0.8, "attention": 20.0}, {"attention": -15.0}, None, {"whole": -0.6}]
    alone = [pipe(PROMPT, loras=loras, **CALL).images[0] for loras in asked]
    with Server(pipe, sizes=[(64, 64)], most_slots=4) as server:
        tickets = [server.submit(PROMPT, loras=loras, **CALL) for loras in asked]
        for picture, ticket in zip(alone, tickets, strict=True):
            assert psnr(picture, ticket.result(timeout=120).images[0]) >= LEAST
    assert psnr(expected, alone[0]) >= LEAST


def test_what_is_asked_for_again_is_packed_once(pipe: Any) -> None:
    """The same files and scales are the same arrays; memory of what is kept stays under its bound."""
    misses = pipe.loras.misses
    one = pipe.loras.changes((("whole", "", 0.25),))
    assert pipe.loras.changes((("whole", "", 0.25),)) is one
    assert pipe.loras.misses == misses + 1
    layers = pipe.adapted.of("unet", True).layers
    before = pipe.loras._keep
    pipe.loras._keep = 4 * sum(a.nbytes for a in one["unet"].packed(layers, 16).values())
    try:
        for i in range(20):
            change = pipe.loras.changes((("whole", "", 0.3 + i / 100),))["unet"]
            assert change.packed(layers, 16) is change.packed(layers, 16)
        pipe.loras.changes((("whole", "", 0.25),))
        assert pipe.loras.bytes <= pipe.loras._keep
    finally:
        pipe.loras._keep = before


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"absent": 1.0}, MissingError, "attention, whole"),
        ({"../whole": 1.0}, ArgumentError, "is a path"),
        ({"whole": float("nan")}, ArgumentError, "scale"),
        ({"whole": 1e9}, ArgumentError, "scale"),
        ([{"whole": 1.0}, None], ArgumentError, "2 entries"),
        (3, ArgumentError, "int"),
        ({3: 1.0}, ArgumentError, "a name or a path"),
    ],
    ids=str,
)
def test_what_is_refused_before_anything_is_computed(pipe: Any, asked: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        pipe.request(PROMPT, loras=asked, **CALL)


def test_damaged_files_and_other_kinds_are_told(pipe: Any, loras: Path) -> None:
    for name, change, error in (
        ("cut", lambda w: {k: v for k, v in w.items() if k != next(n for n in w if "up.weight" in n)}, CorruptError),
        ("part", lambda w: {**w, "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": np.ones((2, 2))}, CorruptError),
        ("infinite", lambda w: {k: np.full_like(v, np.inf) for k, v in w.items()}, CorruptError),
    ):
        path = loras / f"{name}.safetensors"
        save_file(change(load_file(loras / "attention.safetensors")), path)
        try:
            with pytest.raises(error):
                pipe(PROMPT, loras={name: 1.0}, **CALL)
        finally:
            path.unlink()
