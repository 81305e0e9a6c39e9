"""Parts of a bundle replaced by a caller's own modules and tokenizers, exported on the spot into the user's cache.

The files of the parts that stay are copied, or their blocks shared where the file system can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from ..bundle import Bundle, Component, read_bundle, write_manifest
from ..bundle import Tokenizer as TokenizerRecord
from ..engines.gate.reference import file_sha256, stated_reference
from ..engines.kept import find_kept, keeping, kept_folder
from ..errors import ArgumentError, UnsupportedError
from ..families.base import vae_factor
from ..families.control import controls_of
from ..families.image_prompt import IP_ADAPTER
from ..places import copy_file, put_in_place, staging_folder, writing
from ..values import parse_json
from ..weights.lora import match_loras
from .checkpoint.folder import Checkpoint, check_unet, read_json, read_part
from .export import Progress, export_component, find_or_trace
from .gate.gating import REFERENCE, SWITCHED_OFF, judge
from .plan import ComponentPlan, component_config, precision_for
from .tokenizers import write_tokenizer
from .trace.graphs import RECIPE

HALVES = {"vae": ("vae_decoder", "vae_encoder")}


def swap_parts(bundle: Bundle, parts: Mapping[str, Any]) -> Bundle:
    """A bundle with parts replaced, from the cache where the same was made before.

    parts: by name, a module of diffusers or transformers, a tokenizer, or another bundle to take that part from. Each
    network keeps the precision that its module has. Raises `UnsupportedError` for an object that the family has no
    place for, `ArgumentError` for one that does not fit the others, `GateError` where the graph and torch disagree,
    `WriteError` on a full disk.
    """
    root = kept_folder("swapped", "")
    with writing("a bundle with parts replaced", root), staging_folder(root / "saved") as saved:
        places = {n: _save(bundle, n, p, saved / n) for n, p in parts.items() if not isinstance(p, Bundle)}
        folder = root / f"{bundle.name.partition('+')[0]}-{_digest(bundle, parts, places)[:16]}"
        with keeping(folder):
            kept = find_kept(folder)
            if kept is None:
                _make(bundle, parts, places, folder)
                kept = read_bundle(folder)
    return kept


def _save(bundle: Bundle, name: str, part: Any, place: Path) -> Path:
    """A part written as its library writes it, once it is seen to be of a class that the family has a place for."""
    admitted = _admitted(bundle, name)
    if type(part).__name__ not in admitted or not hasattr(part, "save_pretrained"):
        raise UnsupportedError(f"a {type(part).__name__} as the pipeline's {name}", expected=f"{' or '.join(admitted)}")
    part.save_pretrained(place)
    return place


def _admitted(bundle: Bundle, name: str) -> Sequence[str]:
    if name in bundle.model.parts:
        return tuple(bundle.model.parts[name].classes)
    return ("CLIPTokenizer", "CLIPTokenizerFast")


def _digest(bundle: Bundle, parts: Mapping[str, Any], places: Mapping[str, Path]) -> str:
    """A hash of all that the new bundle is made from."""
    found = hashlib.sha256(json.dumps([RECIPE, bundle.to_json()], sort_keys=True, default=str).encode())
    for name, part in sorted(parts.items()):
        found.update(f"\0{name}\0".encode())
        if isinstance(part, Bundle):
            found.update(json.dumps(part.to_json(), sort_keys=True, default=str).encode())
            continue
        for file in sorted(p for p in places[name].rglob("*") if p.is_file()):
            found.update(f"{file.relative_to(places[name])}\0".encode())
            with file.open("rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


def _make(bundle: Bundle, parts: Mapping[str, Any], places: Mapping[str, Path], folder: Path) -> None:
    with staging_folder(folder) as staging:
        plans = [p for n in bundle.model.parts if n in places for p in _plans(bundle, n, places[n])]
        components = {**bundle.components, **_borrowed(bundle, parts, staging)}
        components |= {p.kind: _export(p, staging) for p in plans}
        tokenizers = _tokenizers(bundle, parts, places, staging)
        for component in components.values():
            for file in (component.graph, component.weights):
                _share(bundle, file, staging)
        for record in tokenizers:
            _share(bundle, record.file, staging)
        unet, vae = components["unet"].config, components["vae_decoder"].config
        _, _, multiple = bundle.model.geometry(unet, vae)
        made = replace(
            bundle,
            folder=staging,
            components=components,
            tokenizers=tokenizers,
            latent=replace(bundle.latent, multiple=multiple),
            guidance_embedding=int(unet.get("time_cond_proj_dim") or 0),
            source={**bundle.source, "replaced": sorted(parts)},
        )
        if made.unet_digest == bundle.unet_digest:
            for stored in bundle.schedules:
                _share(bundle, stored.file, staging)
        else:
            made = replace(made, schedules=())
        made = replace(made, gate=_gate(bundle, made, plans))
        write_manifest(made)
        staging.chmod(0o755)
        put_in_place(staging, folder)


def _plans(bundle: Bundle, name: str, place: Path) -> Iterator[ComponentPlan]:
    """The components of a saved part, each in the precision of the module."""
    family = bundle.model
    stated = read_json(place / "config.json")
    class_name = str(stated.get("_class_name") or (stated.get("architectures") or ["?"])[0])
    part = read_part(place, name, class_name, family, None)
    kinds = HALVES.get(name, (name,))
    if name == "unet":
        own = bundle.component(name).config
        if controls_of(own) or own.get(IP_ADAPTER):
            raise UnsupportedError(
                "another unet for a bundle with ControlNets or an IP-Adapter",
                expected="a bundle without: its graph holds them beside the unet",
                remedy="Export the checkpoint with --unet and --controlnet or --ip-adapter instead.",
            )
        check_unet(part.config, family)
    fitting = {"latent_channels": bundle.latent.channels} if name == "vae" else bundle.component(name).config
    for key in ("cross_attention_dim", "hidden_size", "in_channels", "latent_channels"):
        if fitting.get(key) is not None and part.config.get(key) != fitting[key]:
            raise ArgumentError(
                f"a {name} with {key} {part.config.get(key)}", expected=f"{fitting[key]}, as the bundle's other parts"
            )
    if name == "vae" and vae_factor(part.config) != bundle.latent.factor:
        raise ArgumentError(
            f"a vae of {vae_factor(part.config)} pixels a cell", expected=f"{bundle.latent.factor}, as the bundle's"
        )
    with safe_open(part.files[0], framework="np") as file:
        stored = next(iter(file.get_slice(k).get_dtype() for k in file.keys()))  # noqa: SIM118
    dtype = precision_for(name, part.config, stored)
    for kind in kinds:
        config = component_config(kind, part.config, class_name, family)
        yield ComponentPlan(kind=kind, part=part, config=config, dtype=dtype, family=family)


def _export(plan: ComponentPlan, folder: Path) -> Component:
    graph = find_or_trace(plan, Progress())
    fusion = match_loras((), {plan.kind: (plan.config, {w.key: w.shape for w in graph.parameters})})
    component = export_component(plan, graph, fusion, folder, Progress())
    return replace(component, source={**component.source, "precision": "the module's own"})


def _borrowed(bundle: Bundle, parts: Mapping[str, Any], staging: Path) -> dict[str, Component]:
    """The components that are taken from other bundles, with their files."""
    found: dict[str, Component] = {}
    for name, other in parts.items():
        if not isinstance(other, Bundle):
            continue
        if other.family != bundle.family:
            raise ArgumentError(f"a {name} of family {other.family}", expected=f"one of family {bundle.family}")
        for kind in HALVES.get(name, (name,)):
            if kind in other.components:
                found[kind] = other.component(kind)
                for file in (found[kind].graph, found[kind].weights):
                    _share(other, file, staging)
    return found


def _tokenizers(
    bundle: Bundle, parts: Mapping[str, Any], places: Mapping[str, Path], staging: Path
) -> tuple[TokenizerRecord, ...]:
    """The tokenizers' records, those that were given written anew."""
    records = list(bundle.tokenizers)
    for i, encoder in enumerate(bundle.model.text_encoders):
        name = encoder.tokenizer
        if name in places:
            records[i] = write_tokenizer(parts[name], staging / f"{name}.json", records[i].length)
        elif isinstance(parts.get(name), Bundle):
            records[i] = parts[name].tokenizers[i]
            _share(parts[name], records[i].file, staging)
    return tuple(records)


def _share(bundle: Bundle, name: str, folder: Path) -> None:
    """A bundle's file in another folder, unless there is one of that name."""
    if not (folder / name).exists():
        copy_file(bundle.path(name), folder / name)


def _gate(bundle: Bundle, made: Bundle, plans: Sequence[ComponentPlan]) -> Mapping[str, Any]:
    """Compare the new components with torch, and keep their cases beside those of the components that stay."""
    old = stated_reference(bundle)
    if old is None:
        return SWITCHED_OFF
    if not plans:
        _share(bundle, REFERENCE, made.folder)
        return dict(bundle.gate)
    from .gate.reference import make_reference

    checkpoint = Checkpoint(
        folder=made.folder,
        source=made.name,
        model=made.model,
        pipeline=made.model.pipelines[0],
        parts={p.part.name: p.part for p in plans},
        tokenizers=(),
        scheduler=made.scheduler,
    )
    with safe_open(old, framework="np") as file:
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        facts = dict(file.metadata() or {})
    context = _outputs(stored, made.text_encoders)
    fresh = made.folder / f"new-{REFERENCE}"
    make_reference(checkpoint, fresh, dtypes={}, plans=plans, context=context)
    with safe_open(fresh, framework="np") as file:
        new = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        cases = parse_json((file.metadata() or {})["cases"], f"cases of {REFERENCE}", finite=True)
    fresh.unlink()
    kinds = {p.kind for p in plans}
    facts.pop("pictures", None)  # they were the other components'
    stays = {k: v for k, v in stored.items() if k.partition("/")[0] not in {*kinds, "picture"}}
    stated = {
        k: v
        for k, v in parse_json(facts["cases"], f"cases of {REFERENCE}", finite=True).items()
        if k.partition("/")[0] not in kinds
    }
    save_file({**stays, **new}, made.folder / REFERENCE, metadata={**facts, "cases": json.dumps({**stated, **cases})})
    report = judge(made, kinds)
    components = {**bundle.gate.get("components", {}), **report["components"]}
    digest = file_sha256(made.folder / REFERENCE)
    return {**bundle.gate, "components": components, "pictures": report["pictures"], "reference_sha256": digest}


def _outputs(stored: Mapping[str, Any], encoders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the encoders that stay made of the reference's first case."""
    return {n: {k.rpartition("/")[2]: v for k, v in stored.items() if k.startswith(f"{n}/0/out/")} for n in encoders}
