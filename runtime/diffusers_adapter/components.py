"""A pipeline's components as diffusers shows them: configurations with attributes, and what stands in for a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...bundle import Bundle
from ...errors import UnsupportedError
from ..group import PipelineGroup
from ..pipeline import Pipeline

Opened = Pipeline | PipelineGroup
_WRAPPED = ("_orig_mod", "_torchdynamo_orig_callable", "__wrapped__")
HALVES = {"vae": "vae_decoder"}


class UnsupportedAttributeError(UnsupportedError, AttributeError):
    """An attribute that diffusers' object has and this one has not; `hasattr` takes it for absent."""


class FrozenConfig(Mapping[str, Any]):
    """A configuration as diffusers has it: a dictionary that cannot be changed, its keys attributes too."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__["_values"] = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        values: dict[str, Any] = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"the configuration has no {name!r}")
        return values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsupportedError(f"setting {name} in a configuration", remedy="Configurations are read, not changed.")

    def __repr__(self) -> str:
        return f"FrozenConfig({self._values!r})"


@dataclass(frozen=True)
class ComponentView:
    """A component of a bundle where diffusers has a module or a tokenizer: what can be read of it.

    Any other attribute is refused by its name: weights lie in an engine.
    """

    name: str
    origin: Opened

    @property
    def config(self) -> FrozenConfig:
        return FrozenConfig(self._component().config if self._is_network() else self._tokenizer())

    @property
    def dtype(self) -> Any:
        """torch's dtype where the caller has torch loaded, else its name."""
        name = self._component().dtype
        torch = sys.modules.get("torch")
        return name if torch is None else getattr(torch, name)

    @property
    def device(self) -> str:
        return self.origin.device.name

    @property
    def model_max_length(self) -> int:
        """Of a tokenizer: the tokens that its encoder takes."""
        return int(self._tokenizer()["model_max_length"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedAttributeError(
            f"{self.name}.{name}: the {self.name} is an engine of the bundle {self.origin.bundle.name!r}",
            expected="config, dtype or device",
            remedy=f"To change it, set the pipeline's {self.name} to an object of diffusers' own.",
        )

    def to(self, *given: Any, memory_format: Any = None) -> ComponentView:
        """Nothing for a `memory_format`, which the engine chooses; anything else is refused."""
        if given or memory_format is None:
            raise UnsupportedError(f"{self.name}.to({', '.join(map(str, given))})", remedy="Move the pipeline.")
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"calling the {self.name} by itself", remedy="Call the pipeline.")

    def _is_network(self) -> bool:
        return HALVES.get(self.name, self.name) in self.origin.bundle.components

    def _component(self) -> Any:
        if not self._is_network():
            raise UnsupportedAttributeError(f"a dtype of the {self.name}", expected="config or model_max_length")
        return self.origin.bundle.component(HALVES.get(self.name, self.name))

    def _tokenizer(self) -> dict[str, Any]:
        names = tokenizer_names(self.origin.bundle)
        if self.name not in names:
            raise UnsupportedAttributeError(f"{self.name}.model_max_length", expected="a tokenizer's")
        record = self.origin.bundle.tokenizers[names.index(self.name)]
        return {"model_max_length": record.length, "pad_token_id": record.pad_id, "eos_token_id": record.eos_id}


def tokenizer_names(bundle: Bundle) -> tuple[str, ...]:
    """The names of a bundle's tokenizers, in its encoders' order."""
    return tuple(e.tokenizer for e in bundle.model.text_encoders)


def part_names(bundle: Bundle) -> tuple[str, ...]:
    """What of a pipeline of this bundle can be replaced, but for the scheduler."""
    return ("vae", *bundle.text_encoders, *tokenizer_names(bundle), "unet")


def state_of(module: Any) -> int | None:
    """A number that changes with a module's weights (their places, types and counts of changes in place), or with a
    tokenizer's tokens; `None` for anything else.
    """
    if hasattr(module, "special_tokens_map"):
        return hash((len(module), str(module.special_tokens_map), str(sorted(module.get_added_vocab().items()))))
    if not hasattr(module, "state_dict"):
        return None
    kept = [
        (n, t.data_ptr(), t._version, str(t.dtype)) for n, t in (*module.named_parameters(), *module.named_buffers())
    ]
    return hash(tuple(kept))


def uncompiled(value: Any) -> Any:
    """What is inside what `torch.compile` made; compiling changes speed alone."""
    while True:
        inner = next((v for n in _WRAPPED if (v := getattr(value, n, None)) is not None), None)
        if inner is None:
            return value
        value = inner
