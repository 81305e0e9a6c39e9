"""optimum's pipeline over ONNX Runtime; the checkpoint is exported by optimum itself, once."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffusers_loop import DiffusersLoop
from protocol import serve


def with_old_names(checkpoint: Path, copy: Path) -> Path:
    """The checkpoint with text encoders' weights named as transformers 4 has them, which is all that optimum admits.

    transformers 5 leaves out the prefix; 4 then draws the embeddings at random, with a warning.
    """
    from safetensors.torch import load_file, save_file

    copy.mkdir()
    for part in checkpoint.iterdir():
        if part.name.startswith("text_encoder"):
            shutil.copytree(part, copy / part.name)
        else:
            (copy / part.name).symlink_to(part.absolute())
    for path in copy.glob("text_encoder*/model.safetensors"):
        weights = load_file(path)
        if not any(n.startswith("text_model.") for n in weights):
            bare = ("text_projection.", "logit_scale")
            named = {n if n.startswith(bare) else f"text_model.{n}": w for n, w in weights.items()}
            save_file(named, path, metadata={"format": "pt"})
    return copy


class Optimum(DiffusersLoop):
    packages = ("optimum", "optimum-onnx", "onnxruntime", "torch", "diffusers", "transformers", "numpy")

    def make(self, spec: dict[str, Any]) -> Any:
        import onnxruntime
        from optimum import onnxruntime as optimum

        if spec["precision"] != "float32":
            raise ValueError(f"optimum has no {spec['precision']} on a CPU")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        folder = Path(spec["cache"]) / "optimum-named"
        index = json.loads((Path(spec["checkpoint"]) / "model_index.json").read_text())
        kind: Any = getattr(optimum, "ORT" + index["_class_name"])  # the general class cannot export a folder
        if not (folder / "model_index.json").is_file():
            with tempfile.TemporaryDirectory() as place:
                checkpoint = with_old_names(Path(spec["checkpoint"]), Path(place) / "checkpoint")
                kind.from_pretrained(str(checkpoint), export=True, local_files_only=True).save_pretrained(folder)
        return kind.from_pretrained(folder, session_options=options, local_files_only=True)

    def evaluate(self, given: dict[str, Any]) -> Any:
        return self.pipe.unet(given["sample"], given["timestep"][0], given["encoder_hidden_states"])[0].numpy()


if __name__ == "__main__":
    serve(Optimum)
