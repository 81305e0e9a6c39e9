"""`fewstep export CHECKPOINT FOLDER`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from .asking import embedding, lora
from .common import bar, defaults_line, emit, say


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a diffusers folder, a hub id like stabilityai/sd-turbo, or a single .safetensors file"
    )
    parser.add_argument("folder", help="where the bundle goes")
    parser.add_argument(
        "--base", help="for a single file: a diffusers folder of its family, for configurations and tokenizers"
    )
    parser.add_argument("--unet", help="another UNet over the checkpoint: a .safetensors file, or a folder")
    parser.add_argument("--vae", help="another VAE: a .safetensors file, or a folder")
    parser.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="fuse a LoRA, with a factor (default: 1); repeatable",
    )
    parser.add_argument(
        "--embedding",
        type=embedding,
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a word of textual inversion, by its own name or by this one; repeatable",
    )
    parser.add_argument(
        "--controlnet",
        "--t2i-adapter",
        type=named_paths,
        action="extend",
        default=[],
        metavar="NAME=PATH[,NAME=PATH]",
        help="a ControlNet or T2I adapter beside the UNet, a diffusers folder or a hub id, by the name that its "
        "pictures are given under, like canny; repeatable",
    )
    parser.add_argument("--ip-adapter", metavar="FILE", help="an IP-Adapter's .safetensors file: pictures as prompts")
    parser.add_argument(
        "--image-encoder", metavar="FOLDER", help="the IP-Adapter's image encoder (default: image_encoder beside it)"
    )
    parser.add_argument(
        "--tiny-decoder",
        metavar="PATH",
        help="a tiny autoencoder (a .safetensors file or a folder) beside the VAE, for requests that ask for it",
    )
    parser.add_argument(
        "--preset", help="what the checkpoint was distilled for, like sd-turbo (default: told from its names)"
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        help="fp32, fp16 or bf16, for all or by component: fp16,text_encoder=fp32 (default: %(default)s)",
    )
    parser.add_argument(
        "--vae-precision", help="the VAE's own precision (default: --dtype, but fp32 for a VAE that overflows in fp16)"
    )
    parser.add_argument("--variant", help="weight files of this variant, like fp16")
    parser.add_argument("--revision", help="revision on the hub")
    parser.add_argument("--offline", action="store_true", help="use the hub's cache only")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="text_encoder",
        help="leave the text encoders out: prompts then come from `fewstep encode`; repeatable where there are several",
    )
    parser.add_argument("--no-gate", action="store_true", help="do not compare with torch")
    parser.add_argument(
        "--quick-gate", action="store_true", help="compare at fewer points, as is done for models of full size anyway"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")


def named_paths(text: str) -> list[tuple[str, str]]:
    """`canny=one,depth=two` as (name, path)s."""
    pairs = [item.partition("=") for item in text.split(",")]
    if not all(name and equals and path for name, equals, path in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return [(name, path) for name, _, path in pairs]


def by_name(option: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """What was given under each name; `ArgumentError` for a name that was given twice."""
    names = [name for name, _ in pairs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ArgumentError(f"{option} gives {twice!r} twice", expected="another name for each")
    return dict(pairs)


def execute(options: argparse.Namespace) -> int:
    from ..engines.machine import peak_memory
    from ..export import Progress, describe, export_bundle

    began = time.monotonic()
    with bar(None, "B", "weights") as progress:

        def stage(name: str) -> None:
            progress.reset()  # bytes of this stage, where it writes any
            progress.set_description_str(name)
            if not sys.stderr.isatty():
                say(f"{time.monotonic() - began:6.1f} s  {name}")

        bundle = export_bundle(
            options.checkpoint,
            options.folder,
            dtype=options.dtype,
            vae_dtype=options.vae_precision,
            base=options.base,
            unet=options.unet,
            vae=options.vae,
            loras=options.lora,
            embeddings=options.embedding,
            controlnets=by_name("--controlnet", options.controlnet),
            ip_adapter=options.ip_adapter,
            image_encoder=options.image_encoder,
            tiny_decoder=options.tiny_decoder,
            preset=options.preset,
            variant=options.variant,
            revision=options.revision,
            offline=options.offline,
            without=options.without,
            gate=not options.no_gate,
            quick_gate=options.quick_gate,
            overwrite=options.overwrite,
            progress=Progress(stage=stage, bytes_written=progress.update),
        )
    defaults = bundle.defaults
    data = describe(bundle) | {
        "seconds": round(time.monotonic() - began, 2),
        "peak_memory_bytes": peak_memory(),
    }
    peak = "" if data["peak_memory_bytes"] is None else f", at most {data['peak_memory_bytes'] / 1e6:.0f} MB"
    lines = [f"{options.folder}: {bundle.family} in {data['seconds']} s{peak}"]
    lines += [
        f"  {n:15} {c['dtype']:9} {c['bytes'] / 1e6:8.2f} MB {c['operators']:4} nodes"
        + (f"  ({c['precision']})" if c["precision"] not in (None, "asked for") else "")
        for n, c in data["components"].items()
    ]
    if defaults.preset:
        lines.append(f"  preset {defaults.preset}: {defaults_line(defaults)}")
    lines.append(f"  gate: {data['gate'].get('status')}")
    lines += picture_lines(data["gate"].get("pictures", {}))
    emit(options, data, "\n".join(lines))
    return 0


def picture_lines(pictures: Mapping[str, Any]) -> list[str]:
    """What the gate says of whole pictures beside diffusers' own, a line each."""
    lines = []
    for task, verdict in ({"pictures": pictures} if "status" in pictures else pictures).items():
        words = verdict["status"]
        if words == "passed":
            psnr = verdict["psnr_db"]
            words = "diffusers' own, " + ("to the last bit" if psnr is None else f"at {psnr:.0f} dB")
            if "tiny_decoder_db" in verdict:
                words += f"; by the tiny decoder {verdict['tiny_decoder_db']:.1f} dB from it"
        lines.append(f"    {task.replace('_', ' ')}: {words}")
    return lines
