"""The keys of a diffusers scheduler's configuration that are read here, each with what it may hold.

A value of another type is an error: `"no"` would count as true, and `null` as the class's default. What the values mean
is checked where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..values import Reader

FLAGS = (
    *("clip_sample", "set_alpha_to_one", "skip_prk_steps", "rescale_betas_zero_snr", "thresholding"),
    *("lower_order_final", "euler_at_final", "predict_x0"),
)
FLAGS_OR_NULL = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("use_flow_sigmas", "use_dynamic_shifting"),
)
WORDS = (
    *("_class_name", "beta_schedule", "prediction_type", "timestep_spacing", "timestep_type", "interpolation_type"),
    *("algorithm_type", "solver_type", "final_sigmas_type", "sigma_schedule"),
)
WORDS_OR_NULL = ("variance_type",)
COUNTS = ("num_train_timesteps", "solver_order", "original_inference_steps")
NUMBERS = (
    *("beta_start", "beta_end", "sigma_data", "rho", "clip_sample_range", "timestep_scaling"),
    *("sample_max_value", "dynamic_thresholding_ratio"),
)
NUMBERS_OR_NULL = ("sigma_min", "sigma_max")
MOST_TIMESTEPS = 100_000
BOUND = 2**31 - 1


def check_keys(config: Mapping[str, Any], reading: Reader) -> None:
    """Raise the reading's error for a key of a scheduler's configuration that holds what it cannot."""
    for key, value in config.items():
        if key in FLAGS or (key in FLAGS_OR_NULL and value is not None):
            reading.flag(key, value)
        elif key in WORDS or (key in WORDS_OR_NULL and value is not None):
            reading.text(key, value, most=64)
        elif key in COUNTS or (key == "steps_offset" and value is not None):
            reading.integer(key, value, -BOUND, BOUND)
        elif key in NUMBERS or (key in NUMBERS_OR_NULL and value is not None):
            reading.number(key, value)
        elif key == "lambda_min_clipped":
            reading.number(key, value, -math.inf)
        elif key == "trained_betas" and value is not None:
            for beta in reading.array(key, value, 2, MOST_TIMESTEPS):
                reading.number(key, beta)
        elif key == "disable_corrector":
            for step in reading.array(key, value):
                reading.integer(key, step, 0, MOST_TIMESTEPS)
        elif key == "_use_default_values":
            for name in reading.array(key, value):
                reading.text(key, name, most=64)
