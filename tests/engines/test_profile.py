"""Profiles: spans in order, sizes that fit, and the profiles of a bundle."""

from __future__ import annotations

import pytest
from fewstep.bundle import Bundle
from fewstep.engines import Profile, Span, TensorSpec, profiles_for
from fewstep.engines.profile import dimension_names, select_profile
from fewstep.errors import ArgumentError


@pytest.mark.parametrize(("low", "best", "high"), [(0, 1, 1), (2, 1, 3), (1, 4, 3), (-1, 1, 2)])
def test_a_span_is_in_order(low: int, best: int, high: int) -> None:
    with pytest.raises(ArgumentError, match="not in order"):
        Span(minimum=low, optimum=best, maximum=high)


def test_an_exact_profile_admits_one_size_and_a_dynamic_one_a_range() -> None:
    exact = Profile.exact({"rows": 2, "height": 8})
    assert exact.is_exact
    assert exact.admits({"rows": 2, "height": 8, "width": 99})
    assert not exact.admits({"rows": 1, "height": 8})
    assert not exact.admits({"height": 8})
    span = Profile(
        spans={"rows": Span(minimum=1, optimum=2, maximum=4), "height": Span(minimum=8, optimum=8, maximum=8)}
    )
    assert [span.admits({"rows": r, "height": 8}) for r in (1, 4, 5)] == [True, True, False]
    assert select_profile((span, exact), {"rows": 2, "height": 8}) == 1
    assert select_profile((span, exact), {"rows": 3, "height": 8}) == 0
    assert select_profile((exact,), {"rows": 3, "height": 8}) is None
    assert Profile.from_json(span.to_json()) == span
    assert str(span) == "height=8 rows=1:2:4"


def test_multiples_of_a_dimension_resolve_in_every_corner() -> None:
    spec = TensorSpec(name="image", dtype="uint8", shape=("batch", "height*8", 3))
    profile = Profile(
        spans={"batch": Span(minimum=1, optimum=1, maximum=2), "height": Span(minimum=4, optimum=8, maximum=8)}
    )
    assert profile.shapes(spec) == ((1, 32, 3), (1, 64, 3), (2, 64, 3))
    assert dimension_names([spec]) == ("batch", "height")


def test_a_bundles_profiles_cover_sizes_batches_and_guidance(bundle: Bundle) -> None:
    found = profiles_for(bundle, sizes=[(64, 48), (32, 32)], batches=[1, 2])
    assert [str(p) for p in found["unet"][:3]] == [
        "height=12 rows=1 tokens=77 width=16",
        "height=12 rows=2 tokens=77 width=16",
        "height=12 rows=4 tokens=77 width=16",
    ]
    assert len(found["unet"]) == 6
    assert [str(p) for p in found["vae_decoder"]] == [
        "batch=1 height=12 width=16",
        "batch=2 height=12 width=16",
        "batch=1 height=8 width=8",
        "batch=2 height=8 width=8",
    ]
    assert [str(p) for p in found["text_encoder"]] == ["prompts=1", "prompts=2", "prompts=4"]
    assert [str(p) for p in profiles_for(bundle, guidance=False)["unet"]] == ["height=12 rows=1 tokens=77 width=16"]


def test_dynamic_spans_take_the_place_of_exact_sizes(bundle: Bundle) -> None:
    spans = {"height": Span(minimum=8, optimum=12, maximum=16), "width": Span(minimum=8, optimum=16, maximum=16)}
    found = profiles_for(bundle, dynamic=spans, guidance=False)
    assert [str(p) for p in found["unet"]] == ["height=8:12:16 rows=1 tokens=77 width=8:16:16"]
    assert [p.is_exact for p in found["text_encoder"]] == [True]


@pytest.mark.parametrize("size", [(60, 60), (0, 8), (64, -8), (65, 64)])
def test_sizes_that_the_model_does_not_take_are_refused(bundle: Bundle, size: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="multiples of 8"):
        profiles_for(bundle, sizes=[size])
    with pytest.raises(ArgumentError, match="batch is 0"):
        profiles_for(bundle, batches=[0])
