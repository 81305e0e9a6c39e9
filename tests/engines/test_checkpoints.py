"""Exported checkpoints, the embedded model and tiny random ones: built for TensorRT-RTX, built and gated on the CPU."""

from __future__ import annotations

import pytest
from fewstep.bundle import Bundle
from fewstep.engines import BuildOptions, Span, Store, build_engines, open_engines, profiles_for
from fewstep.engines.gate.reference import FILE

GPUS = BuildOptions(compute_capabilities=("8.9", "12.0"))


@pytest.fixture(params=["embedded", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd1", "sdxl"))])
def exported(request: pytest.FixtureRequest) -> Bundle:
    """Tracing the random ones takes a minute each, so that they are left to runs which ask for them by name."""
    if request.param == "embedded":
        from fewstep.export.embedded import embedded_bundle

        return embedded_bundle("base")[0]
    found: Bundle = request.getfixturevalue(f"{request.param}_bundle")
    return found


@pytest.mark.parametrize("kind", ["exact", "dynamic"])
def test_every_component_builds_for_two_gpus(exported: Bundle, store: Store, kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    step = exported.latent.multiple
    span = Span(minimum=step, optimum=4 * step, maximum=8 * step)
    spans = {"height": span, "width": span} if kind == "dynamic" else None
    profiles = profiles_for(exported, dynamic=spans)
    for name in exported.components:
        built = build_engines(
            exported, backend="tensorrt-rtx", components=[name], store=store, profiles=profiles, options=GPUS
        )[name]
        attentions = exported.component(name).operators.get("Attention", 0)
        assert built.entry.facts["decomposed_attentions"] == attentions
        assert (name == "unet") <= (attentions > 0)
        assert built.entry.facts["profiles"] == len(profiles[name])


def test_the_cpus_engines_agree_with_torch(exported: Bundle, store: Store) -> None:
    built = build_engines(exported, backend="ort-cpu", store=store)
    if (exported.folder / FILE).is_file():
        assert [b.entry.gate["passed"] for b in built.values()] == [True] * len(built)
    engines = open_engines(exported, list(exported.components), backend="ort-cpu", store=store, build="never")
    dims = {n: p[0].optimum for n, p in profiles_for(exported).items()}
    for name, engine in engines.items():
        engine.bind(dims[name]).enqueue()
