"""What diffusers' pipelines have in common, on a `Pipeline`: loading, components, devices, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from ...bundle import Bundle, Defaults
from ...errors import ArgumentError, UnknownNameError, UnsupportedError
from ..group import PipelineGroup
from ..library import open_library
from .calling import call
from .components import (
    ComponentView,
    FrozenConfig,
    Opened,
    UnsupportedAttributeError,
    part_names,
    state_of,
    tokenizer_names,
    uncompiled,
)
from .loading import ABSENT, component_options, open_pretrained, precision_of
from .loras import Adapters, LoraMethods
from .methods import INSTEAD, REFUSED, quiet_method
from .schedulers import check_scheduler, config_of, make_scheduler

P = TypeVar("P", bound="DiffusionPipeline")
EMPTY = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of diffusers' pipelines that bundles do not hold: `None`, and nothing else can be set."""


class _Refusing(type):
    """Refuses by its name what diffusers' classes have, and these have not."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{cls.__name__} has no {name!r}")
        raise UnsupportedAttributeError(
            f"{cls.__name__}.{name}", expected="what docs/diffusers.md lists", remedy=REFUSED.get(name, "")
        )


class DiffusionPipeline(LoraMethods, metaclass=_Refusing):
    """A pipeline in diffusers' words. This class itself only loads: `from_pretrained` gives the class of the bundle.

    `scheduler` may be replaced by any of diffusers' schedulers that the samplers cover, or a subclass with its own
    `set_timesteps`; `vae`, `unet`, text encoders and tokenizers by diffusers' objects, which are exported on the spot,
    or by those of another pipeline. Whatever else is set, called or read is refused by its name.
    """

    ARGUMENTS: ClassVar[Mapping[str, Any]] = {}
    BIG: ClassVar[bool] = False
    task: ClassVar[str] = "text"

    def __init__(self, pipeline: Opened | None = None, /, **components: Any) -> None:
        if type(self) is DiffusionPipeline:
            raise ArgumentError("DiffusionPipeline is of no family", remedy="Use DiffusionPipeline.from_pretrained.")
        known = component_options()
        for name, value in components.items():
            if name not in known and not (name in (*ABSENT, *EMPTY) or name == "force_zeros_for_empty_prompt"):
                raise UnknownNameError(f"component of {type(self).__name__}", name, known)
            if name not in known and name != "force_zeros_for_empty_prompt" and value:
                raise UnsupportedError(f"{name} in a pipeline", remedy="Leave it out: bundles hold none.")
        given = {k: v for k, v in components.items() if k in known and v is not None}
        opened = pipeline or _origin(given)
        self._set("_said", set())
        self._set("_scheduler", None)
        self._set("_held", {})
        self._set("_adapters", Adapters())
        self._adopt(opened)
        self._replace({k: v for k, v in given.items() if k != "scheduler"})
        if "scheduler" in given:
            self._set("_scheduler", check_scheduler(given["scheduler"]))
        zeros = components.get("force_zeros_for_empty_prompt", self.bundle.force_zeros)
        if bool(zeros) != self.bundle.force_zeros:
            raise UnsupportedError(f"force_zeros_for_empty_prompt is {zeros}", expected=f"{self.bundle.force_zeros}")

    @classmethod
    def from_pretrained(cls: type[P], bundle: Any, **options: Any) -> P:
        """From a bundle (its folder, or loaded), or from a diffusers folder or hub id, which is exported on the spot.

        options: diffusers' own (`torch_dtype`, `variant`, `use_safetensors`, `revision`, `local_files_only`, a
        component by its name) and those of `fewstep.load`.
        """
        opened, parts = open_pretrained(bundle, options)
        chosen: Any = cls._of(opened.bundle)
        made: P = chosen(opened, **parts)
        return made

    @classmethod
    def from_pipe(cls: type[P], pipeline: DiffusionPipeline, **components: Any) -> P:
        """The same components under another class of the same family."""
        if not isinstance(pipeline, DiffusionPipeline):
            raise UnsupportedError(f"from_pipe of a {type(pipeline).__name__}", expected="a pipeline of this adapter")
        chosen: Any = cls._of(pipeline.bundle)
        made: P = chosen(pipeline.pipeline, **{"scheduler": pipeline.held_scheduler, **components})
        made._set("_held", {**pipeline._held, **made._held})
        made._set("_adapters", pipeline._adapters.copy())
        return made

    @classmethod
    def _of(cls, bundle: Bundle) -> type[DiffusionPipeline]:
        """The class itself, or where it is of no family the one that a bundle's checkpoint names."""
        if cls.ARGUMENTS:
            return cls
        named = (c for c in _classes(DiffusionPipeline) if c.__name__ == bundle.pipeline)
        return next(named, None) or class_for(bundle, "text")

    @property
    def pipeline(self) -> Opened:
        """What does the work."""
        opened: Opened = self._pipeline
        return opened

    @property
    def bundle(self) -> Bundle:
        """The bundle with this class, the scheduler of now and without its preset, as diffusers runs a checkpoint."""
        own = self.pipeline.bundle.defaults
        plain = Defaults(
            width=own.width, height=own.height, steps=own.steps, guidance=own.guidance, prediction=own.prediction
        )
        admitted = self.pipeline.bundle.model.pipelines
        named = next(c.__name__ for c in type(self).__mro__ if c.__name__ in admitted)
        return replace(self.pipeline.bundle, defaults=plain, scheduler=self.scheduler_config, pipeline=named)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return self._pipeline.bundle.scheduler if self._scheduler is None else config_of(self._scheduler)

    @property
    def scheduler(self) -> Any:
        """diffusers' object of the scheduler; what was set, where one was."""
        if self._scheduler is None:
            self._set("_scheduler", make_scheduler(self._pipeline.bundle.scheduler))
        return self._scheduler

    @property
    def held_scheduler(self) -> Any:
        """The scheduler that was set or read; `None` while it is the bundle's own."""
        return self._scheduler

    @property
    def components(self) -> dict[str, Any]:
        """By name, as `StableDiffusionPipeline(**pipe.components)` takes them."""
        names = ("vae", *self._pipeline.bundle.text_encoders, *tokenizer_names(self._pipeline.bundle), "unet")
        found = {n: self._component(n) for n in names}
        return {**found, "scheduler": self.scheduler, **dict.fromkeys(EMPTY)}

    @property
    def config(self) -> FrozenConfig:
        """The pipeline's own configuration, `_class_name` included."""
        zeros = {"force_zeros_for_empty_prompt": self._pipeline.bundle.force_zeros} if self.BIG else {}
        return FrozenConfig({"_class_name": type(self).__name__, "_name_or_path": self.name_or_path, **zeros})

    @property
    def name_or_path(self) -> str:
        return str(self._pipeline.bundle.folder)

    @property
    def vae_scale_factor(self) -> int:
        return self.pipeline.bundle.latent.factor

    @property
    def device(self) -> object:
        """torch's device where the caller has torch loaded, else its name."""
        name = self._pipeline.device.name.partition(":torch")[0]
        torch = sys.modules.get("torch")
        return name if torch is None else torch.device(name)

    @property
    def dtype(self) -> Any:
        return ComponentView("unet", self._pipeline).dtype

    def to(self: P, *given: Any, **named: Any) -> P:
        """On another device: its engines are opened there. A precision is the bundle's own, or is refused."""
        for name in set(named) - {"dtype", "device", "silence_dtype_warnings", "torch_device", "torch_dtype"}:
            raise UnknownNameError("argument of to", name, ("device", "dtype"))
        for value in (*given, *(v for k, v in named.items() if k != "silence_dtype_warnings" and v is not None)):
            if str(value).startswith("torch."):
                self._check_precision(value)
            else:
                self._move(str(value))
        return self

    def _check_precision(self, value: Any) -> None:
        asked, own = precision_of(value), self._pipeline.bundle.component("unet").dtype
        if asked != own:
            raise UnsupportedError(
                f"to({value}) of a pipeline whose bundle holds {own}",
                expected=f"torch.{own}",
                remedy="Export the checkpoint again with --dtype, or load the checkpoint with torch_dtype.",
            )

    def _move(self, name: str) -> None:
        if _same_device(name, self._pipeline.device.name):
            return
        if name.partition(":")[0] not in ("cpu", "cuda"):
            raise UnsupportedError(f"the device {name!r}", expected="cpu or cuda")
        self._adopt(self._pipeline.reopened(device=name))

    def enable_vae_slicing(self) -> None:
        """Images of a batch go through the VAE one by one."""
        self._set_vae(slicing=True)

    def disable_vae_slicing(self) -> None:
        """As many at once as the VAE takes; `fewstep.load` has `vae_slicing` for more."""
        self._set_vae(slicing="auto")

    def enable_vae_tiling(self) -> None:
        """Pictures larger than a tile go through the VAE in tiles, of diffusers' size and overlap."""
        self._set_vae(tiling=True)

    def disable_vae_tiling(self) -> None:
        self._set_vae(tiling=False)

    def _set_vae(self, **how: Any) -> None:
        for one in self.pipeline.pipelines if isinstance(self.pipeline, PipelineGroup) else (self.pipeline,):
            for name, value in how.items():
                setattr(one.vae, name, value)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        self._follow_modules()
        return call(self, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        if name in INSTEAD:
            return quiet_method(name, self._said)
        if name in EMPTY:
            return None
        if name in part_names(self._pipeline.bundle):
            return self._component(name)
        return getattr(type(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            self._set("_scheduler", check_scheduler(value))
        elif name in part_names(self._pipeline.bundle):
            self._replace({name: value})
        elif name not in EMPTY or value is not None:
            settable = ("scheduler", *part_names(self._pipeline.bundle))
            raise UnsupportedError(
                f"setting {name} of a {type(self).__name__}", expected=f"{', '.join(settable)} alone to be set"
            )

    def __repr__(self) -> str:
        names = ", ".join(self.components)
        return f"{type(self).__name__}(bundle={self._pipeline.bundle.name!r}, components: {names})"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _component(self, name: str) -> Any:
        return self._held[name][0] if name in self._held else ComponentView(name, self._pipeline)

    def _adopt(self, pipeline: Opened) -> None:
        admitted = pipeline.bundle.model.pipelines
        if not any(c.__name__ in admitted for c in type(self).__mro__):
            raise ArgumentError(
                f"{type(self).__name__} for a bundle of family {pipeline.bundle.family}",
                expected=f"{admitted[0]} or another of its family",
            )
        self._set("_pipeline", pipeline)

    def _replace(self, parts: Mapping[str, Any]) -> None:
        """Export what is new among the components, and open the engines of the bundle that this makes."""
        inner = {n: uncompiled(v) for n, v in parts.items()}
        changed: dict[str, Any] = {}
        for name, value in inner.items():
            if isinstance(value, ComponentView):
                if value.name != name:
                    raise ArgumentError(f"the {value.name} of a pipeline as its {name}", expected=f"a {name}")
                if value.origin is not self._pipeline:
                    changed[name] = value.origin.bundle
            elif name not in self._held or self._held[name] != (value, state_of(value)):
                changed[name] = value
        if not changed:
            return
        self._adopt(self._pipeline.reopened(open_library().export_parts(self._pipeline.bundle, changed)))
        held = {n: v for n, v in self._held.items() if n not in changed}
        own = {n: (inner[n], state_of(inner[n])) for n in changed if not isinstance(inner[n], ComponentView)}
        self._set("_held", {**held, **own})

    def _follow_modules(self) -> None:
        """Export again what a caller changed in place since it was set, such as by `load_state_dict`."""
        self._replace({n: module for n, (module, state) in self._held.items() if state_of(module) != state})


def class_for(bundle: Bundle, task: str) -> type[DiffusionPipeline]:
    """diffusers' class for a bundle and a task: `text`, `image` or `inpaint`.

    Raises `UnsupportedError` for a task that diffusers has no class for.
    """
    model = bundle.model
    admitted = model.respacing if bundle.respaces else [p for p in model.pipelines if p not in model.respacing]
    classes = [c for c in _classes(DiffusionPipeline) if c.__name__ in model.pipelines and c.task == task]
    found = next((c for c in classes if c.__name__ in admitted), None)
    if found is None:
        raise UnsupportedError(
            f"a class of {admitted[0]}'s kind for the task {task!r}",
            expected=f"{' or '.join(c.__name__ for c in classes)}, which takes the bundle {bundle.name!r} too",
        )
    return found


def _classes(of: type[DiffusionPipeline]) -> Iterator[type[DiffusionPipeline]]:
    for each in of.__subclasses__():
        yield each
        yield from _classes(each)


def _origin(components: Mapping[str, Any]) -> Opened:
    """The pipeline that most of some components come from; the others replace its own."""
    origins = [v.origin for v in components.values() if isinstance(v, ComponentView)]
    if not origins:
        raise UnsupportedError(
            "a pipeline made from components alone, none of them a bundle's",
            expected="components of a loaded pipeline, some of them replaced",
            remedy="Use from_pretrained, and set what is to be replaced.",
        )
    return max(origins, key=origins.count)


def _same_device(asked: str, own: str) -> bool:
    """Whether two names are of one device: `cuda` is `cuda:0`, and `cpu:torch` is on the CPU."""
    return _plain(asked) == _plain(own)


def _plain(name: str) -> str:
    return "cuda:0" if name == "cuda" else name.partition(":torch")[0]
