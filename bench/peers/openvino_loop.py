"""diffusers' pipeline with its text encoder, UNet and VAE decoder compiled by OpenVINO, which converts torch's modules.

Shapes are fixed at the first request's, which is OpenVINO's fastest form; compiled models are cached on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_loop import DiffusersLoop
from protocol import serve


class OpenVinoPeer(DiffusersLoop):
    packages: tuple[str, ...] = ("openvino", "torch", "diffusers", "transformers", "numpy")
    name = "openvino"

    def make(self, spec: dict[str, Any]) -> Any:
        import openvino

        self.ov, self.spec = openvino, spec
        self.core = openvino.Core()
        self.folder = Path(spec["cache"]) / self.name
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.dtype = self.torch.float32
        self.config = {
            "INFERENCE_PRECISION_HINT": "bf16" if spec["precision"] == "bfloat16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": spec["threads"],
            "CACHE_DIR": str(self.folder / "compiled"),
        }
        if not (self.folder / "vae.xml").is_file():
            self.convert(spec)
        pipe = self.assembled(spec)
        self.replace(pipe)
        return pipe

    def assembled(self, spec: dict[str, Any]) -> Any:
        """The pipeline with models that hold no weights, since OpenVINO's replace them."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        root = Path(spec["checkpoint"])
        with self.torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(root / "unet"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(root / "vae"))
            text = CLIPTextModel(CLIPTextConfig.from_pretrained(root / "text_encoder"))
        for model in (unet, vae, text):
            model.to_empty(device="cpu")  # address space, of which no page is ever touched
        return self.DiffusionPipeline.from_pretrained(
            root, unet=unet, vae=vae, text_encoder=text, local_files_only=True, safety_checker=None
        )

    def convert(self, spec: dict[str, Any]) -> None:
        torch, pipe = self.torch, super().make(spec)
        unet, vae, text = (m.eval().requires_grad_(False) for m in (pipe.unet, pipe.vae, pipe.text_encoder))
        c, latent = unet.config, torch.zeros(1, unet.config.in_channels, 8, 8)

        class Evaluation(torch.nn.Module):
            def forward(self, sample: Any, timestep: Any, states: Any) -> Any:
                return unet(sample, timestep, states, return_dict=False)[0]

        class Decoder(torch.nn.Module):
            def forward(self, z: Any) -> Any:
                return vae.decode(z, return_dict=False)[0]

        class Text(torch.nn.Module):
            def forward(self, ids: Any) -> Any:
                return text(ids, return_dict=False)[0]

        width = c.cross_attention_dim
        examples = {
            "unet": (Evaluation(), (latent, torch.tensor([1.0]), torch.zeros(1, 77, width))),
            "text": (Text(), (torch.zeros(1, 77, dtype=torch.int64),)),
            "vae": (Decoder(), (latent,)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            for name, (module, example) in examples.items():
                model = self.ov.convert_model(module, example_input=example)
                self.ov.save_model(model, self.folder / f"{name}.xml", compress_to_fp16=False)

    def run(self, name: str, *arrays: Any) -> Any:
        """One inference of a model compiled for exactly these shapes."""
        key = (name, *(a.shape for a in arrays))
        if key not in self.compiled:
            model = self.core.read_model(self.folder / f"{name}.xml")
            model.reshape({i: list(a.shape) for i, a in enumerate(arrays)})
            self.compiled[key] = self.core.compile_model(model, "CPU", self.config).create_infer_request()
        out = self.compiled[key].infer(dict(enumerate(arrays)), share_inputs=True, share_outputs=True)
        return self.torch.from_numpy(out[0])

    def replace(self, pipe: Any) -> None:
        def unet(sample: Any, timestep: Any, encoder_hidden_states: Any, **_: Any) -> Any:
            t = self.torch.as_tensor(timestep, dtype=self.torch.float32).reshape(-1)
            return (self.run("unet", sample.numpy(), t.numpy(), encoder_hidden_states.numpy()),)

        def decode(z: Any, **_: Any) -> Any:
            return (self.run("vae", z.numpy()),)

        def text(ids: Any, **_: Any) -> Any:
            return _Hidden(self.run("text", ids.numpy()).clone())

        pipe.unet.forward, pipe.vae.decode, pipe.text_encoder.forward = unet, decode, text


class _Hidden(tuple):
    """What the pipeline reads off a text encoder."""

    def __new__(cls, hidden: Any) -> Any:
        return super().__new__(cls, (hidden,))

    @property
    def last_hidden_state(self) -> Any:
        return self[0]


if __name__ == "__main__":
    serve(OpenVinoPeer)
