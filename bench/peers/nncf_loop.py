"""The loop round OpenVINO with a UNet in integers, as `nncf.quantize` makes it without being told more.

Calibrated on evaluations of the pipeline's own requests, along their steps; every layer that NNCF lowers by itself is
lowered. The rest is in float32, as ours.
"""

from __future__ import annotations

from typing import Any

from openvino_loop import OpenVinoPeer
from protocol import serve

CALIBRATION_PROMPTS = (
    "a harbour at dawn",
    "a bowl of lemons on a blue table",
    "an old man reading a newspaper",
    "a city street in the rain",
)
MOST_PIXELS = 256
"""A side of the pictures that are calibrated on: NNCF keeps what every layer gives."""


class NncfPeer(OpenVinoPeer):
    packages = ("nncf", *OpenVinoPeer.packages)
    name = "nncf"

    def convert(self, spec: dict[str, Any]) -> None:
        import nncf

        super().convert(spec)
        seen = self.evaluations(spec)
        plain = self.core.read_model(self.folder / "unet.xml")
        lowered = nncf.quantize(plain, nncf.Dataset(seen), subset_size=len(seen))
        self.ov.save_model(lowered, self.folder / "lowered.xml", compress_to_fp16=False)
        del plain, lowered
        for suffix in ("xml", "bin"):
            (self.folder / f"lowered.{suffix}").replace(self.folder / f"unet.{suffix}")
        self.compiled.clear()

    def evaluations(self, spec: dict[str, Any]) -> list[tuple[Any, ...]]:
        """What the UNet is given on the way of some requests."""
        pipe, seen, run = self.assembled(spec), [], self.run

        def kept(name: str, *arrays: Any) -> Any:
            if name == "unet":
                seen.append(tuple(a.copy() for a in arrays))
            return run(name, *arrays)

        self.run = kept  # type: ignore[method-assign]
        self.replace(pipe)
        pipe.set_progress_bar_config(disable=True)
        width, height = (min(side, MOST_PIXELS) for side in spec["size"])
        for seed, prompt in enumerate(CALIBRATION_PROMPTS):
            generator = self.torch.Generator().manual_seed(seed)
            pipe(
                prompt,
                num_inference_steps=spec["calibration"]["steps"],
                guidance_scale=spec["calibration"]["guidance"],
                generator=generator,
                width=width,
                height=height,
                output_type="latent",
            )
        self.run = run  # type: ignore[method-assign]
        return seen


if __name__ == "__main__":
    serve(NncfPeer)
