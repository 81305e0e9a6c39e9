"""A checkpoint on disk: which pipeline it is, its parts, and the files that hold them. Nothing is loaded here.

Class names in `model_index.json` are data and go through an allow-list; weights are safetensors or are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import values
from ...errors import CorruptError, MissingError, MissingExtraError, PickledFileError, UnsafeFileError, UnsupportedError
from ...families import Family, all_families, known_models
from ...families.configs import check_config
from ...families.image_prompt import CLIP_DEVIATION, CLIP_MEAN, IMAGE_ENCODER
from ...families.pixels import PIXEL_CONFIG, PIXELS
from ...schedules.keys import check_keys
from ...values import Reader
from ...weights.stored import PICKLES
from .parts import Checkpoint as Checkpoint
from .parts import Part as Part

NOT_EXPORTED = {
    "IF": "a DeepFloyd-IF pipeline that starts from pictures",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "StableDiffusionControlNet": "a pipeline around a ControlNet",
    "StableDiffusionXLControlNet": "a pipeline around a ControlNet",
    "StableDiffusionAdapter": "a pipeline around a T2I adapter",
    "ControlNet": "a ControlNet",
    "MultiControlNet": "a ControlNet",
    "SD3ControlNet": "a ControlNet",
    "StableDiffusionUpscale": "the SD upscaler",
    "StableDiffusionDepth2Img": "SD 2's depth-to-image model",
}
"""Beginnings of class names (before `Pipeline`, `Model`, `Img2Img` ...) of models that are known and not exported."""
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
NOISING = "image_noising_scheduler"
UNUSED = {"safety_checker", "feature_extractor", "image_encoder", "watermark", "watermarker"}
HUB_INDEX = ("model_index.json", "fewstep.json", "README.md")
UNET_OPTIONS = ("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "num_class_embeds")
"""Keys of a UNet's configuration that make it one of another kind, unless its family has them."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, variant: str | None = None, offline: bool = False
) -> Checkpoint:
    """Understand a diffusers folder, or a hub id through the hub's own cache.

    Raises `MissingError` (no such folder), `UnsafeFileError` (a pickle), `UnsupportedError` (a class that is not
    exported), `CorruptError` (a configuration that cannot be read).
    """
    path = Path(source)
    if path.suffix in PICKLES:
        raise PickledFileError(path.name, expected="a diffusers folder with .safetensors weights")
    if path.is_file():
        raise UnsupportedError(
            f"{path.name} is a single file",
            expected="a diffusers folder",
            remedy="A single file has no configurations and no tokenizer: give a diffusers folder of its family with "
            "--base.",
        )
    if path.is_dir():
        return _from_folder(path, str(source), variant=variant, revision=None)
    if _HUB_ID.fullmatch(str(source)) and not str(source).startswith((".", "/")):
        return _from_hub(str(source), revision=revision, variant=variant, offline=offline)
    raise MissingError(
        f"no folder {str(source)!r}", expected="a diffusers folder or a hub id like 'stabilityai/sd-turbo'"
    )


def _from_hub(name: str, *, revision: str | None, variant: str | None, offline: bool) -> Checkpoint:
    with _fetching(name, revision=revision, offline=offline) as fetch:
        folder = fetch(allow_patterns=list(HUB_INDEX))
        index = read_json(Path(folder) / "model_index.json")
        folder = fetch(allow_patterns=hub_files(index, variant))
        if variant and (patterns := plain_files(Path(folder), index, variant)):
            folder = fetch(allow_patterns=patterns)
    return _from_folder(Path(folder), name, variant=variant, revision=Path(folder).name)


def fetch_network(name: str, *, variant: str | None, offline: bool) -> Path:
    """The folder of a single network's hub id; `MissingError` for what is neither that nor in reach."""
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "/")):
        raise MissingError(f"no folder {name!r}", expected="a diffusers folder with config.json, or a hub id")
    with _fetching(name, revision=None, offline=offline) as fetch:
        folder = Path(fetch(allow_patterns=["config.json", "README.md", *_weight_patterns("", variant)]))
        if variant and not has_variant(folder, variant):
            folder = Path(fetch(allow_patterns=_weight_patterns("", None)))
    return folder


@contextmanager
def _fetching(name: str, *, revision: str | None, offline: bool) -> Iterator[Callable[..., str]]:
    """What fetches files of a hub id into the hub's cache; its refusals within are `MissingError`."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "export", purpose=f"Fetching {name!r}") from error
    try:
        yield partial(snapshot_download, name, revision=revision, local_files_only=offline)
    except LocalEntryNotFoundError as error:
        hint = "Leave out --offline, or fetch it first." if offline else "Check the network, or give a folder."
        raise MissingError(f"{name!r} is not in the hub's cache and could not be fetched", remedy=hint) from error
    except (RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MissingError(
            f"{name!r} could not be fetched from the hub ({type(error).__name__})",
            remedy="Check its name and your access.",
        ) from error


def _families_of(index: Mapping[str, Any]) -> Sequence[Family]:
    """The families that have the index's pipeline; all of them where none has."""
    return [f for f in all_families() if index.get("_class_name") in f.pipelines] or all_families()


def hub_files(index: Mapping[str, Any], variant: str | None) -> list[str]:
    """Patterns of the files an export reads, and no others: a repository may hold every weight several times over."""
    patterns = [*HUB_INDEX, "scheduler/*.json", f"{NOISING}/*.json"]
    named = {n for f in _families_of(index) for n in (*f.parts, *(e.tokenizer for e in f.text_encoders))}
    for name in sorted(named & index.keys()):
        patterns += [f"{name}/*.json", f"{name}/*.txt", f"{name}/spiece.model"]
        if not name.startswith("tokenizer"):
            patterns += _weight_patterns(name, variant)
        if name == IMAGE_ENCODER:
            patterns.append("feature_extractor/*.json")
    return patterns


def _weight_patterns(name: str, variant: str | None) -> list[str]:
    stem = (f"{name}/" if name else "") + _stem(name) + (f".{variant}" if variant else "")
    return [f"{stem}.safetensors", f"{stem}-[0-9]*.safetensors"]


def plain_files(folder: Path, index: Mapping[str, Any], variant: str) -> list[str]:
    """Patterns of the weights without a variant's name, for the parts of a fetched folder that lack the variant."""
    parts = sorted({n for f in _families_of(index) for n in f.parts} & index.keys())
    return [p for n in parts if not has_variant(folder / n, variant) for p in _weight_patterns(n, None)]


def _stem(name: str) -> str:
    return "model" if name.endswith("encoder") or name.startswith("text_encoder") else "diffusion_pytorch_model"


def _from_folder(folder: Path, source: str, *, variant: str | None, revision: str | None) -> Checkpoint:
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        _refuse_class(str(read_json(folder / "config.json").get("_class_name")))
    index = read_json(folder / "model_index.json", remedy="Give the folder that holds model_index.json.")
    pipeline = str(index.get("_class_name"))
    families = [f for f in all_families() if pipeline in f.pipelines]
    if not families:
        _refuse_class(pipeline)
        known = dict.fromkeys(p for f in all_families() for p in f.pipelines)
        raise UnsupportedError(f"the checkpoint is a {pipeline}", expected=f"one of {', '.join(known)}")
    refused = next((r for f in families if (r := f.refusal(index)) is not None), None)
    if refused is not None:
        raise UnsupportedError(
            f"the checkpoint is {refused}", expected=known_models(), remedy="Export the base of its family."
        )
    parts, tokenizers = _read_parts(folder, index, families[0], variant)
    names, encoders = families[0].parts, {e.name for e in families[0].text_encoders}
    left_out = families[0].vae is None and not encoders & parts.keys()  # as the later of several stages are saved
    for name in names:
        if name not in parts and not (left_out and name in encoders):
            raise UnsupportedError(f"the checkpoint has no {name}", expected=f"a {pipeline} with {', '.join(names)}")
    if families[0].vae is None:
        parts["vae"] = Part(name="vae", class_name=PIXELS, config=PIXEL_CONFIG, place=folder, files=())
    configs = {n: p.config for n, p in parts.items()}
    model = next(f for f in families if f.recognises(configs))
    check_unet(parts["unet"].config, model)
    check_parts(parts, model)
    if model.image_encoder is not None:
        _check_normalisation(folder)
    parts["unet"] = replace(parts["unet"], config=model.loaded_unet(pipeline, parts["unet"].config))
    parts |= {n: replace(parts[n], config=model.loaded_text(parts[n].config)) for n in encoders & parts.keys()}
    return Checkpoint(
        folder=folder,
        source=source,
        model=model,
        pipeline=pipeline,
        parts=parts,
        tokenizers=() if left_out else tokenizers,
        scheduler=model.loaded_scheduler(pipeline, _read_scheduler(folder, index, "scheduler")),
        noising={} if model.noise_level is None else _read_scheduler(folder, index, NOISING),
        force_zeros=_force_zeros(index, model),
        licence=licence_of(folder),
        revision=revision,
    )


def _check_normalisation(folder: Path) -> None:
    """Refuse a folder whose image encoder takes pictures by other numbers than CLIP's."""
    place = folder / "feature_extractor" / "preprocessor_config.json"
    stated = read_json(place) if place.is_file() else {}
    for key, usual in (("image_mean", CLIP_MEAN), ("image_std", CLIP_DEVIATION)):
        if (found := stated.get(key, usual)) not in (list(usual), usual):
            raise UnsupportedError(f"the feature extractor normalises pictures by {key} {found}", expected=f"{usual}")


def _force_zeros(index: Mapping[str, Any], model: Family) -> bool:
    reading = Reader(place="model_index.json", remedy="Take the whole checkpoint.")
    stated = index.get("force_zeros_for_empty_prompt", model.force_zeros)
    return False if stated is None else reading.flag("force_zeros_for_empty_prompt", stated)  # as diffusers reads null


def _read_scheduler(folder: Path, index: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A scheduler's configuration, of the class that `model_index.json` names, whatever its own file says."""
    config = read_json(folder / name / "scheduler_config.json")
    check_keys(config, Reader(place=f"{name}/scheduler_config.json", remedy="Take the whole checkpoint."))
    stated = index.get(name)
    named = isinstance(stated, list) and len(stated) == 2 and isinstance(stated[1], str)
    return {**config, "_class_name": stated[1]} if named and isinstance(stated, list) else config


def _read_parts(
    folder: Path, index: Mapping[str, Any], family: Family, variant: str | None
) -> tuple[dict[str, Part], tuple[Path, ...]]:
    """The parts that `model_index.json` names, and the folders of the tokenizers in the encoders' order."""
    parts: dict[str, Part] = {}
    order = [e.tokenizer for e in family.text_encoders]
    if variant and not any(has_variant(folder / n, variant) for n in index):
        found = ", ".join(variants_of(folder, index))
        raise MissingError(
            f"no part of {folder.name!r} has weights of the variant {variant!r}",
            expected=f"files like {_stem('unet')}.{variant}.safetensors",
            remedy=f"Choose a variant it has: {found} (--variant)." if found else "Leave --variant out.",
        )
    tokenizers: set[str] = set()
    admitted = {**{n: tuple(p.classes) for n, p in family.parts.items()}, **dict.fromkeys(order, TOKENIZERS)}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or value[1] is None:
            continue
        if name in ("scheduler", NOISING) or (name in UNUSED and name not in admitted):
            continue
        if name not in admitted:
            raise UnsupportedError(
                f"the checkpoint has a part {name!r} ({value[1]})", expected=f"only {', '.join(admitted)}"
            )
        if value[1] not in admitted[name]:
            raise UnsupportedError(f"the {name} is a {value[1]!r}", expected=" or ".join(sorted(admitted[name])))
        if name in order:
            tokenizers.add(name)
        else:
            parts[name] = read_part(folder / name, name, str(value[1]), family, variant)
    return parts, tuple(folder / n for n in order if n in tokenizers)


def _refuse_class(name: str) -> None:
    """`UnsupportedError` for a class that is known by the name of its model."""
    stem = re.sub(r"(Img2Img|Inpaint\w*|Inpainting|SuperResolution)?(Pipeline|Model)$", "", name)
    if stem in NOT_EXPORTED:
        raise UnsupportedError(
            f"the checkpoint is {NOT_EXPORTED[stem]} ({name})",
            expected=known_models(),
            remedy="It is not exported.",
        )


def check_unet(config: Mapping[str, Any], family: Family) -> None:
    """`UnsupportedError` for a UNet whose configuration says that it is of another kind."""
    latent = family.latent_channels(config)
    if config.get("out_channels") != latent and not family.says_variance(config):
        raise UnsupportedError(
            f"the UNet takes {config.get('in_channels')} channels and gives {config.get('out_channels')}",
            expected="as many in as out; inpainting UNets with mask channels are not exported"
            if not family.clips
            else "twice as many in as out, a picture's latents beside those of each frame",
            remedy="" if family.clips else "Use the base checkpoint: inpainting with it blends latents.",
        )
    for name in UNET_OPTIONS:
        if config.get(name) is not None and name not in family.unet_options:
            raise UnsupportedError(f"the UNet has {name}={config[name]!r}", expected=f"a UNet of {family.title}")
    addition = config.get("addition_embed_type")
    if addition is not None and addition not in family.addition_types:
        raise UnsupportedError(
            f"the UNet states addition_embed_type {addition!r}",
            expected=f"{' or '.join(map(repr, family.addition_types)) or 'none'}, as {family.title} has",
        )


def check_parts(parts: Mapping[str, Part], family: Family) -> None:
    """`UnsupportedError` for a part that asks of its pipeline what is not done."""
    for name, part in parts.items():
        if (asked := family.part_refusal(name, part.config)) is not None:
            raise UnsupportedError(
                f"the {name} {asked}",
                expected=f"a {name} that does not",
                remedy=f"Take that word out of {name}/config.json if the model was not trained with it.",
            )


def read_part(place: Path, name: str, class_name: str, family: Family, variant: str | None) -> Part:
    """A component from its own folder, which holds its configuration and its weights."""
    part = read_network(place, name, class_name, family.parts[name].classes[class_name], variant)
    if "_class_name" in part.config:
        part = replace(part, config={**part.config, "_class_name": class_name})  # the index's counts
    return part


def read_network(place: Path, name: str, class_name: str, needed: tuple[str, ...], variant: str | None) -> Part:
    """A network from a folder with config.json and weights. needed: keys that its configuration must state.

    name: what it is, as a part's or for people: decides the names of its files and which values are admitted.
    """
    config = read_json(place / "config.json")
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"the {name} is quantized (quantization_config)",
            expected="float32, float16 or bfloat16 weights",
            remedy="Take the checkpoint that it was made of.",
        )
    missing = [k for k in needed if not isinstance(config.get(k), (int, list, tuple)) or not config[k]]
    if missing:
        raise CorruptError(
            f"{name}/config.json does not state {', '.join(missing)}", remedy="Take the whole checkpoint."
        )
    reading = Reader(place=f"{name}/config.json", remedy="Take the whole checkpoint.")
    check_config(name, config, reading)
    files = _weight_files(place, _stem(name), variant if variant and has_variant(place, variant) else None)
    return Part(name=name, class_name=class_name, config=config, place=place, files=files)


def has_variant(place: Path, variant: str) -> bool:
    """Whether any file of a part's folder is of the variant, by its name between the first two dots, as diffusers asks.

    Only such parts are loaded from files of the variant; the others' plain files are beside them.
    """
    return place.is_dir() and any(p.name.partition(".")[2].startswith(variant) for p in place.iterdir())


def variants_of(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """The variants that safetensors files in a checkpoint's folders are named by."""
    names = [p.name.split(".") for n in index for p in (folder / n).glob("*.safetensors")]
    return sorted({parts[1] for parts in names if len(parts) == 3})


def _weight_files(place: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """The safetensors files of a part: one file or shards, with the variant's name where one is asked for.

    Where there are both, diffusers takes its own models from shards, and transformers its from the one file.
    """
    middle = f".{variant}" if variant else ""
    single = place / f"{stem}{middle}.safetensors"
    indices = [place / f"{stem}.safetensors.index{middle}.json", place / f"{stem}{middle}.safetensors.index.json"]
    index = next((i for i in indices if i.is_file()), indices[0])
    if single.is_file() and (stem == "model" or not index.is_file()):
        return (single,)
    if index.is_file():
        reading = Reader(place=f"{place.name}/{index.name}", remedy="Take the whole checkpoint.")
        placed = reading.mapping("weight_map", read_json(index).get("weight_map", {}))
        shards = sorted({reading.text("a shard", shard, most=255) for shard in placed.values()})
        for shard in shards:
            if Path(shard).name != shard or not (place / shard).is_file():
                raise MissingError(
                    f"{index.name} names the shard {shard!r}, which is not beside it",
                    remedy="Take the whole checkpoint.",
                )
        return tuple(place / s for s in shards)
    others = sorted(p.name for p in place.glob("*")) if place.is_dir() else []
    pickles = [n for n in others if Path(n).suffix in PICKLES]
    if pickles:
        raise UnsafeFileError(
            f"{place.name} has its weights as pickles only ({', '.join(pickles)})",
            expected=single.name,
            remedy="Take the checkpoint's safetensors files.",
        )
    variants = sorted({n.split(".")[1] for n in others if n.endswith(".safetensors") and n.count(".") == 2})
    hint = f"Choose a variant it has: {', '.join(variants)} (--variant)." if variants else "Take the whole checkpoint."
    raise MissingError(f"{place.name} has no {single.name}", remedy=hint)


def licence_of(folder: Path) -> str | None:
    """The licence id that the model card states."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    match = re.search(
        r"^license:\s*([\w.+-]+)\s*$", card.read_text(encoding="utf-8", errors="replace")[:4000], re.MULTILINE
    )
    return match.group(1) if match else None


def read_json(path: Path, *, remedy: str = "Take the whole checkpoint.") -> dict[str, Any]:
    """A JSON object from a file; `MissingError` or `CorruptError` say what is wrong with it."""
    if not path.is_file():
        raise MissingError(f"no {path.parent.name}/{path.name} in the checkpoint", remedy=remedy)
    place = f"{path.parent.name}/{path.name}"
    data = values.read_json(path, place, remedy=remedy)
    if not isinstance(data, dict):
        raise CorruptError(f"{place} holds a {type(data).__name__}", expected="a JSON object", remedy=remedy)
    return data
