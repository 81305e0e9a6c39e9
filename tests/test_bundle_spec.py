"""docs/bundle.md suffices: a reader written from that page alone makes fewstep's pictures.

It uses NumPy, ONNX Runtime, `tokenizers` and the text of the manifest and of a program; of fewstep it has nothing. Unit
noise is torch's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import onnxruntime
import pytest
import torch
from fewstep.bundle import Bundle
from fewstep.engines.gate.reference import read_reference
from fewstep.export.embedded import embedded_bundle
from fewstep.schedules import NoiseSchedule, compile_program, program_from_diffusers
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
PROMPT, NEGATIVE = "a red circle, a very long prompt that goes on " + "and on " * 90, "blue"


class Reader:
    """A bundle as its page describes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        assert self.manifest["format"] == 1
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, component: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        stated = self.manifest["components"][component]
        if component not in self.sessions:
            self.sessions[component] = onnxruntime.InferenceSession(str(self.folder / stated["graph"]))
        assert inputs.keys() == {t["name"] for t in stated["inputs"]}
        names = [t["name"] for t in stated["outputs"]]
        outputs = dict(zip(names, self.sessions[component].run(names, inputs), strict=True))
        dims: dict[str, int] = {}
        for tensor in (*stated["inputs"], *stated["outputs"]):
            array = {**inputs, **outputs}[tensor["name"]]
            assert array.dtype == tensor["dtype"]
            for size, dimension in zip(array.shape, tensor["shape"], strict=True):
                name, _, times = str(dimension).partition("*")
                factor = int(times or 1)
                assert size == (int(name) if name.isdigit() else dims.setdefault(name, size // factor) * factor), tensor
        return outputs

    def encode(self, prompt: str) -> dict[str, np.ndarray]:
        """What the UNet is told of a prompt."""
        hidden, pooled = [], None
        encoders = [n for n in self.manifest["components"] if n.startswith("text_encoder")]
        for name, record in zip(encoders, self.manifest["tokenizers"], strict=True):
            tokenizer = Tokenizer.from_file(str(self.folder / record["file"]))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            tokens = tokenizer.encode(prompt, add_special_tokens=False).ids[: record["length"] - 2]
            ids = [record["bos_id"], *tokens, record["eos_id"]]
            ids += [record["pad_id"]] * (record["length"] - len(ids))
            outputs = self.run(name, input_ids=np.array([ids], np.int64), clip_skip=np.zeros(1, np.int64))
            hidden.append(outputs["hidden"])
            pooled = outputs.get("pooled")
        told = {"encoder_hidden_states": np.concatenate(hidden, axis=-1)}
        return told if pooled is None else {**told, "text_embeds": pooled}

    def picture(self, program: dict[str, Any], seed: int, guidance: float, negative: str | None) -> np.ndarray:
        """uint8 [1, H, W, 3]."""
        latent, default = self.manifest["latent"], self.manifest["defaults"]
        height, width = default["height"] // latent["factor"], default["width"] // latent["factor"]
        generator = torch.Generator().manual_seed(seed)

        def draw() -> np.ndarray:
            return torch.randn((1, latent["channels"], height, width), generator=generator).numpy().astype(np.float64)

        told = [self.encode(PROMPT)]
        if guidance > 1:
            other = self.encode(negative or "")
            if negative is None and self.manifest["force_zeros"]:
                other = {name: np.zeros_like(value) for name, value in other.items()}
            told.insert(0, other)
        for row in told:
            if self.manifest["family"] == "sdxl":
                pixels = [default["height"], default["width"]]
                row["time_ids"] = np.array([[*pixels, 0, 0, *pixels]], np.float32)
        conditioning = {name: np.concatenate([row[name] for row in told]) for name in told[0]}

        def network(sample: np.ndarray, timestep: float) -> np.ndarray:
            rows = np.concatenate([sample] * len(told)).astype(np.float32)
            out = self.run("unet", sample=rows, timestep=np.full(len(told), timestep, np.float32), **conditioning)[
                "out"
            ]
            return out[:1] if len(told) == 1 else out[:1] + guidance * (out[1:] - out[:1])

        p, noise = program, draw()
        x = p["init_noise"] * noise
        remembered = [np.zeros_like(x) for _ in p["b"][0]]
        drawn = before = np.zeros_like(x)
        for i, timestep in enumerate(p["timesteps"]):
            out = network(p["input_scale"][i] * x, timestep)
            clip, changed = p.get("clip"), 0.0
            if clip:
                x0 = p["x0_x"][i] * x + p["x0_out"][i] * out
                changed = np.minimum(np.maximum(x0, -clip["limit"]), clip["limit"]) - x0
            remembered[p["write"][i]] = p["h_x"][i] * x + p["h_out"][i] * out + (clip["h"][i] * changed if clip else 0)
            if p["draws"][i]:
                before, drawn = drawn, draw()
            x = p["a"][i] * x + p["c"][i] * drawn + p["c_prev"][i] * before + (clip["x"][i] * changed if clip else 0)
            x = x + sum(b * h for b, h in zip(p["b"][i], remembered, strict=True) if b)
        outputs = self.run("vae_decoder", latent=(p["state_scale"][-1] * x).astype(np.float32))
        assert outputs["finite"].all()
        return outputs["image"]


@pytest.fixture(scope="module")
def student() -> Bundle:
    return embedded_bundle("student")[0]


@pytest.fixture(scope="module", params=["student", "sdxl_bundle"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    named: Bundle = request.getfixturevalue(request.param)
    return named


@pytest.mark.parametrize(
    ("sampler", "guidance", "negative"),
    [("dpmpp_2m", 1.0, None), ("euler_ancestral", 3.0, None), ("dpmpp_sde", 4.0, NEGATIVE)],
)
def test_a_reader_written_from_the_page_makes_the_picture(
    bundle: Bundle, sampler: str, guidance: float, negative: str | None
) -> None:
    noise = NoiseSchedule.from_diffusers(bundle.noise_config)
    program = json.loads(compile_program(sampler, schedule="trailing", steps=3, noise=noise).to_json())
    assert program["format"] == 1
    picture = Reader(bundle.folder).picture(program, 5, guidance, negative)
    result = fewstep.load(bundle, backend="ort-cpu")(
        PROMPT, negative=negative, seed=5, guidance=guidance, sampler=sampler, schedule="trailing", steps=3
    )
    error = np.abs(result.images.astype(int) - picture.astype(int))
    assert error.max() <= 1
    assert (error != 0).mean() < 0.01
    assert picture.std() > 1, "a picture of one colour agrees with anything"


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_a_program_that_clips_is_read_from_the_page_too(student: Bundle, sampler: str) -> None:
    asked: dict[str, Any] = {"steps": 3, "schedule": "trailing", "compat": "diffusers", "clip_sample": True}
    noise = NoiseSchedule.from_diffusers(student.noise_config)
    program = json.loads(compile_program(sampler, noise=noise, **asked).to_json())
    assert program["format"] == 2
    picture = Reader(student.folder).picture(program, 5, 3.0, None)
    pipe = fewstep.load(student, backend="ort-cpu")
    result = pipe(PROMPT, seed=5, guidance=3.0, sampler=sampler, **asked)
    assert np.abs(result.images.astype(int) - picture.astype(int)).max() <= 1
    unclipped = pipe(PROMPT, seed=5, guidance=3.0, sampler=sampler, **{**asked, "clip_sample": False})
    assert np.abs(result.images.astype(int) - unclipped.images.astype(int)).max() > 10


def test_files_are_as_they_are_stated(bundle: Bundle) -> None:
    manifest = Reader(bundle.folder).manifest
    for component in manifest["components"].values():
        for kind in ("graph", "weights"):
            content = (bundle.folder / component[kind]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == component[f"{kind}_sha256"]
        weights = (bundle.folder / component["weights"]).read_bytes()
        assert (8 + int.from_bytes(weights[:8], "little")) % 4096 == 0


def test_the_reference_is_as_it_is_stated(student: Bundle) -> None:
    reader = Reader(student.folder)
    path = student.folder / "reference.safetensors"
    with safe_open(path, framework="numpy") as file:
        cases, stored = json.loads(file.metadata()["cases"]), list(file.keys())
        assert cases.keys() == {f"{c.component}/{c.index}" for c in read_reference(path)}
        for case, stated in cases.items():
            component = case.partition("/")[0]
            tensors = {n.removeprefix(f"{case}/"): file.get_tensor(n) for n in stored if n.startswith(f"{case}/")}
            inputs = {n.removeprefix("in/"): t for n, t in tensors.items() if n.startswith("in/")}
            for name, value in reader.run(component, **inputs).items():
                expected = tensors[f"out/{name}"].astype(np.float64)
                if name == "image":
                    assert np.mean((value - expected) ** 2) <= 255**2 / 1e5
                else:
                    assert np.linalg.norm(value - expected) <= 1e-4 * np.linalg.norm(expected)
            assert stated["dims"]


def keys(value: object) -> set[str]:
    """The manifest's own keys; not those of configurations that are somebody else's."""
    if not isinstance(value, dict):
        return set().union(*map(keys, value)) if isinstance(value, list) else set()
    foreign = {"config", "scheduler", "operators", "source", "gate", "components", "options"}
    inner = [keys(v) for k, v in value.items() if k not in foreign]
    return set(value).union(*inner, *(keys(v) for v in value.get("components", {}).values()))


def test_the_page_names_every_key(bundle: Bundle) -> None:
    stated = keys(Reader(bundle.folder).manifest)
    program = compile_program("euler", schedule="trailing", steps=2, noise=NoiseSchedule.scaled_linear())
    stated |= json.loads(program.to_json()).keys()
    clipped = {"_class_name": "DDIMScheduler", "clip_sample": True}
    stated |= json.loads(program_from_diffusers(clipped, steps=2).to_json())["clip"].keys() | {"clip"}
    assert len(stated) > 50
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert stated - named == set()
