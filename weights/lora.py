"""Adapter files, fused into weights while these are written: which weight each change is of.

Three ways of naming the same thing are read: kohya's (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, and also
over the original block names), diffusers' (`unet.down_blocks.0....to_q.lora_A.weight`, and its older forms) and PEFT's
(`base_model.model.....lora_A.weight`). LyCORIS's kinds go by kohya's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ..errors import CorruptError, UnsupportedError
from ..families import all_families
from ..values import Reader, parse_json, read_json
from .delta import NEEDED, PARTS, Delta, LoraFile
from .original import original_name
from .stored import Stored, convert, open_tensors, read_number

_ROLE = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<ab>A|B)|\.lora_(?P<ko>down|up)|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<du>down|up))"
    r"(?:\.(?!weight$)[\w-]+)?\.weight"
)
_DOWN = {"A", "down"}
_LYCORIS = re.compile(
    r"(?P<module>.+)\.(?:hada_(?P<hada>w[12]_[ab]|t[12])|lokr_(?P<lokr>w[12](?:_[ab])?|t2)|(?P<diff>diff|diff_b)"
    r"|(?P<mid>lora_mid)\.weight|(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.[\w-]+)?(?:\.weight)?)"
)
_TEXT_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_SHOWN = 20

Component = tuple[Mapping[str, Any], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """The changes of every weight, by component and by the weight's key."""

    deltas: Mapping[str, Mapping[str, tuple[Delta, ...]]] = field(default_factory=dict)

    def changes(self, kind: str, key: str) -> tuple[Delta, ...]:
        return self.deltas.get(kind, {}).get(_plain(key), ())

    def files(self, kind: str) -> list[LoraFile]:
        """The LoRAs that change a component, in the order they were given."""
        return list(dict.fromkeys(d.lora for deltas in self.deltas.get(kind, {}).values() for d in deltas))

    def fuse(self, kind: str, key: str, stored: Stored) -> Stored:
        """A weight with its changes added in float32; the very same object where nothing changes it."""
        changes = self.changes(kind, key)
        if not changes:
            return stored
        total = convert(stored, "float32", key).astype(np.float32).reshape(stored.shape)
        for change in changes:
            total = change.added(total)
        return Stored(dtype="F32", shape=stored.shape, data=np.ascontiguousarray(total).reshape(-1).view(np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The modules of a component that an adapter may change: shape of the weight, `None` where the graph leaves it out.

    biases: the modules that have one, with its shape.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...] | None]
    aliases: Mapping[str, str]
    biases: Mapping[str, tuple[int, ...]]


def match_loras(loras: Sequence[LoraFile], components: Mapping[str, Component]) -> Fusion:
    """Find the weight that each pair of matrices changes; only headers are read.

    components: by kind, its configuration and the shapes of its weights by key. Raises `UnsupportedError` for OFT,
    `CorruptError` that lists keys which match no weight, for half a pair, and for
    shapes that do not fit.
    """
    if not loras:
        return Fusion()
    targets = {kind: _target(kind, *component) for kind, component in components.items() if not kind.startswith("vae")}
    deltas: dict[str, dict[str, tuple[Delta, ...]]] = {kind: {} for kind in targets}
    for lora in loras:
        for kind, key, delta in _read(lora, targets):
            deltas[kind][key] = (*deltas[kind].get(key, ()), delta)
    return Fusion(deltas=deltas)


def _plain(key: str) -> str:
    return key.removeprefix("text_model.")


def _target(kind: str, config: Mapping[str, Any], weights: Mapping[str, tuple[int, ...]]) -> Target:
    shapes: dict[str, tuple[int, ...] | None] = {
        _plain(key).removesuffix(".weight"): shape for key, shape in weights.items() if key.endswith(".weight")
    }
    if kind.startswith("text_encoder"):
        for layer in range(config["num_hidden_layers"]):
            for name in _TEXT_LINEAR:
                shapes.setdefault(f"encoder.layers.{layer}.{name}", None)
    aliases = {_flat(m): m for m in shapes} | {m: m for m in shapes}
    if kind == "unet":
        for module in shapes:
            original = original_name("unet", module, config)
            if original:
                aliases |= {original: module, _flat(original): module}
    biases = {_plain(k).removesuffix(".bias"): s for k, s in weights.items() if k.endswith(".bias")}
    return Target(kind=kind, shapes=shapes, aliases=aliases, biases=biases)


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _read(lora: LoraFile, targets: Mapping[str, Target]) -> Iterable[tuple[str, str, Delta]]:
    """Component, key of the weight and change, for each module of a file."""
    tensors = open_tensors([lora.path])
    modules: dict[str, dict[str, Stored]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for name, stored in tensors.items():
        if "oft_blocks" in name:
            raise UnsupportedError(f"{lora.path.name} is OFT (it has {name!r})", expected="a LoRA, LoHa, LoKr or DoRA")
        place = _place(name)
        if place is not None:
            module, part = place
            modules.setdefault(module, {})[part] = stored
        elif name.endswith(".alpha") and math.prod(stored.shape) == 1:
            alphas[name.removesuffix(".alpha")] = read_number(stored, name)
        else:
            strange.append(name)
    places = {module: _resolve(module, targets) for module in modules}
    strange += [m for m, where in places.items() if where is None]
    strange += [f"{m}.alpha" for m in alphas if m not in modules]
    if strange or not modules:
        _refuse(lora, strange, len(modules))
    adapter = _Adapter.of(lora.path)
    for module, parts in modules.items():
        where = places[module]
        if where is None:
            continue
        component, target = where
        bias = parts.pop("bias", None)
        if bias is not None:
            yield component, f"{target}.bias", _of_bias(lora, module, bias, targets[component].biases.get(target))
        if parts:
            shape = targets[component].shapes[target]
            yield component, f"{target}.weight", _delta(lora, module, parts, alphas.get(module), adapter, shape)


def kinds_of(lora: LoraFile) -> set[str]:
    """The kinds of changes that a file holds, in words; a LoRA with a magnitude or a middle matrix is another kind."""
    other = {"mid": "LoCon's middle matrices", "magnitude": "DoRA", "diff": "full differences"}
    kinds = set()
    for name in open_tensors([lora.path]):
        _, part = _place(name) or ("", "")
        kind = {"hada": "LoHa", "lokr": "LoKr"}.get(part.partition(" ")[0])
        kinds.add(kind or other.get("diff" if part == "bias" else part, "LoRA"))
    return kinds


def _place(name: str) -> tuple[str, str] | None:
    """The module that a tensor is of, and which part of its change, as `delta.PARTS` names them."""
    role = _ROLE.fullmatch(name)
    if role and not role["module"].endswith(".lora_magnitude_vector"):
        return role["module"], "down" if (role["ab"] or role["ko"] or role["du"]) in _DOWN else "up"
    other = _LYCORIS.fullmatch(name)
    if other is None:
        return None
    if other["diff"]:
        return other["module"], "diff" if other["diff"] == "diff" else "bias"
    if other["magnitude"]:
        return other["module"], "magnitude"
    return other["module"], "mid" if other["mid"] else f"hada {other['hada']}" if other[
        "hada"
    ] else f"lokr {other['lokr']}"


def _refuse(lora: LoraFile, strange: list[str], pairs: int) -> None:
    shown = ", ".join(sorted(strange)[:_SHOWN]) + (
        f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
    )
    raise CorruptError(
        f"{lora.path.name} has {len(strange)} keys that match no weight of this checkpoint: {shown}"
        if strange
        else f"{lora.path.name} holds no LoRA matrices",
        expected="a LoRA in kohya's, diffusers' or PEFT's naming, for a model of this family",
        remedy="Take the LoRA that was made for this base." if pairs else "",
    )


def _resolve(module: str, targets: Mapping[str, Target]) -> tuple[str, str] | None:
    """(component, module) that a LoRA's module name stands for."""
    name = module.removeprefix("base_model.model.")
    for prefix, kind in _kohya_prefixes().items():
        if name.startswith(prefix):
            return _look_up(targets.get(kind), name.removeprefix(prefix).removeprefix("text_model_"))
    name = re.sub(r"\.processor\.(to_out(?=$)|)", lambda m: ".to_out.0" if m[1] else ".", name)
    for kind in targets:
        if name.startswith(f"{kind}."):
            return _look_up(targets[kind], _plain(name.removeprefix(f"{kind}.")))
    name = _plain(name.removeprefix("diffusion_model."))
    return next((place for t in targets.values() if (place := _look_up(t, name))), None)


def _kohya_prefixes() -> dict[str, str]:
    """What modules' names begin with in LoRAs of kohya's trainer, and the component that they are of."""
    encoders = [e for f in all_families() for e in f.text_encoders]
    return {"lora_unet_": "unet", **{prefix: e.name for e in encoders for prefix in e.lora}}


def _look_up(target: Target | None, name: str) -> tuple[str, str] | None:
    module = target.aliases.get(name) if target else None
    return (target.kind, module) if target and module else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """What PEFT's configuration says of alpha: beside the file, or in its metadata as diffusers writes it."""

    config: Mapping[str, Any] = field(default_factory=dict)
    reading: Reader = field(default_factory=lambda: Reader(place="the adapter configuration"))

    @classmethod
    def of(cls, path: Path) -> _Adapter:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        text = metadata.get("lora_adapter_metadata")
        beside, place = path.parent / "adapter_config.json", f"the adapter configuration of {path.name}"
        if text is not None:
            data = parse_json(text, place)
        elif beside.is_file() and path.name.startswith("adapter_model"):
            data = read_json(beside, place)
        else:
            return cls()
        reading = Reader(place=place)
        return cls(config=reading.mapping("itself", data), reading=reading)

    def factor(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) where the configuration asks for it; 1 without one."""
        name = module.removeprefix("base_model.model.")
        known = [k.removesuffix(".lora_alpha") for k in self.config if k.endswith(".lora_alpha")]
        part = next((p for p in known if name.startswith(f"{p}.")), None)
        own = {k.removeprefix(f"{part}."): v for k, v in self.config.items()} if part else self.config
        name = name.removeprefix(f"{part}.") if part else name
        alpha = own.get("lora_alpha")
        for pattern, value in self.reading.mapping("alpha_pattern", own.get("alpha_pattern") or {}).items():
            if name == pattern or name.endswith(f".{pattern}"):
                alpha = value
        if alpha is None:
            return 1.0
        rooted = self.reading.flag("use_rslora", own.get("use_rslora") or False)
        return self.reading.number("lora_alpha", alpha) / (math.sqrt(rank) if rooted else rank)


def _delta(
    lora: LoraFile,
    module: str,
    parts: dict[str, Stored],
    alpha: float | None,
    adapter: _Adapter,
    shape: tuple[int, ...] | None,
) -> Delta:
    """The change of a module's weight, checked."""
    where = f"{module} in {lora.path.name}"
    magnitude = parts.pop("magnitude", None)
    kinds = {"LoHa" if p.startswith("hada ") else "LoKr" if p.startswith("lokr ") else "" for p in parts}
    kind = next(iter(kinds), "") if len(kinds) == 1 else "several kinds"
    own = {p.partition(" ")[2] or p: t for p, t in parts.items()}
    kind = kind or ("diff" if "diff" in own else "LoRA")
    if kind not in PARTS or not own.keys() <= PARTS[kind] or not any(n <= own.keys() for n in NEEDED[kind]):
        held = " and ".join(sorted(own)) or "a magnitude"
        raise CorruptError(f"{where} has its {held} {'matrix' if len(own) == 1 else 'matrices'} only",
                           expected="both matrices of the pair")  # fmt: skip
    delta = Delta(lora=lora, name=module, kind=kind, parts=own, factor=lora.scale, magnitude=magnitude)
    if kind != "diff" and all(len(t.shape) > 1 for t in own.values()) and delta.rank:
        rank = delta.rank
        factor = adapter.factor(module, rank) if alpha is None else alpha / rank
        if not math.isfinite(factor):
            raise CorruptError(f"alpha of {where} is not finite", expected="a finite number")
        delta = replace(delta, factor=lora.scale * factor)
    delta.check(shape)
    return delta


def _of_bias(lora: LoraFile, module: str, stored: Stored, shape: tuple[int, ...] | None) -> Delta:
    delta = Delta(lora=lora, name=module, kind="diff", parts={"diff": stored}, factor=lora.scale)
    if shape is None:
        raise CorruptError(f"{delta.where} changes a bias, and the layer has none", expected="a LoRA for this base")
    delta.check(shape)
    return delta
