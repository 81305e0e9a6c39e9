"""diffusers with its UNet, VAE decoder and text encoder through torch.compile, weights frozen into the code."""

from __future__ import annotations

from typing import Any

from diffusers_loop import DiffusersLoop
from protocol import serve


class Compiled(DiffusersLoop):
    """Inductor with constant weights: its C++ backend packs them then, which is its fastest form on a CPU."""

    def make(self, spec: dict[str, Any]) -> Any:
        import torch._inductor.config as inductor

        inductor.freezing = True
        pipe = super().make(spec)
        pipe.unet.forward = self.torch.compile(pipe.unet.forward)
        pipe.vae.decoder.forward = self.torch.compile(pipe.vae.decoder.forward)
        pipe.text_encoder.forward = self.torch.compile(pipe.text_encoder.forward)
        return pipe


if __name__ == "__main__":
    serve(Compiled)
