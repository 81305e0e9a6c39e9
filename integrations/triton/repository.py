"""A model repository for Triton Inference Server: `NAME/config.pbtxt`, `NAME/1/model.py` and the bundle beside it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from ...bundle import Bundle
from ...engines.backends.registry import device_of
from ...errors import ArgumentError
from ...places import put_in_place, staging_folder, writing
from ...runtime.arguments import check_integer
from ...runtime.request import check_size

VERSION, FOLDER = "1", "bundle"
MOST_BATCH = 256
MODEL = '''"""Triton loads this file; the model is fewstep's."""

from fewstep.integrations.triton.model import TritonPythonModel as TritonPythonModel
'''
INPUTS = (
    ("prompt", "TYPE_STRING"),
    ("negative", "TYPE_STRING"),
    ("seed", "TYPE_UINT64"),
    ("steps", "TYPE_INT32"),
    ("guidance", "TYPE_FP32"),
    ("sampler", "TYPE_STRING"),
    ("schedule", "TYPE_STRING"),
)
"""By request, [batch, 1] each; all but the first may be left out."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def write_repository(
    bundle: Bundle,
    folder: Path,
    *,
    name: str | None = None,
    size: tuple[int, int] | None = None,
    max_batch: int = 8,
    delay_us: int = 5000,
    backend: str = "auto",
    link: bool = False,
) -> Path:
    """Write a bundle as a model of the repository in a folder, which need not be there; returns the model's folder.

    name: of the model (the bundle's own). size: (width, height) of its pictures. max_batch: images that one execution
    takes. delay_us: microseconds that the dynamic batcher waits for more of them. backend: what runs the graphs. link:
    point at the bundle instead of copying it. Raises `ArgumentError` for a name or a size that cannot be, and where
    the model is there already.
    """
    title = bundle.name if name is None else name
    if not _NAME.fullmatch(title):
        raise ArgumentError(
            f"the model's name is {title[:80]!r}", expected="letters, digits, dots, dashes, underscores"
        )
    if bundle.model.clips or bundle.model.pictures == "told":
        raise ArgumentError(
            f"{bundle.model.title} as a model of Triton", expected="a model that makes pictures of texts"
        )
    defaults = bundle.defaults
    width, height = check_size(bundle, size or (defaults.width, defaults.height))
    check_integer("max_batch", max_batch, 1, MOST_BATCH)
    check_integer("delay_us", delay_us, 0, 60_000_000)
    model = folder / title
    if model.exists():
        raise ArgumentError(f"{str(model)!r} is there already", remedy="Choose another folder or --name, or remove it.")
    with writing("the model repository", folder), staging_folder(model) as staging:
        version = staging / VERSION
        version.mkdir()
        if link:
            (version / FOLDER).symlink_to(bundle.folder.resolve(), target_is_directory=True)
        else:
            shutil.copytree(bundle.folder, version / FOLDER)
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        text = config_text(title, (width, height), max_batch=max_batch, delay_us=delay_us, backend=backend)
        (staging / "config.pbtxt").write_text(text, encoding="utf-8")
        staging.chmod(0o755)
        put_in_place(staging, model)
    return model


def config_text(name: str, size: tuple[int, int], *, max_batch: int, delay_us: int, backend: str) -> str:
    """`config.pbtxt`: the text format of Triton's `ModelConfig`."""
    width, height = size
    outputs = [("image", "TYPE_UINT8", f"{height}, {width}, 3"), ("seed", "TYPE_UINT64", "1")]
    outputs += [("parameters", "TYPE_STRING", "1")]
    preferred = [n for n in (2, 4, 8, 16, 32, 64, 128) if n < max_batch] + [max_batch]
    lines = [f"name: {json.dumps(name)}", 'backend: "python"', f"max_batch_size: {max_batch}", ""]
    for tensor, kind in INPUTS:
        optional = "" if tensor == "prompt" else "  optional: true\n"
        lines.append(f'input {{\n  name: "{tensor}"\n  data_type: {kind}\n  dims: [ 1 ]\n{optional}}}')
    for tensor, kind, dims in outputs:
        lines.append(f'output {{\n  name: "{tensor}"\n  data_type: {kind}\n  dims: [ {dims} ]\n}}')
    kind = "KIND_AUTO" if backend == "auto" else "KIND_CPU" if device_of(backend) == "cpu" else "KIND_GPU"
    lines += [
        f"dynamic_batching {{\n  preferred_batch_size: [ {', '.join(map(str, preferred))} ]",
        f"  max_queue_delay_microseconds: {delay_us}\n}}",
        f"instance_group {{\n  count: 1\n  kind: {kind}\n}}",
    ]
    for key, value in (("bundle", FOLDER), ("backend", backend), ("size", f"{width}x{height}")):
        lines.append(f'parameters {{\n  key: "{key}"\n  value {{ string_value: {json.dumps(value)} }}\n}}')
    return "\n".join(lines) + "\n"
