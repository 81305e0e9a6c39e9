"""docs/bundle.md suffices: a reader written from that page alone makes fewstep's pictures.

It uses NumPy, ONNX Runtime, `tokenizers` and the text of the manifest and of a program; of fewstep it has nothing. Unit
noise is torch's own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import onnxruntime
import pytest
import torch
from clips import photograph
from fewstep.bundle import Bundle, add_schedules
from fewstep.engines.gate.reference import read_reference
from fewstep.export.embedded import embedded_bundle
from fewstep.schedules import FoundSchedules, NoiseSchedule, compile_program, program_from_diffusers
from fewstep.schedules.fitted import FittedRow
from fewstep.schedules.found import FoundEntry
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
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

        latent = self.sampled(program, network, draw)
        outputs = self.run("vae_decoder", latent=latent)
        assert outputs["finite"].all()
        return outputs["image"]

    @staticmethod
    def sampled(p: dict[str, Any], network: Any, draw: Any) -> np.ndarray:
        """The program's loop: a latent as the VAE takes it."""
        x = p["init_noise"] * draw()
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
        return (p["state_scale"][-1] * x).astype(np.float32)

    def clip(
        self, program: dict[str, Any], picture: Image.Image, size: tuple[int, int], told: list[float], frames: int
    ) -> np.ndarray:
        """uint8 [F, H, W, 3] of a picture that has the image encoder's size; told: fps, motion bucket, noise."""
        latent, (width, height), generator = self.manifest["latent"], size, torch.Generator().manual_seed(5)
        values = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255
        mean, deviation = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_DEVIATION))
        hidden = self.run("image_encoder", pixels=(values - mean) / deviation)["hidden"]
        small = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), np.float32).transpose(2, 0, 1)[None]
        noise = torch.randn((1, 3, height, width), generator=generator).numpy()
        first = self.run("vae_encoder", image=small / 255 * 2 - 1 + np.float32(told[2]) * noise)["mean"]
        first = first / self.manifest["components"]["vae_encoder"]["config"]["scaling_factor"]
        rows = {"encoder_hidden_states": hidden, "image_latents": first}
        conditioning = {n: np.concatenate([np.zeros_like(v), v]).astype(np.float32) for n, v in rows.items()}
        conditioning["added_time_ids"] = np.array([[told[0] - 1, *told[1:]]] * 2, np.float32)
        shape = (1, frames, latent["channels"], height // latent["factor"], width // latent["factor"])
        guidance = np.linspace(1.0, self.manifest["defaults"]["guidance"], frames).reshape(1, -1, 1, 1, 1)

        def network(sample: np.ndarray, timestep: float) -> np.ndarray:
            given = np.concatenate([sample] * 2).astype(np.float32)
            out = self.run("unet", sample=given, timestep=np.full(2, timestep, np.float32), **conditioning)["out"]
            return out[:1] + guidance * (out[1:] - out[:1])

        made = self.sampled(
            program, network, lambda: torch.randn(shape, generator=generator).numpy().astype(np.float64)
        )
        outputs = self.run("vae_decoder", latent=made[0])
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


def test_a_clip_is_made_from_the_page(tiny_svd: Any) -> None:
    bundle: Bundle = tiny_svd.bundle
    picture = photograph(224, 224)
    noise = NoiseSchedule.from_diffusers(bundle.noise_config)
    program = json.loads(compile_program("euler", schedule="ays_svd", steps=4, noise=noise).to_json())
    clip = Reader(bundle.folder).clip(program, picture, (16, 24), [9, 60, 0.1], 5)
    asked = {"size": (16, 24), "fps": 9, "motion_bucket": 60, "noise_augmentation": 0.1, "frames": 5, "steps": 4}
    pipe = fewstep.load(bundle, backend="ort-cpu")
    result = pipe(image=picture, seed=5, sampler="euler", schedule="ays_svd", **asked)
    error = np.abs(result.frames[0].astype(int) - clip.astype(int))
    assert error.max() <= 1
    assert (error != 0).mean() < 0.01
    assert clip.std() > 1


def read_rows(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with fitted rows over x0, for a network that predicts v, as the loop of `Reader.picture` takes it."""
    n, most = entry["steps"], max(len(row) - 1 for row in entry["rows"])
    scale = [1.0 / np.sqrt(1.0 + s * s) for s in entry["sigmas"][:-1]]
    b = np.zeros((n, most))
    for i, (_, *factors) in enumerate(entry["rows"]):
        for age, factor in enumerate(factors):
            b[i, (i - age) % most] = factor
    plain = {"init_noise": 1.0, "timesteps": entry["fed"], "input_scale": [1.0] * n, "state_scale": [1.0] * (n + 1)}
    return {
        **plain,
        "h_x": scale,
        "h_out": [-s * a for s, a in zip(entry["sigmas"], scale, strict=False)],
        "write": [i % most for i in range(n)],
        "a": [row[0] for row in entry["rows"]],
        "b": b.tolist(),
        **{name: [0.0] * n for name in ("c", "c_prev", "draws")},
    }


def test_a_found_schedule_is_read_from_the_page(student: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student.folder, tmp_path / "student"))
    unet = Reader(folder).manifest["components"]["unet"]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.round(np.cumprod(1.0 - betas), 12)
    rows = ((0.4, 0.6), (0.5, 0.7, -0.1), (0.1, 1.1, -0.3, 0.1))
    entry = FoundEntry(
        steps=3,
        method="rows",
        sigmas=(11.0, 2.0, 0.5, 0.0),
        fed=(960.5, 640.0, 250.25),
        kept="x0",
        rows=tuple(FittedRow(a, tuple(b)) for a, *b in rows),
        figures={"psnr_db": 20.0},
    )
    add_schedules(
        folder,
        FoundSchedules(
            sampler="dpmpp_2m",
            model=hashlib.sha256((unet["graph_sha256"] + unet["weights_sha256"]).encode()).hexdigest(),
            noise_digest=hashlib.sha256(alpha_bar.tobytes() + b"discrete").hexdigest(),
            guidance=3.0,
            size=(64, 64),
            entries=(entry,),
        ),
    )
    reader = Reader(folder)
    (stated,) = reader.manifest["schedules"]
    content = (folder / stated["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == stated["sha256"]
    data = json.loads(content)
    assert (data["kind"], data["format"], data["sampler"]) == ("fewstep schedules", 1, stated["sampler"])
    result = fewstep.load(folder, backend="ort-cpu")(
        PROMPT, seed=5, guidance=3.0, sampler="dpmpp_2m", schedule="searched", steps=3
    )
    picture = reader.picture(read_rows(data["entries"][0]), 5, 3.0, None)
    error = np.abs(result.images.astype(int) - picture.astype(int))
    assert error.max() <= 1
    assert picture.std() > 1
    entries = [{k: v for k, v in e.items() if k != "figures"} for e in data["entries"]]
    digest = hashlib.sha256(json.dumps([data["sampler"], entries], sort_keys=True).encode()).hexdigest()
    assert result.parameters[0]["schedule_digest"] == digest[:12]


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
    learned = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "thresholding": True}
    thresholded = json.loads(program_from_diffusers(learned, steps=2).to_json())
    stated |= thresholded.keys() | thresholded["clip"].keys()
    rows = (FittedRow(1.0, (0.5,)),)
    entry = FoundEntry(
        steps=1, method="rows", sigmas=(9.0, 0.0), fed=(900.0,), between=(9.0, 0.0), kept="x0", rows=rows
    )
    entry = replace(entry, options={"solver_type": "heun"}, figures={"psnr_db": 30.0})
    found = FoundSchedules(
        sampler="dpmpp_2m", model="0", noise_digest="0", guidance=1.0, size=(8, 8), entries=(entry,), made={}
    )
    stated |= keys(found.to_json()) - {"psnr_db"} | {"schedules", "schedule_digest"}
    assert len(stated) > 60
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert stated - named == set()
