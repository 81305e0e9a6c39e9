"""Networks that look at a picture beside a checkpoint's UNet: their folders, and whether they belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ArgumentError, PickledFileError, UnsupportedError
from ...families.base import vae_factor
from ...families.control import CONTROL_CLASSES, CONTROLS, MOST_CONTROLS, is_control_name, misfit
from ...weights.stored import PICKLES, Stored, open_tensors
from .folder import Checkpoint, Part, fetch_network, read_json, read_network

PART = "controlnet"
"""What such a network is called in errors, and whose table of values its configuration is read by."""
OTHERS = {
    "ControlNetUnionModel": "a ControlNet of several kinds of pictures in one",
    "ControlNetXSAdapter": "a ControlNet-XS, which is woven into its UNet",
    "UNetControlNetXSModel": "a ControlNet-XS, which is woven into its UNet",
    "SparseControlNetModel": "a ControlNet for video",
    "MultiAdapter": "several T2I adapters in one",
}


def open_controls(
    checkpoint: Checkpoint, sources: Mapping[str, str | Path], *, variant: str | None, offline: bool
) -> dict[str, Part]:
    """The networks of folders (or hub ids) by the names that requests will know them by.

    Raises `ArgumentError` for a name that inputs cannot have and for a network of another family.
    """
    if len(sources) > MOST_CONTROLS:
        raise ArgumentError(f"{len(sources)} ControlNets", expected=f"at most {MOST_CONTROLS}")
    found = {}
    for name, source in sorted(sources.items()):
        if not is_control_name(name):
            raise ArgumentError(
                f"{name!r} as a ControlNet's name",
                expected="small letters, digits and underscores, like canny, and no _scale at its end",
            )
        found[name] = _open(checkpoint, source, variant=variant, offline=offline)
    return found


def _open(checkpoint: Checkpoint, source: str | Path, *, variant: str | None, offline: bool) -> Part:
    path = Path(source)
    if path.suffix in PICKLES:
        raise PickledFileError(path.name, expected="a diffusers folder with .safetensors weights")
    if path.is_file():
        raise UnsupportedError(
            f"{path.name} is a single file", expected="a ControlNet's diffusers folder, which has config.json"
        )
    place = path if path.is_dir() else fetch_network(str(source), variant=variant, offline=offline)
    class_name = str(read_json(place / "config.json").get("_class_name"))
    if class_name not in CONTROL_CLASSES:
        raise UnsupportedError(
            f"{path.name} is {OTHERS.get(class_name, 'no ControlNet')} ({class_name})",
            expected=" or ".join(CONTROL_CLASSES),
        )
    part = read_network(place, PART, class_name, CONTROL_CLASSES[class_name], variant)
    unlike = misfit(part.config, checkpoint.parts["unet"].config, vae_factor(checkpoint.parts["vae"].config))
    if unlike is not None:
        raise ArgumentError(
            f"the ControlNet {path.name} has {unlike[0]}",
            expected=unlike[1],
            remedy=f"Give a ControlNet made for {checkpoint.model.title}, or the base that this one was made for.",
        )
    return part


def controlled_config(config: Mapping[str, Any], controls: Mapping[str, Part]) -> dict[str, Any]:
    """A UNet's configuration with those of the networks beside it, which decide its graph too."""
    plain = {k: v for k, v in config.items() if k != CONTROLS}
    if not controls:
        return plain
    return {**plain, CONTROLS: {name: _stated(part) for name, part in controls.items()}}


def _stated(part: Part) -> dict[str, Any]:
    own = {k: v for k, v in part.config.items() if not k.startswith("_")}
    return {"_class_name": part.class_name, **own}


def control_tensors(name: str, part: Part) -> dict[str, Stored]:
    """A network's tensors under the names that the graph of its UNet has them by."""
    return {f"controls.{name}.{key}": tensor for key, tensor in open_tensors(part.files).items()}
