"""Warming a server up: every size and every bucket is run once, and timed, before the first request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..engines.base import Engine
from ..errors import MismatchError
from ..runtime.arrays import Shape
from ..runtime.device.base import Slots
from ..runtime.pipeline import Pipeline
from ..runtime.prepare import Prepared
from ..runtime.programs import shortest_call
from .batch_sizes import BatchSizes, admitted_rows, measure
from .estimates import Estimates


def make_pools(
    pipeline: Pipeline,
    split: Callable[[Engine], Engine],
    sizes: Sequence[tuple[int, int]],
    *,
    slots: int,
    rows: Sequence[int],
    fixed: bool,
    image: bool,
) -> tuple[dict[Shape, tuple[Slots, BatchSizes]], Estimates]:
    """Slots and measured buckets for each size (width, height in pixels), and what the other stages take.

    `split` makes of the pipeline's UNet what is evaluated: itself, or the same with its rows in parallel.
    `rows` are the buckets to consider, or with `fixed` to use, as far as the engine admits them (`MismatchError` if
    it admits none). `image` runs the VAE's encoder too.
    """
    pools: dict[Shape, tuple[Slots, BatchSizes]] = {}
    unet = split(pipeline.engines["unet"])
    text_ms, decode_ms = 0.0, {}
    for size in sizes:
        prepared = _prepare(pipeline, size, image=image)
        text_ms = _prepare(pipeline, size, image=image).text_ms
        _, height, width = prepared.shape
        dims = {"height": height, "width": width, "tokens": prepared.samplings[0].tokens}
        admitted = admitted_rows(unet, dims, rows)
        if not admitted:
            raise MismatchError(
                f"the UNet's engine admits none of {', '.join(map(str, rows))} rows at {size[0]}x{size[1]}",
                expected="a profile for at least one",
                remedy="Build the engine for the sizes and batches to serve: fewstep build BUNDLE --help",
            )
        pool = pipeline.make_slots(prepared.shape, slots, split=split)
        buckets = _measure(pool, prepared, admitted, fixed=fixed)
        pools[prepared.shape] = pool, buckets
        decode_ms[prepared.shape] = _decode_ms(pipeline, prepared)
    pipeline.text.forget()
    return pools, Estimates({s: b for s, (_, b) in pools.items()}, text_ms=text_ms, decode_ms=decode_ms)


def _prepare(pipeline: Pipeline, size: tuple[int, int], *, image: bool) -> Prepared:
    """One image's worth of a request that is prepared as any other."""
    pipeline.text.forget()
    call = shortest_call(pipeline.bundle, size, image=image)
    return pipeline.prepare(pipeline.request("warm-up", guidance=1.0, seed=0, **call))


def _measure(slots: Slots, prepared: Prepared, rows: Sequence[int], *, fixed: bool) -> BatchSizes:
    (sampling,) = prepared.samplings

    def evaluate(count: int) -> None:
        sampling.position = 0
        slot = slots.admit(sampling, prepared.gaussians[0], None if prepared.latents is None else prepared.latents[0])
        try:
            slots.tick([slot], rows=count)
            slots.take_times()  # on a GPU this waits for the evaluation
        finally:
            slots.release(slot)

    if not fixed:
        return measure(evaluate, rows)
    costs = {r: c for r in rows for c in measure(evaluate, [r]).costs_ms.values()}
    return BatchSizes(costs)


def _decode_ms(pipeline: Pipeline, prepared: Prepared) -> float:
    """Milliseconds to decode one image, at best, after a first time."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        pipeline.vae.decode_unguarded(prepared.gaussians)
        times.append(1e3 * (time.perf_counter() - began))
    return min(times[1:])
