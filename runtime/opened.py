"""The engines of a loaded bundle: opened when they are needed, and given other weights where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engines import Engine, open_engines
from ..weights.lora import Fusion
from .adapted import AdaptedEngines
from .device.base import Device
from .prompts.lora_tags import Uses
from .swapping import Loading, check_fits, check_loaded, plan_loading, put_weights, shown_as


class OpenedEngines:
    """Engines of a bundle on a device; all of a component hold the same weights.

    sizes: the dimensions that a component is opened for. options: what `open_engines` is told of all. adapted: the
    engines that take LoRAs and words, beside the plain ones and on the same backends.
    """

    def __init__(
        self, bundle: Bundle, device: Device, sizes: Callable[[str], Mapping[str, int]], options: Mapping[str, Any]
    ) -> None:
        self.adapted = AdaptedEngines(bundle, self._open_adapted)
        self._bundle, self._device, self._sizes, self._options = bundle, device, sizes, dict(options)
        self._loaded: dict[str, Loading] = {}
        self._opened: list[tuple[str, Engine]] = []
        self._backends: dict[str, str] = {}

    def open(self, names: Sequence[str], *, keep: bool = True) -> dict[str, Engine]:
        """The engines of components where the device has them. keep: whether later weights are put into them too."""
        with self._device.guard_memory("the engines"):
            dims = {n: self._sizes(n) for n in names}
            engines = open_engines(self._bundle, names, dims=dims, **self._options)
        put_weights(list(engines.items()) if self._loaded else [], self._loaded)
        self._opened += engines.items() if keep else ()
        self._backends |= {name: engine.backend for name, engine in engines.items()}
        return engines

    def open_on_host(self, names: Sequence[str], *, keep: bool = True) -> dict[str, Engine]:
        """The same, with inputs and outputs in the host's memory."""
        return {n: self._device.on_host(e) for n, e in self.open(names, keep=keep).items()}

    def swap(
        self, other: Bundle | None, uses: Uses, files: Sequence[Path], fusion: Fusion, *, gate: bool
    ) -> tuple[dict[str, float], Bundle]:
        """Give all engines the weights of another bundle (`None`: the own), or of LoRAs in `files` merged into them.

        Returns the milliseconds of each component that changed, and the bundle as pictures tell of it. On a failure
        the former weights are put back. Raises `MismatchError`, `UnsupportedError`, `GateError`.
        """
        store, source = self._options["store"], self._bundle if other is None else other
        check_fits(self._bundle, source)
        loadings = plan_loading(source, uses, files, fusion, store)
        former = self._loaded or plan_loading(self._bundle, (), (), Fusion(), store)
        engines = [*self._opened, *self.adapted.opened()]
        try:
            took = put_weights(engines, loadings)
            if gate and other is not None and not uses:
                check_loaded(other, self._opened)
        except BaseException:
            put_weights(engines, former)
            raise
        self._loaded = loadings
        return took, shown_as(self._bundle, source, loadings)

    def _open_adapted(self, bundle: Bundle, name: str, dims: Mapping[str, int]) -> Engine:
        """On the backend that the component is on already."""
        known = self._backends.get(name)
        options = {**self._options, **({} if known is None else {"backend": known})}
        with self._device.guard_memory("the engine that takes LoRAs"):
            engine = open_engines(bundle, [name], dims={name: {**self._sizes(name), **dims}}, **options)[name]
        put_weights([(name, engine)] if self._loaded else [], self._loaded)
        return engine if name == "unet" else self._device.on_host(engine)
