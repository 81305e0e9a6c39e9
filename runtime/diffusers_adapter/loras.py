"""diffusers' methods for LoRAs, on weights that are never touched: a call asks for those that are active."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArgumentError, MissingError, UnknownNameError, UnsupportedError
from ...weights.embeddings import FOLDER_FILE
from ..group import PipelineGroup
from ..loras import SUFFIX, LoraLibrary
from ..pipeline import Pipeline
from .components import Opened

WEIGHT_NAME, LEARNED = "pytorch_lora_weights.safetensors", FOLDER_FILE
"""The files that diffusers writes and looks for: a LoRA's, and an embedding's."""
_HUB = ("revision", "cache_dir", "local_files_only", "token", "force_download", "proxies", "use_safetensors")

Scales = float | Mapping[str, float] | None


@dataclass(slots=True)
class Adapters:
    """What was loaded, by name: its file and the components it changes; and what is active in each, with its scale.

    As PEFT's: a LoRA that is loaded becomes the active one of the components that it changes. scales: by component and
    name, the last that was set, with which an adapter becomes active when an active one is deleted. fused: scales of
    those that were fused, which stay until they are unfused.
    """

    files: dict[str, tuple[Path, tuple[str, ...]]] = field(default_factory=dict)
    active: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    scales: dict[tuple[str, str], float] = field(default_factory=dict)
    enabled: bool = True
    fused: dict[str, list[tuple[str, float]]] | None = None

    def copy(self) -> Adapters:
        return Adapters(
            files=dict(self.files),
            active={c: list(a) for c, a in self.active.items()},
            scales=dict(self.scales),
            enabled=self.enabled,
            fused=None if self.fused is None else {c: list(a) for c, a in self.fused.items()},
        )

    def activate(self, component: str, adapters: list[tuple[str, float]]) -> None:
        self.active[component] = adapters
        self.scales.update({(component, name): scale for name, scale in adapters})

    def uses(self, scale: float) -> dict[str, dict[str, float]]:
        """The argument `loras` of a call, with all active scales multiplied by one."""
        counted = self.fused if self.fused is not None else self.active if self.enabled else {}
        factor = 1.0 if self.fused is not None else scale
        asked: dict[str, dict[str, float]] = {}
        for component, adapters in counted.items():
            for name, own in adapters:
                path, changed = self.files[name]
                if component in changed:
                    asked.setdefault(str(path), {})[component] = own * factor
        return asked


class LoraMethods:
    """`load_lora_weights`, `set_adapters` and their kin, and `load_textual_inversion`."""

    _adapters: Adapters
    _pipeline: Opened

    @property
    def _library(self) -> LoraLibrary:
        return self._pipeline.loras

    @property
    def lora_uses(self) -> Adapters:
        """What a call is to ask for."""
        return self._adapters

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Read a LoRA and make it the active one of what it changes: a file, a folder, or a repository on the hub."""
        for name in options:
            if name not in _HUB and name != "low_cpu_mem_usage":
                raise UnknownNameError("argument of load_lora_weights", name, ("adapter_name", "weight_name", *_HUB))
        if not isinstance(pretrained_model_name_or_path_or_dict, (str, os.PathLike)):
            raise UnsupportedError("a LoRA as a dictionary of tensors", remedy="Save it as a .safetensors file.")
        state = self._adapters
        name = f"default_{len(state.files)}" if adapter_name is None else adapter_name
        if name in state.files:
            raise ArgumentError(f"the adapter {name!r} is there already", expected="another adapter_name")
        given = {k: v for k, v in options.items() if k in _HUB and v is not None and k != "use_safetensors"}
        path = _file(str(pretrained_model_name_or_path_or_dict), weight_name, subfolder, given)
        changed = tuple(self._library.changes(((str(path), "", 1.0),)))
        state.files[name] = path, changed
        for component in changed:
            state.activate(component, [(name, 1.0)])

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Scales | Sequence[Scales] = None
    ) -> None:
        """Make these the active ones, each with its scale: a number, or by component."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        one = adapter_weights is None or isinstance(adapter_weights, (int, float, Mapping))
        weights: list[Any] = [adapter_weights] * len(names) if one else list(adapter_weights)  # type: ignore[arg-type]
        if len(weights) != len(names):
            raise ArgumentError(f"{len(weights)} adapter_weights for {len(names)} adapters", expected="one each")
        self._check_names(names)
        known = self._library.components
        scales = {c: [(n, _scale(w, c, known)) for n, w in zip(names, weights, strict=True)] for c in known}
        for component, adapters in scales.items():
            self._adapters.activate(component, adapters)

    def get_active_adapters(self) -> list[str]:
        """Those of the text encoder, or of the UNet where it has none, as diffusers counts them."""
        active = self._adapters.active
        first = next((c for c in (*self._library.components[1:], "unet") if active.get(c)), None)
        return [] if first is None else [n for n, _ in active[first]]

    def get_list_adapters(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, (_, changed) in self._adapters.files.items():
            for component in changed:
                found.setdefault(component, []).append(name)
        return found

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; where an active one goes and none is left, the first that remains becomes active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        state = self._adapters
        for name in names:
            del state.files[name]
        left = self.get_list_adapters()
        for component, active in state.active.items():
            kept = [(n, w) for n, w in active if n in state.files]
            if not kept and active and component in left:
                first = left[component][0]
                kept = [(first, state.scales.get((component, first), 1.0))]
            state.active[component] = kept

    def unload_lora_weights(self, *_: Any, **__: Any) -> None:
        self._set_adapters(Adapters())

    def disable_lora(self) -> None:
        self._adapters.enabled = False

    def enable_lora(self) -> None:
        self._adapters.enabled = True

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        """Keep the active ones, times a scale, until `unfuse_lora`. Nothing is written into weights."""
        state = self._adapters
        chosen = self._library.components if components is None else tuple(components)
        self._check_names([*(adapter_names or ())])
        state.fused = {
            c: [(n, w * lora_scale) for n, w in a if adapter_names is None or n in adapter_names]
            for c, a in state.active.items()
            if c in chosen
        }

    def unfuse_lora(self, *_: Any, **__: Any) -> None:
        self._adapters.fused = None

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | Sequence[str] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Teach the text encoders a word, or several: files, folders or repositories on the hub, each with its word."""
        for name in options:
            if name not in _HUB:
                raise UnknownNameError("argument of load_textual_inversion", name, ("token", "weight_name", *_HUB))
        several = isinstance(pretrained_model_name_or_path, (list, tuple))
        sources = list(pretrained_model_name_or_path) if several else [pretrained_model_name_or_path]
        words: list[Any] = list(token) if isinstance(token, (list, tuple)) else [token] * len(sources)
        if len(words) != len(sources) or not all(isinstance(s, (str, os.PathLike)) for s in sources):
            raise UnsupportedError(
                f"{len(sources)} embeddings with {len(words)} words",
                expected="paths of files, a word each",
            )
        given = {k: v for k, v in options.items() if k in _HUB and v is not None and k != "use_safetensors"}
        for source, word in zip(sources, words, strict=True):
            path = _file(str(source), weight_name or LEARNED, subfolder, given)
            for one in self._each_pipeline():
                one.load_embedding(path, word)

    def unload_textual_inversion(self, tokens: Any = None, **_: Any) -> None:
        """Forget all words; some of them alone is refused."""
        if tokens is not None:
            raise UnsupportedError("unload_textual_inversion of some words", remedy="Leave tokens out: all go.")
        for one in self._each_pipeline():
            one.unload_embeddings()

    def _each_pipeline(self) -> Sequence[Pipeline]:
        return self._pipeline.pipelines if isinstance(self._pipeline, PipelineGroup) else (self._pipeline,)

    def _set_adapters(self, adapters: Adapters) -> None:
        object.__setattr__(self, "_adapters", adapters)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._adapters.files:
                raise UnknownNameError("adapter", name, tuple(self._adapters.files))


def _scale(weight: Any, component: str, known: Sequence[str]) -> float:
    if isinstance(weight, Mapping):
        for name, own in weight.items():
            if name not in known or isinstance(own, Mapping):
                raise UnsupportedError(
                    f"adapter_weights of {name!r}",
                    expected=f"a number for {' or '.join(known)}",
                    remedy="Leave it out.",
                )
        weight = weight.get(component)
    return 1.0 if weight is None else float(weight)


def _file(name: str, weight_name: str | None, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    """The file of a LoRA: itself, that of a folder, or fetched from the hub."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / (subfolder or "")
        if weight_name or (folder / WEIGHT_NAME).is_file():
            return folder / (weight_name or WEIGHT_NAME)
        found = sorted(folder.glob(f"*{SUFFIX}"))
        if len(found) != 1:
            raise MissingError(
                f"{len(found)} {SUFFIX} files in the folder {path.name!r}",
                expected="one",
                remedy="Say which with weight_name.",
            )
        return found[0]
    if path.is_absolute() or name.count("/") != 1:
        raise MissingError(f"no LoRA {name!r}", expected="a file, a folder, or a repository like owner/name")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingError(
            f"no LoRA {name!r} here", remedy="To fetch it: pip install 'fewstep[export]', or give its file."
        ) from error
    try:
        return Path(hf_hub_download(name, weight_name or WEIGHT_NAME, subfolder=subfolder, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MissingError(
            f"the LoRA {name!r} cannot be fetched ({type(error).__name__})", remedy="Give the path of its file."
        ) from error
