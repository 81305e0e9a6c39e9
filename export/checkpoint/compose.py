"""A checkpoint from several sources: a base folder, and what replaces its parts.

A single file in the original layout has weights only; configurations, tokenizers and scheduler come from a base
folder of its family. A UNet or a VAE may come from another file or folder, and LoRAs are fused as weights are written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ...errors import ArgumentError, CorruptError, MissingError, PickledFileError, UnsupportedError
from ...families import all_families
from ...families.base import LATENT_STATISTICS, vae_factor
from ...weights.delta import LoraFile
from ...weights.embeddings import embedding_file, read_words, with_words
from ...weights.stored import PICKLES, Stored, open_tensors
from ..tokenizers import read_tokenizer
from .configs import TINY_DEFAULTS
from .controls import open_controls
from .folder import (
    Checkpoint,
    Part,
    check_parts,
    check_unet,
    licence_of,
    open_checkpoint,
    read_json,
    read_part,
)
from .ip_adapter import open_ip_adapter
from .parts import IpAdapter
from .singlefile import TINY_MARK, find_layout, refuse_others, scheduler_changes, translate

_RESCALING = {
    *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler"),
}
"""diffusers' schedulers that read `rescale_betas_zero_snr`."""


def compose_checkpoint(
    source: str | Path,
    *,
    base: str | Path | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Iterable[tuple[str | Path, float]] = (),
    embeddings: Iterable[tuple[str | None, str | Path]] = (),
    controlnets: Mapping[str, str | Path] | None = None,
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    tiny_decoder: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    without: Sequence[str] = (),
) -> Checkpoint:
    """Understand a checkpoint and what replaces its parts; only the headers of weight files are read.

    source: a diffusers folder, a hub id, or a single safetensors file in the original layout, which needs `base`,
    a diffusers folder or hub id of its family. unet, vae: a safetensors file in either layout, or a folder with
    config.json. loras: files with the factors they are fused with. embeddings: files of textual inversion, with the
    words that prompts name them by, or `None` for the files' own. controlnets: folders or hub ids by name. ip_adapter:
    a file, with its image encoder's folder where that is not beside it. without: text encoders that are left out, all
    of them, since texts may be given as their embeddings. Raises the errors of `open_checkpoint`, and
    `ArgumentError` for parts that do not belong together.
    """
    file = Path(source)
    single = file.is_file() and file.suffix not in PICKLES
    if base is not None and not single:
        raise ArgumentError(
            f"--base is given, and {file.name!r} is no single file", remedy="Leave it out: a folder is its own base."
        )
    opened = open_checkpoint(
        base if single and base is not None else source, revision=revision, variant=variant, offline=offline
    )
    parts = dict(opened.parts)
    scheduler = dict(opened.scheduler)
    if single:
        scheduler |= _marked(file, scheduler)
        parts |= _single_file_parts(opened, file, skip={"vae"} if vae is not None else set())
    if unet is not None:
        parts["unet"] = _replaced(opened, parts["unet"], Path(unet))
    if vae is not None and opened.model.vae is None:
        raise ArgumentError(f"a VAE for {opened.model.title}, which samples pixels", remedy="Leave --vae out.")
    if vae is not None:
        parts["vae"] = _replaced(opened, parts["vae"], Path(vae))
    check_parts(parts, opened.model)
    _check_vae(parts["vae"], opened.model.latent_channels(parts["unet"].config))
    parts = {n: p for n, p in parts.items() if n not in _left_out(opened, without)}
    fused = tuple(_lora_file(path, scale) for path, scale in loras)
    learned = [embedding_file(name, path) for name, path in embeddings]
    parts |= _with_words(opened, parts, learned)
    composed = replace(opened, parts=parts)
    controls = open_controls(composed, controlnets or {}, variant=variant, offline=offline)
    pictured = None if ip_adapter is None else open_ip_adapter(composed, ip_adapter, image_encoder)
    if image_encoder is not None and pictured is None:
        raise ArgumentError("an image encoder without an IP-Adapter", remedy="Name the adapter by --ip-adapter.")
    tiny = None if tiny_decoder is None else _tiny(opened, parts["vae"], Path(tiny_decoder))
    given: dict[str, Any] = {
        "tiny_decoder": None if tiny_decoder is None else str(tiny_decoder),
        "variant": variant,
        "base": str(opened.folder) if single else None,
        "unet": None if unet is None else str(unet),
        "vae": None if vae is None else str(vae),
        "loras": [[str(f.path), f.scale] for f in fused],
        "embeddings": [[name, str(path)] for name, path in learned],
        "ip_adapter": pictured and str(pictured.file),
        "image_encoder": pictured and str(pictured.encoder.place),
        "controlnets": {name: str(part.place) for name, part in controls.items()},
        "without": list(without),
    }
    return replace(
        opened,
        source=str(source),
        file=file if single else None,
        parts=parts,
        tokenizers=opened.tokenizers if any(e.name in parts for e in opened.model.text_encoders) else (),
        scheduler=scheduler,
        loras=fused,
        controls=controls,
        adapter=pictured,
        tiny=tiny,
        options={k: v for k, v in given.items() if v},
    )


def _left_out(checkpoint: Checkpoint, without: Sequence[str]) -> set[str]:
    """The text encoders that are asked to be left out: all or none."""
    encoders = {e.name for e in checkpoint.model.text_encoders}
    if without and set(without) != encoders:
        raise ArgumentError(
            f"without {', '.join(without)}",
            expected=" and ".join(sorted(encoders)) or "nothing",
            remedy="Text encoders are left out together; nothing else can be.",
        )
    return set(without)


def read_tensors(part: Part, tensors: Mapping[str, Stored], keys: Iterable[str]) -> Mapping[str, Stored]:
    """A part's tensors under our names, whatever layout its files have, with the words that it learns besides."""
    if part.layout != "folder":
        tensors = translate(part.name, part.layout, part.prefix, part.config, tensors, keys)
    return with_words(tensors, part.words, part.config["vocab_size"]) if part.words else tensors


def _with_words(
    checkpoint: Checkpoint, parts: Mapping[str, Part], files: Sequence[tuple[str | None, Path]]
) -> dict[str, Part]:
    """The text encoders that learn words from files of textual inversion."""
    encoders = [e.name for e in checkpoint.model.text_encoders]
    if not files or len(encoders) != len(checkpoint.tokenizers):
        return {}
    widths = {e: int(parts[e].config["hidden_size"]) for e in encoders}
    words, known = read_words(files, widths, [read_tokenizer(t)[0] for t in checkpoint.tokenizers])
    return {e: replace(parts[e], words=w, config={**parts[e].config, "vocab_size": known[e]}) for e, w in words.items()}


def _marked(file: Path, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's changes that the file asks for; one that cannot rescale its betas gives way to Euler's."""
    changes = scheduler_changes(open_tensors([file]), file.name)
    if changes.get("rescale_betas_zero_snr") and scheduler.get("_class_name") not in _RESCALING:
        changes["_class_name"] = "EulerDiscreteScheduler"
    return changes


def _single_file_parts(base: Checkpoint, file: Path, *, skip: set[str]) -> dict[str, Part]:
    tensors = open_tensors([file])
    refuse_others(tensors, file.name)
    parts = {}
    for name, part in base.parts.items():
        if name in skip:
            continue
        layout = find_layout(name, tensors)
        if name == "unet":
            _check_family(part, tensors, file, layout)
        if layout is None:
            hint = "Give a VAE with --vae." if name == "vae" else "Export the base with this file as --unet."
            raise MissingError(
                f"{file.name} holds no {name.replace('_', ' ')}",
                expected=f"every part of a checkpoint of the base's family, {base.family}",
                remedy=hint,
            )
        parts[name] = replace(part, files=(file,), layout=layout[0], prefix=layout[1])
    return parts


def _replaced(base: Checkpoint, part: Part, path: Path) -> Part:
    """A part with its weights from another file, or with everything from another folder."""
    if path.suffix in PICKLES:
        raise PickledFileError(path.name)
    if path.is_dir():
        return _from_folder(base, part, path)
    if not path.is_file():
        raise MissingError(f"no file {str(path)!r}", expected="a .safetensors file, or a folder with config.json")
    tensors = open_tensors([path])
    refuse_others(tensors, path.name)
    layout = find_layout(part.name, tensors)
    if part.name == "unet":
        _check_family(part, tensors, path, layout)
    if layout is None:
        raise CorruptError(
            f"{path.name} holds no {part.name.upper()} that is known",
            expected="diffusers' names (conv_in.weight ...) or the original ones (input_blocks.0.0.weight ...)"
            if part.name == "unet"
            else "the weights of an AutoencoderKL, by diffusers' names or the original ones",
        )
    replacement = replace(part, files=(path,), layout=layout[0], prefix=layout[1])
    if part.name == "vae" and layout[1] + TINY_MARK in tensors:
        config = {"_class_name": "AutoencoderTiny", **TINY_DEFAULTS}
        replacement = replace(replacement, class_name="AutoencoderTiny", config=config)
    return replacement


def _tiny(base: Checkpoint, vae: Part, path: Path) -> Part:
    """A tiny autoencoder beside the VAE, of the same latents and as many pixels a cell."""
    if base.model.vae is None or base.model.clips:
        raise ArgumentError(f"a tiny decoder for {base.model.title}", remedy="Leave --tiny-decoder out.")
    part = _replaced(base, vae, path)
    if part.class_name != "AutoencoderTiny":
        raise ArgumentError(
            f"{path.name} is an {part.class_name}",
            expected="a tiny autoencoder (AutoencoderTiny)",
            remedy="Another VAE in the place of the checkpoint's own is --vae.",
        )
    _check_vae(part, int(vae.config["latent_channels"]))
    if vae_factor(part.config) != vae_factor(vae.config):
        raise ArgumentError(
            f"the tiny autoencoder makes {vae_factor(part.config)} pixels of a cell",
            expected=f"{vae_factor(vae.config)}, as the VAE",
            remedy="Give one of the same family.",
        )
    return part


def _check_vae(vae: Part, ours: int) -> None:
    """Refuse a VAE whose latents are not the UNet's, of so many channels."""
    theirs = vae.config.get("latent_channels")
    if theirs != ours:
        raise ArgumentError(
            f"the VAE makes latents of {theirs} channels",
            expected=f"{ours}, which the UNet takes",
            remedy="Give a VAE of the same family.",
        )
    for name in LATENT_STATISTICS:
        numbers = vae.config.get(name)
        if numbers is not None and not (
            isinstance(numbers, list)
            and len(numbers) == theirs
            and all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
        ):
            raise CorruptError(f"vae/config.json states {name} {str(numbers)[:60]}", expected=f"{theirs} numbers")
    if vae.class_name == "AutoencoderTiny":
        blocks = [len(vae.config[f"{half}_block_out_channels"]) for half in ("encoder", "decoder")]
        if blocks[0] != blocks[1] or vae.config.get("upsampling_scaling_factor", 2) != 2:
            raise UnsupportedError(
                f"the tiny autoencoder has {blocks[0]} and {blocks[1]} blocks, and upsamples "
                f"{vae.config.get('upsampling_scaling_factor', 2)} times",
                expected="as many blocks on both sides, and 2 times, as tiny autoencoders have",
            )


def _from_folder(base: Checkpoint, part: Part, path: Path) -> Part:
    """The part's own folder, or the folder of a whole checkpoint."""
    place = path if (path / "config.json").is_file() else path / part.name
    config = read_json(place / "config.json", remedy="Give the folder that holds the part's config.json.")
    class_name = str(config.get("_class_name"))
    family, pipeline = base.model, base.pipeline
    admitted = family.parts[part.name].classes
    if class_name not in admitted:
        raise UnsupportedError(f"the {part.name} in {path.name!r} is a {class_name!r}", expected=" or ".join(admitted))
    replacement = read_part(place, part.name, class_name, family, None)
    if part.name == "unet":
        check_unet(replacement.config, family)
        replacement = replace(replacement, config=family.loaded_unet(pipeline, replacement.config))
        ours, theirs = (p.config.get("cross_attention_dim") for p in (part, replacement))
        if ours != theirs:
            raise _another_family(path, theirs, ours)
    return replacement


def _check_family(part: Part, tensors: Mapping[str, Stored], file: Path, layout: tuple[str, str] | None) -> None:
    """Refuse a UNet of another family than the base, by the width of the text vectors that it attends to."""
    if layout is None:
        return
    prefix = layout[1]
    first = tensors[prefix + ("input_blocks.0.0.weight" if layout[0] == "original" else "conv_in.weight")]
    if len(first.shape) == 4 and first.shape[1] != part.config["in_channels"]:
        raise UnsupportedError(
            f"the UNet in {file.name} takes {first.shape[1]} channels",
            expected=f"{part.config['in_channels']}; inpainting UNets with mask channels are not exported",
            remedy="Use the base checkpoint: inpainting with it blends latents.",
        )
    width = next((t.shape[-1] for n, t in sorted(tensors.items()) if n.endswith(".attn2.to_k.weight")), None)
    if width is not None and width != part.config.get("cross_attention_dim"):
        raise _another_family(file, width, part.config.get("cross_attention_dim"))


def _another_family(path: Path, theirs: Any, ours: Any) -> ArgumentError:
    def name(width: Any) -> str:
        title = next((f.title for f in all_families() if f.text_width == width), None)
        return f"{width} ({title})" if title else str(width)

    return ArgumentError(
        f"the UNet in {path.name} attends to text vectors of width {name(theirs)}",
        expected=f"{name(ours)}, the base's",
        remedy="Give a base of the same family.",
    )


def _lora_file(path: str | Path, scale: float) -> LoraFile:
    file = Path(path)
    if file.suffix in PICKLES:
        raise PickledFileError(file.name)
    if not file.is_file():
        raise MissingError(f"no LoRA file {str(path)!r}", expected="a .safetensors file")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ArgumentError(f"the scale of {file.name} is {scale!r}", expected="a finite number, like 1.0")
    return LoraFile(path=file, scale=float(scale))


def names_of(checkpoint: Checkpoint) -> list[str]:
    """The names that may tell what a checkpoint was distilled for, the nearest to its weights first.

    A file's own name comes before what its metadata calls it, that before its folder's, and what replaces a part
    before the part's checkpoint; a repository in the hub's cache has its name three folders up.
    """
    paths = [lora.path for lora in checkpoint.loras]
    paths += [Path(p) for p in (checkpoint.options.get("unet"),) if p]
    paths += [checkpoint.file] if checkpoint.file else []
    names = []
    for path in paths:
        resolved = path.absolute()
        names += [path.name, *_titles(path)]
        if path == checkpoint.file:
            continue
        names += [resolved.parent.name]
        names += [p.name for p in resolved.parents if p.name.startswith("models--")][:1]
    return [*names, checkpoint.source if checkpoint.revision else Path(checkpoint.source).name]


def _titles(path: Path) -> list[str]:
    """What a safetensors file's metadata calls the model: by the model specification, or by kohya's trainer."""
    if not path.is_file():
        return []
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    return [metadata[k] for k in ("modelspec.title", "ss_output_name") if metadata.get(k)]


def describe_part(
    part: Part,
    loras: Iterable[LoraFile],
    controls: Mapping[str, Part] | None = None,
    adapter: IpAdapter | None = None,
) -> dict[str, Any]:
    """Where a component comes from, for the manifest: its files, fused LoRAs and what is traced with it, with hashes
    and licences.
    """
    files = [_describe_file(f) for f in part.files]
    for file, path in zip(files, part.files, strict=True):
        if file["licence"] is None and path.parent == part.place:
            file["licence"] = licence_of(part.place.parent)
    facts: dict[str, Any] = {"part": part.name, "files": files}
    fused = [{**_describe_file(lora.path), "scale": lora.scale} for lora in loras]
    learned = [{**_describe_file(w.path), "word": w.tokens[0], "tokens": len(w.tokens)} for w in part.words]
    beside = {name: [_describe_file(f) for f in own.files] for name, own in (controls or {}).items()}
    named: dict[str, Any] = {"loras": fused, "embeddings": learned, "controls": beside}
    named["ip_adapter"] = adapter and _describe_file(adapter.file)
    return facts | {k: v for k, v in named.items() if v}


def _describe_file(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    licence = metadata.get("modelspec.license") or licence_of(path.parent)
    stat = path.stat()
    return {"file": path.name, "sha256": _sha256(path, stat.st_mtime_ns, stat.st_size), "licence": licence}


@lru_cache(maxsize=64)
def _sha256(path: Path, changed_ns: int, size: int) -> str:
    """A file's hash; when it was changed and its size are part of what is remembered."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
