"""The content key of an engine: everything that its bytes or its fitness depend on, and the words for a difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import CorruptError
from ..values import Reader
from .profile import Profile

KEY_FORMAT = 2
ANY_DEVICE = "any"
"""The device of engines that run on whatever has their compute capabilities."""

_WORDS = {
    "key_format": "key format",
    "component": "component",
    "backend": "backend",
    "backend_version": "backend version",
    "graph_sha256": "graph",
    "weights_sha256": "weights",
    "dtype": "precision",
    "system": "operating system",
    "device": "device",
    "capability": "compute capability or instruction set",
    "options": "build options",
    "profiles": "profiles",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKey:
    """What an engine was built from, with what, for which machine and which sizes.

    `device` is the processor's or the GPU's name, `capability` the instruction sets or the compute capabilities,
    `system` the operating system and architecture. `profiles` is empty for backends that take any size; it is in
    numerical order, which is the order that an engine is built with and read by: an index is all that a library has.
    """

    component: str
    backend: str
    backend_version: str
    graph_sha256: str
    weights_sha256: str
    dtype: str
    system: str
    device: str
    capability: str
    options: Mapping[str, Any] = field(default_factory=dict)
    profiles: tuple[Profile, ...] = ()
    key_format: int = KEY_FORMAT

    def __post_init__(self) -> None:
        object.__setattr__(self, "profiles", tuple(sorted(self.profiles, key=lambda p: p.order)))

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["options"] = dict(self.options)
        data["profiles"] = [p.to_json() for p in self.profiles]
        return data

    @classmethod
    def from_json(cls, data: object) -> EngineKey:
        reading = Reader(place="an engine's key")
        stated = reading.mapping("itself", data)
        if missing := [f.name for f in fields(cls) if f.name not in stated]:
            raise CorruptError(f"an engine's key lacks {', '.join(missing)}")
        values: dict[str, Any] = {f.name: stated[f.name] for f in fields(cls)}
        for name in ("component", "backend", "backend_version", "dtype", "system", "device", "capability"):
            reading.text(name, values[name], least=0)
        for name in ("graph_sha256", "weights_sha256"):
            reading.text(name, values[name], least=0)
        reading.integer("key_format", values["key_format"])
        reading.mapping("options", values["options"])
        profiles = reading.array("profiles", values["profiles"], 0, 1000)
        return cls(**{**values, "profiles": tuple(Profile.from_json(p) for p in profiles)})

    @property
    def digest(self) -> str:
        """SHA-256 of the key's canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field of a key that is not what is needed."""

    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{_WORDS[self.field]} {self.found} (expected {self.expected})"


def differences(key: EngineKey, needed: EngineKey, *, dims: Mapping[str, int] | None = None) -> tuple[Difference, ...]:
    """The fields in which an engine is not the one that is needed.

    With `dims` an engine's profiles fit when one of them admits these sizes; without, they are not compared. Compute
    capabilities fit when all the needed ones are among the engine's.
    """
    result = []
    for f in fields(needed):
        one, other = getattr(key, f.name), getattr(needed, f.name)
        if f.name == "profiles":
            if dims is None or not key.profiles or any(p.admits(dims) for p in key.profiles):
                continue
            sizes = " ".join(f"{n}={v}" for n, v in sorted(dims.items()))
            result.append(Difference(field="profiles", found="; ".join(map(str, key.profiles)), expected=sizes))
        elif f.name == "options":
            names = [n for n in sorted({*one, *other}) if one.get(n) != other.get(n)]
            if names:
                words = [", ".join(f"{n}={side.get(n)!r}" for n in names) for side in (one, other)]
                result.append(Difference(field="options", found=words[0], expected=words[1]))
        elif f.name == "capability" and key.device == ANY_DEVICE:
            if not set(other.split()) <= set(one.split()):
                result.append(Difference(field=f.name, found=one, expected=other))
        elif one != other:
            result.append(Difference(field=f.name, found=_short(f.name, one), expected=_short(f.name, other)))
    return tuple(result)


def _short(name: str, value: object) -> str:
    return str(value)[:12] if name.endswith("sha256") else str(value)
