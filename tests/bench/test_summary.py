"""The bench's arithmetic, against NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from fewstep.bench.summary import (
    fixed_and_per_step,
    percentiles,
    psnr,
    ratio_of_medians,
    relative_error,
    stage_percentiles,
)


def test_percentiles_of_a_known_sequence() -> None:
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "min": 0.0, "n": 101}


def test_a_ratio_is_of_medians_and_its_interval_holds_the_truth() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(100):
        ours = rng.lognormal(0.0, 0.2, 30)
        theirs = rng.lognormal(np.log(2.0), 0.2, 30)
        ratio = ratio_of_medians(theirs, ours, seed=trial)
        assert ratio["ratio"] == pytest.approx(np.median(theirs) / np.median(ours), abs=1e-4)
        covered += ratio["low"] <= 2.0 <= ratio["high"]
    assert 85 <= covered <= 100  # 95 are expected; 85 is five standard deviations below


def test_what_weighs_on_whole_rounds_cancels() -> None:
    mood = np.tile([1.0, 10.0], 10)
    ratio = ratio_of_medians(3.0 * mood, mood)
    assert ratio["ratio"] == ratio["low"] == ratio["high"] == 3.0


def test_sides_that_were_not_taken_together_are_resampled_apart() -> None:
    mood = np.tile([1.0, 10.0], 10)
    ratio = ratio_of_medians(3.0 * mood, mood[:15], paired=False)
    assert ratio["low"] < ratio["ratio"] < ratio["high"]
    assert ratio_of_medians([6.0] * 3, [2.0] * 9, paired=False)["ratio"] == 3.0


def test_the_fit_separates_fixed_from_per_step_cost() -> None:
    assert fixed_and_per_step({1: 12.0, 2: 14.0, 8: 26.0}) == {"fixed_ms": 10.0, "per_step_ms": 2.0}
    assert fixed_and_per_step({4: 1.0}) is None


def test_stages_pool_evaluations_and_leave_out_what_never_ran() -> None:
    stages = stage_percentiles([{"evaluations": [1.0, 3.0], "text": 2.0, "encode_image": 0.0}, {"evaluations": [2.0]}])
    assert stages["each evaluation"]["p50"] == 2.0
    assert stages["each evaluation"]["n"] == 3
    assert "encode_image" not in stages
    assert stages["text"]["p50"] == 1.0


def test_agreement_of_images_and_outputs() -> None:
    image = np.full((1, 2, 2, 3), 100, np.uint8)
    assert psnr(image, image) is None
    assert psnr(image + np.uint8(1), image) == pytest.approx(20 * np.log10(255.0), abs=0.01)
    assert relative_error(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.08)


def test_an_output_that_is_not_finite_has_no_error_in_numbers() -> None:
    assert relative_error(np.array([np.nan, 1.0]), np.array([1.0, 1.0])) is None
