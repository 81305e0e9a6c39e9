"""diffusers' own pipeline with timers round its parts: the base of every peer that runs it."""

from __future__ import annotations

from typing import Any

from protocol import Stages


class DiffusersLoop:
    """A diffusers pipeline; subclasses replace its models. Every call encodes its prompt, as diffusers does."""

    packages: tuple[str, ...] = ("torch", "diffusers", "transformers", "numpy")

    def __init__(self) -> None:
        import torch
        from diffusers import DiffusionPipeline

        self.torch, self.DiffusionPipeline = torch, DiffusionPipeline
        self.stages = Stages()
        self.pipe: Any = None

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        if spec["threads"]:
            self.torch.set_num_threads(spec["threads"])
        self.dtype = getattr(self.torch, spec["precision"])
        self.pipe = self.make(spec)
        self.pipe.set_progress_bar_config(disable=True)
        self.time_parts()
        return {"threads": self.torch.get_num_threads()}

    def make(self, spec: dict[str, Any]) -> Any:
        return self.DiffusionPipeline.from_pretrained(
            spec["checkpoint"], torch_dtype=self.dtype, local_files_only=True, safety_checker=None
        )

    def time_parts(self) -> None:
        wrap, pipe = self.stages.wrap, self.pipe
        wrap(pipe, "encode_prompt", "text")
        wrap(pipe.unet, "forward", "evaluations")
        wrap(pipe.scheduler, "step", "update")
        wrap(pipe.vae, "decode", "decode")

    def request(self, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.stages.clear()
        width, height = spec["size"]
        seeds = [self.torch.Generator().manual_seed(s) for s in spec["seeds"]]
        with self.torch.no_grad():
            images = self.pipe(
                [spec["prompt"]] * len(seeds),
                num_inference_steps=spec["steps"],
                guidance_scale=spec["guidance"],
                generator=seeds,
                width=width,
                height=height,
                output_type="np",
            ).images
        return (images * 255).round().astype("uint8"), self.stages.report()

    def unet(self, inputs: dict[str, Any]) -> Any:
        given = {k: self.torch.from_numpy(v).to(self.dtype) for k, v in inputs.items()}
        given["timestep"] = self.torch.from_numpy(inputs["timestep"])  # as the pipeline passes it
        with self.torch.no_grad():
            return self.evaluate(given)

    def evaluate(self, given: dict[str, Any]) -> Any:
        added = {k: given[k] for k in ("text_embeds", "time_ids") if k in given}
        out = self.pipe.unet(
            given["sample"], given["timestep"], given["encoder_hidden_states"], added_cond_kwargs=added or None
        )
        return out[0].float().numpy()
