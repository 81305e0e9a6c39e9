"""The conductor: ranges on the bundle's own pictures, each group's damage alone, as many as the budget takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..engines import Engine
from ..engines.graph.quantized import IntegerGrids, IntegerLayer
from ..errors import GateError
from ..precision import MOST_DB, mean_square_of, psnr_of
from ..runtime import Pipeline
from ..search.journal import Journal
from ..version import __version__
from .forms import STEPS, Lowered, bytes_saved
from .grids import ENDS, make_grids
from .groups import LayerGroup, group_layers
from .lowered import Lowering
from .probe import ProbeEngine, Seen
from .settings import QuantizeSettings, read_settings
from .store import store_lowered
from .trials import Trials

Progress = Callable[[str, float], None]
MARGIN_DB = 0.5
"""On the pictures to choose by, above what is asked of held-out ones; more after each failure."""
LOOKS = 8
"""At held-out pictures."""
MOST_GROUPS = 160
"""Layers that are each tried alone; of more, blocks are."""
CALIBRATION = 8
"""Pictures that ranges are taken from."""


def quantize_bundle(
    bundle: Bundle,
    *,
    precision: str = "int8",
    budget: str = "psnr>=30",
    components: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    pairs: int = 4,
    choose: int = 16,
    held_out: int = 32,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    calls: Mapping[str, Any] | None = None,
    by: str | None = None,
    threads: int = 0,
    work: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Store in a bundle components with as many layers in integers as a budget of its pictures allows; the bundle then.

    precision: `"int8"` or `"fp8"` (E4M3, for GPUs), weights and activations, for speed; `"int8-weights"` and
    `"int4-weights"` for memory (of four bits, layers that pictures do not take in four have eight).
    budget: `"psnr>=30"`: the PSNR in dB, of the squared error averaged over held-out pictures, to those of the plain
    engines at the same prompts and seeds. components: of `unet` and `vae_decoder`, both by default; where weights alone
    are lowered, the text encoders too. prompts: at least three, general captions by default; no prompt and no seed is
    in two of the sets. pairs: pictures on which each group is tried alone; choose, held_out: to choose by and to be
    judged by. calls: arguments of every call (steps, guidance, sampler), the bundle's own by default. by: what is tried
    alone, `"layer"`, `"block"` or `"component"`; `None`: layers, or blocks where there are many. work: a folder in
    which a killed search goes on. progress: is told what is done and the share that is.

    The same arguments give the same layers. Raises `ArgumentError`, `UnsupportedError`; `GateError` where no layer may
    be lowered, with what was reached; `MismatchError` for a folder of another search, `WriteError`.
    """
    settings = read_settings(
        bundle,
        precision=precision,
        budget=budget,
        components=components,
        prompts=prompts,
        pairs=pairs,
        choose=choose,
        held_out=held_out,
        seed=seed,
        size=size,
        calls=calls or {},
    )
    stated = {**settings.to_json(), "by": by, "model": bundle.unet_digest, "version": __version__}
    pipeline = Pipeline(bundle, backend="ort-cpu", device="cpu", size=settings.size, threads=threads)
    return _Quantizer(
        pipeline=pipeline,
        settings=settings,
        journal=Journal(None if work is None else Path(work), stated),
        by=by,
        threads=threads,
        progress=progress or (lambda stage, share: None),
    ).run()


class _Quantizer:
    """One search to its bundle."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        settings: QuantizeSettings,
        journal: Journal,
        by: str | None,
        threads: int,
        progress: Progress,
    ) -> None:
        self.bundle, self.settings, self.journal = pipeline.bundle, settings, journal
        self.threads, self.progress = threads, progress
        self.trials = Trials(pipeline, settings)
        self.parts = {n: Lowering.of(self.bundle, n) for n in settings.components}
        layers = {n: part.layers for n, part in self.parts.items()}
        self.steps = STEPS[settings.precision]
        usual = "block" if sum(map(len, layers.values())) > MOST_GROUPS else "layer"
        self.groups = group_layers(layers, by=by or usual, steps=self.steps)
        self.least = mean_square_of(settings.psnr)

    def run(self) -> Bundle:
        seen = self._calibrated() if self.steps[0].activations else {}
        grids = self._grids(seen)
        damages = self._damages(grids)
        order = self._ordered(seen, damages)
        chosen, reached = self._chosen(order, damages, grids)
        return self._stored(chosen, grids, seen, damages, reached)

    # ranges

    def _calibrated(self) -> dict[str, Seen]:
        """What was seen of each component on pictures to search on: of the UNet along its steps, with guidance."""
        self.progress("ranges", 0.0)
        asked = self.trials.asked["search"].first(CALIBRATION)
        seen = {}
        for name in self.parts:
            probe = ProbeEngine(self.bundle, name, threads=self.threads)
            if name == "unet":
                self.trials.latents(asked, probe)
            else:
                self.trials.pictures(self.trials.plain("search")[0][: len(asked)], probe)
            seen[name] = probe.seen()
        return seen

    def _grids(self, seen: Mapping[str, Seen]) -> dict[str, IntegerGrids]:
        """Grids of the ends that do less damage with all layers lowered, for each component by itself."""
        grids = {}
        for name in seen:
            part, (form,) = self.parts[name], self.steps
            smooth = not form.floating
            made = {ends: make_grids(seen[name], part.layers, part.weight, ends, smooth=smooth) for ends in ENDS}
            every = {name: [(form.name, layer) for layer in part.layers]}
            damages = {ends: self._kept(f"ends-{name}-{ends}", every, {name: own}) for ends, own in made.items()}
            grids[name] = made[min(ENDS, key=lambda ends: float(np.mean(damages[ends])))]
        return grids

    # damage

    def _kept(
        self,
        key: str,
        layers: Mapping[str, Lowered],
        grids: Mapping[str, IntegerGrids],
        on: str = "search",
    ) -> list[float]:
        """By picture, the squared error with these layers of components lowered: found once under this key."""

        def find() -> list[float]:
            engines = {name: self._engine(name, own, grids.get(name)) for name, own in layers.items()}
            return [float(d) for d in self.trials.damage(on, engines)]

        found: list[float] = self.journal.value(key, find)
        return found

    def _engine(self, name: str, layers: Lowered, grids: IntegerGrids | None) -> Engine:
        return self.parts[name].open(layers, grids, self.trials.dims, self.threads)

    def _damages(self, grids: Mapping[str, IntegerGrids]) -> list[float]:
        """Of each group alone, the mean squared error of the pictures to search on."""
        damages = []
        for i, group in enumerate(self.groups):
            self.progress(f"{group.component} {group.name}", 0.1 + 0.7 * i / len(self.groups))
            key = f"damage-{group.form.name}-{group.component}-{group.name}"
            own = {group.component: [(group.form.name, layer) for layer in group.layers]}
            damages.append(float(np.mean(self._kept(key, own, grids))))
        return damages

    def _ordered(self, seen: Mapping[str, Seen], damages: Sequence[float]) -> list[int]:
        """The groups, the most gained by damage first.

        What is gained are multiplications in integers, of a whole request with every evaluation counted, or bytes.
        """
        times = {"unet": self.trials.evaluations} if seen else {}
        gains = [times.get(g.component, 1) * self._gain(g, seen) for g in self.groups]
        return sorted(range(len(self.groups)), key=lambda i: -gains[i] / max(damages[i], 1e-9))

    def _gain(self, group: LayerGroup, seen: Mapping[str, Seen]) -> float:
        if not group.form.activations:
            return sum(bytes_saved(group.form, self.steps, layer) for layer in group.layers)
        return sum(seen[group.component].products[layer.module] for layer in group.layers)

    # choice

    def _chosen(
        self, order: Sequence[int], damages: Sequence[float], grids: Mapping[str, IntegerGrids]
    ) -> tuple[list[int], dict[str, Any]]:
        """As many groups, in this order, as the pictures to choose by take, and held-out ones confirm.

        Where these do not, fewer are chosen by as much as was lacking. Raises `GateError` where none may be lowered.
        """
        margin, tried = MARGIN_DB, [f"the least harmful one alone gives {psnr_of(min(damages)):.1f} dB"]
        for look in range(LOOKS):
            count = self._most(order, grids, mean_square_of(self.settings.psnr + margin))
            if not count:
                break
            self.progress(f"{count} of {len(order)} groups on held-out pictures", 0.95)
            held = self._kept(f"held-{count}", self._layers(order[:count]), grids, "held_out")
            reached = psnr_of(float(np.mean(held)))
            if reached >= self.settings.psnr:
                return list(order[:count]), {"errors": held, "looks": look + 1, "margin_db": round(margin, 2)}
            tried.append(f"{count} groups give {reached:.1f} dB on held-out pictures")
            margin += max(self.settings.psnr - reached, MARGIN_DB)
        raise GateError(
            f"no layers were found that may be lowered within {self.settings.budget}: {tried[-1]}",
            expected=f"at least {self.settings.psnr:g} dB",
            remedy='Ask for less, such as --budget "psnr>=25", or judge by more pictures (--choose, --held-out).',
        )

    def _most(self, order: Sequence[int], grids: Mapping[str, IntegerGrids], bound: float) -> int:
        """The most groups whose error, on pictures to choose by, is within a bound: by halving, as error grows."""
        low, high = 0, len(order) + 1  # low is within, high is not
        while high - low > 1:
            count = (low + high) // 2
            self.progress(f"{count} of {len(order)} groups together", 0.85)
            errors = self._kept(f"choose-{count}", self._layers(order[:count]), grids, "choose")
            low, high = (count, high) if float(np.mean(errors)) <= bound else (low, count)
        return low

    def _layers(self, groups: Sequence[int]) -> dict[str, Lowered]:
        """Of these groups by component, each layer in the last step that it is in one of."""
        chosen = sorted((self.groups[i] for i in groups), key=lambda g: self.steps.index(g.form))
        found: dict[str, dict[str, tuple[str, IntegerLayer]]] = {}
        for group in chosen:
            found.setdefault(group.component, {}).update((n.module, (group.form.name, n)) for n in group.layers)
        return {component: [*own.values()] for component, own in found.items()}

    # outcome

    def _stored(
        self,
        chosen: Sequence[int],
        grids: Mapping[str, IntegerGrids],
        seen: Mapping[str, Seen],
        damages: Sequence[float],
        reached: Mapping[str, Any],
    ) -> Bundle:
        self.progress("writing", 0.98)
        layers = self._layers(chosen)
        errors = np.array(reached["errors"])
        evaluations = {}
        for name, own in layers.items():
            plain = self.trials.pipeline.engines[name]
            ms = self.trials.milliseconds([plain, self._engine(name, own, grids.get(name))])
            evaluations[name] = {"plain_ms": round(ms[0], 3), "ms": round(ms[1], 3), "ratio": round(ms[0] / ms[1], 3)}
        taken = set(chosen)
        table = [
            {
                "component": g.component,
                "group": g.name,
                "layers": [layer.module for layer in g.layers],
                "form": g.form.name,
                "lowered": i in taken,
                "psnr_alone": _short(psnr_of(damages[i])),
                "multiplications" if g.form.activations else "bytes_saved": self._gain(g, seen),
            }
            for i, g in enumerate(self.groups)
        ]
        made = {
            **self.settings.to_json(),
            "version": __version__,
            "reached": {
                "psnr": _short(psnr_of(float(errors.mean()))),
                "worst": _short(psnr_of(float(errors.max()))),
                "pictures": len(errors),
                "looks": reached["looks"],
            },
            "seeds": {n: [a.seeds[0], a.seeds[-1]] for n, a in self.trials.asked.items()},
            "evaluations": evaluations,
            "groups": table,
        }
        return store_lowered(self.bundle, self.parts, layers, grids, made)


def _short(psnr: float) -> float:
    """In hundredths; equal pictures are at the most that a budget may ask."""
    return round(min(psnr, MOST_DB), 2)
