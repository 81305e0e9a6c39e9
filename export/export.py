"""Checkpoint in, bundle out: find or trace the graphs, write the weights, compare with torch, put it in place."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST, Bundle, Component, Defaults, Latent, Tokenizer, read_defaults, write_manifest
from ..engines.graph.onnx_bytes import read_graph
from ..engines.graph.relocate import place_weights, weights_of
from ..errors import ArgumentError, CorruptError, MissingExtraError
from ..families.t5 import T5
from ..places import put_back, put_in_place, room_for, staging_folder, writing
from ..presets import Preset, find_preset, preset_defaults, recognise_preset
from ..values import Reader, read_json
from ..version import __version__
from ..weights.layout import SIZES, plan_layout
from ..weights.lora import Fusion, match_loras
from .checkpoint.compose import compose_checkpoint, describe_part, names_of
from .checkpoint.folder import Checkpoint
from .checkpoint.weights import write_weights
from .gate.gating import SWITCHED_OFF, run_gate
from .pieces import export_pieces
from .plan import ComponentPlan, check_scheduler, choose_precisions, plan_components
from .tokenizers import export_tokenizer
from .trace.graphs import TracedGraph, find_graph, keep_graph

log = logging.getLogger("fewstep.export")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Callbacks of an export: `stage(name)` when a stage begins, `bytes_written(count)` while weights are written."""

    stage: Callable[[str], None] = lambda name: None
    bytes_written: Callable[[int], None] = lambda count: None


def export_bundle(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: str = "float32",
    vae_dtype: str | None = None,
    base: str | Path | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Iterable[tuple[str | Path, float]] = (),
    embeddings: Iterable[tuple[str | None, str | Path]] = (),
    controlnets: Mapping[str, str | Path] | None = None,
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    tiny_decoder: str | Path | None = None,
    preset: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    without: Sequence[str] = (),
    gate: bool = True,
    quick_gate: bool = False,
    reference: Path | None = None,
    overwrite: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint (a diffusers folder, a hub id, or a single file over `base`) into a new bundle folder.

    unet, vae: a file or folder that replaces that part. loras: files with their factors, fused into the weights.
    embeddings: files of textual inversion with the words that name them in prompts, or `None` for the files' own.
    controlnets: folders or hub ids of ControlNets, traced with the UNet, by the names that requests know them by.
    ip_adapter: an IP-Adapter's file, and image_encoder the folder of its image encoder where that is not beside it.
    tiny_decoder: a tiny autoencoder's file or folder, whose decoder requests may ask for beside the VAE's own.
    dtype: a precision for all components, or one by component, like "fp16,text_encoder=fp32" (`plan.py`).
    without: the text encoders, to leave them out: requests then give embeddings of their prompts.
    preset: a name of `presets.py`, if it is not told by the checkpoint's own names.
    reference: torch's float32 outputs for this very checkpoint, written before; without it torch computes them now.

    Nothing appears at `folder` until everything is written and, with `gate`, compared with torch in float32: a
    failure, an interrupt or a kill leaves what was there before (`places.py`; what a killed export left beside `folder`
    is swept by the next one). Raises the errors of `compose_checkpoint` and `match_loras`,
    `ArgumentError` when the folder exists and `overwrite` is not set, `GateError` when ONNX Runtime does not agree
    with torch, `WriteError` where the system refuses to write, as on a full disk.
    """
    target = Path(folder).absolute()  # not resolve(): a link must stay visible
    put_back(target)
    _check_target(target, overwrite)
    if revision is not None and Path(source).exists():
        raise ArgumentError(f"revision {revision!r} of a file or folder", remedy="Leave it out: it is for hub ids.")
    progress = progress or Progress()
    checkpoint = compose_checkpoint(
        source,
        base=base,
        unet=unet,
        vae=vae,
        loras=loras,
        embeddings=embeddings,
        controlnets=controlnets,
        ip_adapter=ip_adapter,
        image_encoder=image_encoder,
        tiny_decoder=tiny_decoder,
        revision=revision,
        variant=variant,
        offline=offline,
        without=without,
    )
    chosen = (
        find_preset(preset, checkpoint.family) if preset else recognise_preset(names_of(checkpoint), checkpoint.family)
    )
    says_variance = checkpoint.model.says_variance(checkpoint.parts["unet"].config)
    replaced = chosen is not None and chosen.sampler is not None
    check_scheduler(checkpoint.scheduler, replaced=replaced, says_variance=says_variance)
    precisions = choose_precisions(checkpoint, dtype, vae_dtype)
    dtypes = {kind: p.dtype for kind, p in precisions.items()}
    with writing("the bundle", target.parent), staging_folder(target) as staging:
        plans = plan_components(checkpoint, dtypes)
        graphs = {p.kind: find_or_trace(p, progress) for p in plans}
        shapes = {p.kind: (p.config, {w.key: w.shape for w in graphs[p.kind].parameters}) for p in plans}
        fusion = match_loras(checkpoint.loras, shapes)
        with room_for("the bundle", target.parent, _length(graphs)):
            components = {p.kind: export_component(p, graphs[p.kind], fusion, staging, progress) for p in plans}
            components = {
                n: replace(c, source={**c.source, "precision": precisions[n].why}) for n, c in components.items()
            }
            bundle = _assemble(checkpoint, staging, components, name or target.name, chosen)
            report = SWITCHED_OFF
            if gate:
                report = run_gate(
                    checkpoint, bundle, dtypes, stage=progress.stage, reference=reference, quick=quick_gate
                )
            bundle = replace(bundle, gate=report)
            write_manifest(bundle)
            staging.chmod(0o755)
            put_in_place(staging, target)
    return replace(bundle, folder=target)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or target.is_file():
        raise ArgumentError(f"{str(target)!r} is not a folder", expected="a new folder for the bundle")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST).is_file():
            raise ArgumentError(
                f"the folder {str(target)!r} holds something that is no bundle", expected="a new or empty folder"
            )
        if not overwrite:
            raise ArgumentError(
                f"there is a bundle in {str(target)!r}", remedy="Choose another folder, or replace it with --overwrite."
            )


def _length(graphs: Mapping[str, TracedGraph]) -> int:
    """Bytes of the graphs with their weights."""
    weights = sum(math.prod(p.shape) * SIZES[p.dtype] for g in graphs.values() for p in g.parameters)
    return weights + sum(len(g.onnx) for g in graphs.values())


def find_or_trace(plan: ComponentPlan, progress: Progress) -> TracedGraph:
    """A component's graph: packaged, in the cache, or traced now."""
    graph = find_graph(plan.key)
    if graph is None:
        progress.stage(f"trace {plan.kind}")
        graph = _trace(plan)
    return graph


def export_component(
    plan: ComponentPlan, graph: TracedGraph, fusion: Fusion, folder: Path, progress: Progress
) -> Component:
    """Write a component's graph and weights into a folder, and say what they are."""
    progress.stage(f"weights {plan.kind}")
    tensors = plan.tensors([p.key for p in graph.parameters])
    weights = f"{plan.kind}.safetensors"
    patch = partial(fusion.fuse, plan.kind)
    digest = write_weights(graph, tensors, folder / weights, progress.bytes_written, patch)
    onnx = graph.onnx if plan.kind == plan.network else _with_weights_in(graph, weights)
    (folder / f"{plan.kind}.onnx").write_bytes(onnx)
    return Component(
        graph=f"{plan.kind}.onnx",
        weights=weights,
        graph_sha256=hashlib.sha256(onnx).hexdigest(),
        weights_sha256=digest,
        graph_key=graph.key,
        dtype=plan.dtype,
        inputs=graph.inputs,
        outputs=graph.outputs,
        config={k: v for k, v in plan.config.items() if k != "_name_or_path"},
        operators=graph.operators,
        source=describe_part(plan.part, fusion.files(plan.kind), plan.controls, plan.adapter),
    )


def _with_weights_in(traced: TracedGraph, file: str) -> bytes:
    """A graph that looks for its weights in another file than that of its kind."""
    graph = read_graph(traced.onnx)
    layout = plan_layout([(p.name, p.dtype, p.shape) for p in traced.parameters])
    place_weights(graph, list(weights_of(graph, len(traced.onnx)).values()), file, layout.places)
    return graph.to_bytes()


def _trace(plan: ComponentPlan) -> TracedGraph:
    for module in ("torch", "diffusers", "transformers", "onnxscript"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                module, "export", purpose=f"Tracing the {plan.kind}, whose graph does not travel with fewstep,"
            )
    from .trace.trace import trace_component

    log.info("tracing %s (%s)", plan.kind, plan.dtype)
    graph = trace_component(plan.network, plan.config, plan.dtype, plan.family, key=plan.key)
    keep_graph(graph)
    return graph


def _assemble(
    checkpoint: Checkpoint, folder: Path, components: Mapping[str, Component], name: str, preset: Preset | None
) -> Bundle:
    model = checkpoint.model
    tokenizers = _tokenizers(checkpoint, folder)
    unet, vae = checkpoint.parts["unet"].config, checkpoint.parts["vae"].config
    channels, factor, multiple = model.geometry(unet, vae)
    width, height = model.default_size(unet, factor)
    return Bundle(
        folder=folder,
        name=name,
        family=checkpoint.family,
        components=components,
        tokenizers=tokenizers,
        latent=Latent(channels=channels, factor=factor, multiple=multiple, frames=model.frames(unet)),
        scheduler=checkpoint.scheduler,
        defaults=_defaults(checkpoint, width, height, preset),
        force_zeros=checkpoint.force_zeros,
        guidance_embedding=int(unet.get("time_cond_proj_dim") or 0),
        pipeline=checkpoint.pipeline,
        noising=checkpoint.noising,
        licence=checkpoint.licence,
        source={
            "checkpoint": Path(checkpoint.source).name,
            "revision": checkpoint.revision,
            "base": checkpoint.folder.name if checkpoint.file else None,
            "exported_by": f"fewstep {__version__}",
        },
    )


def _tokenizers(checkpoint: Checkpoint, folder: Path) -> tuple[Tokenizer, ...]:
    """The tokenizers of the text encoders that it has, written into the folder."""
    encoders = checkpoint.text_encoders
    if len(checkpoint.tokenizers) != len(encoders):
        raise CorruptError(
            f"the checkpoint has {len(checkpoint.tokenizers)} tokenizers",
            expected=f"{len(encoders)}, one a text encoder",
        )
    written = []
    for encoder, source in zip(encoders, checkpoint.tokenizers, strict=True):
        part, target = checkpoint.parts[encoder.name], folder / f"{source.name}.json"
        if part.class_name == T5:
            written.append(export_pieces(source, target, int(part.config["max_position_embeddings"])))
            continue
        longest = int(checkpoint.parts[encoders[0].name].config["max_position_embeddings"])
        written.append(export_tokenizer(source, target, longest, [t for w in part.words for t in w.tokens]))
    return tuple(written)


def _defaults(checkpoint: Checkpoint, width: int, height: int, preset: Preset | None) -> Defaults:
    """What its preset says, or the checkpoint of itself in `fewstep.json`, or the usual figures of its kind."""
    plain: dict[str, Any] = {
        "width": width,
        "height": height,
        "steps": checkpoint.model.steps,
        "guidance": checkpoint.model.guidance,
    }
    own = checkpoint.folder / "fewstep.json"
    if own.is_file():
        reading = Reader(place="fewstep.json in the checkpoint")
        data = reading.mapping("itself", read_json(own, reading.place))
        plain |= reading.mapping("defaults", data.get("defaults"))
    return read_defaults(plain | (preset_defaults(preset, width, height) if preset else {}))


def describe(bundle: Bundle) -> dict[str, Any]:
    """What an export tells its user: sizes and precisions by component, and the gate's verdict."""
    return {
        "bundle": str(bundle.folder),
        "family": bundle.family,
        "components": {
            n: {
                "dtype": c.dtype,
                "bytes": (bundle.folder / c.weights).stat().st_size,
                "operators": sum(c.operators.values()),
                "precision": c.source.get("precision"),
            }
            for n, c in bundle.components.items()
        },
        "gate": dict(bundle.gate),
    }
