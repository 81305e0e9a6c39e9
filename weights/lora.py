"""LoRA files, fused into weights while these are written: W + scale * (alpha / rank) * up @ down.

Three ways of naming the same thing are read: kohya's (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, and also
over the original block names), diffusers' (`unet.down_blocks.0....to_q.lora_A.weight`, and its older forms) and PEFT's
(`base_model.model.....lora_A.weight`). Hu et al., arXiv:2106.09685, equation 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from ..errors import CorruptError, UnsupportedError
from ..families import all_families
from ..values import Reader, parse_json, read_json
from .original import original_name
from .stored import Stored, convert, open_tensors, read_number

Float32 = npt.NDArray[np.float32]
_ROLE = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<ab>A|B)|\.lora_(?P<ko>down|up)|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<du>down|up))"
    r"(?:\.(?!weight$)[\w-]+)?\.weight"
)
_DOWN = {"A", "down"}
_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "a LoRA with a middle matrix (LoCon's Tucker form)",
    "oft_blocks": "OFT",
    "diff": "a full difference of weights",
    "diff_b": "a full difference of biases",
}
_TEXT_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_SHOWN = 20

Component = tuple[Mapping[str, Any], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA's safetensors file and the factor it is fused with."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One LoRA's change of one weight: `down` [r, in (, kh, kw)], `up` [out, r (, 1, 1)] and the whole factor."""

    lora: LoraFile
    name: str
    down: Stored
    up: Stored
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def matrices(self) -> tuple[Float32, Float32]:
        """`down` [r, in * kh * kw] and `up` [out, r] in float32, without the factor."""
        rank = self.down.shape[0]
        down = convert(self.down, "float32", self.name).reshape(rank, -1)
        return down, convert(self.up, "float32", self.name).reshape(self.up.shape[0], rank)

    def value(self) -> Float32:
        """The change in float32, shape `self.shape`."""
        down, up = self.matrices()
        change: Float32 = (up @ down) * np.float32(self.factor)
        return change.reshape(self.shape)


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
        total = convert(stored, "float32", key).astype(np.float32)
        for change in changes:
            total += change.value().reshape(-1)
        return Stored(dtype="F32", shape=stored.shape, data=total.view(np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The modules of a component that a LoRA may change: shape of the weight, `None` where the graph leaves it out."""

    kind: str
    shapes: Mapping[str, tuple[int, ...] | None]
    aliases: Mapping[str, str]


def match_loras(loras: Sequence[LoraFile], components: Mapping[str, Component]) -> Fusion:
    """Find the weight that each pair of matrices changes; only headers are read.

    components: by kind, its configuration and the shapes of its weights by key. Raises `UnsupportedError` for other
    kinds of adapters by their name, `CorruptError` that lists keys which match no weight, for half a pair, and for
    shapes that do not fit.
    """
    if not loras:
        return Fusion()
    targets = {kind: _target(kind, *component) for kind, component in components.items() if not kind.startswith("vae")}
    deltas: dict[str, dict[str, tuple[Delta, ...]]] = {kind: {} for kind in targets}
    for lora in loras:
        for kind, module, delta in _read(lora, targets):
            key = f"{module}.weight"
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
    return Target(kind=kind, shapes=shapes, aliases=aliases)


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _read(lora: LoraFile, targets: Mapping[str, Target]) -> Iterable[tuple[str, str, Delta]]:
    tensors = open_tensors([lora.path])
    pairs: dict[str, dict[str, Stored]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for name, stored in tensors.items():
        parts = name.split(".")
        kind = next((k for k in _REFUSED if k in parts or (k.endswith("_w") and parts[-1].startswith(k))), None)
        if kind:
            raise UnsupportedError(
                f"{lora.path.name} is {_REFUSED[kind]} (it has {name!r})",
                expected="a plain LoRA, with two matrices a weight",
            )
        role = _ROLE.fullmatch(name)
        if role:
            side = "down" if (role["ab"] or role["ko"] or role["du"]) in _DOWN else "up"
            pairs.setdefault(role["module"], {})[side] = stored
        elif name.endswith(".alpha") and math.prod(stored.shape) == 1:
            alphas[name.removesuffix(".alpha")] = read_number(stored, name)
        else:
            strange.append(name)
    places = {module: _resolve(module, targets) for module in pairs}
    strange += [m for m, where in places.items() if where is None]
    strange += [f"{m}.alpha" for m in alphas if m not in pairs]
    if strange or not pairs:
        _refuse(lora, strange, len(pairs))
    adapter = _Adapter.of(lora.path)
    for module, pair in pairs.items():
        where = places[module]
        if where is not None:
            kind, target = where
            yield kind, target, _delta(lora, module, pair, alphas.get(module), adapter, targets[kind].shapes[target])


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
    pair: Mapping[str, Stored],
    alpha: float | None,
    adapter: _Adapter,
    shape: tuple[int, ...] | None,
) -> Delta:
    where = f"{module} in {lora.path.name}"
    if len(pair) != 2:
        raise CorruptError(f"{where} has its {next(iter(pair))} matrix only", expected="both matrices of the pair")
    down, up = pair["down"], pair["up"]
    rank = down.shape[0] if down.shape else 0
    if rank < 1 or len(up.shape) < 2 or len(down.shape) < 2 or up.shape[1] != rank or math.prod(up.shape[2:]) != 1:
        raise CorruptError(
            f"the matrices of {where} have shapes {down.shape} and {up.shape}", expected="[r, in] and [out, r]"
        )
    factor = adapter.factor(module, rank) if alpha is None else alpha / rank
    if not math.isfinite(factor):
        raise CorruptError(f"alpha of {where} is not finite", expected="a finite number")
    delta = Delta(lora=lora, name=module, down=down, up=up, factor=lora.scale * factor)
    if shape is not None and [d for d in delta.shape if d != 1] != [d for d in shape if d != 1]:
        raise CorruptError(
            f"{where} changes a weight of shape {delta.shape}",
            expected=str(tuple(shape)),
            remedy="Take the LoRA that was made for this base.",
        )
    return delta
