"""Noise schedules, spacings and samplers, compiled to programs of rows. NumPy and the standard library only."""

from .compat.classes import program_from_diffusers
from .compile import compile_program
from .found import FoundSchedules, load_schedules
from .names import resolve_sampler, resolve_schedule
from .noise import NoiseSchedule
from .program import Program

__all__ = [
    "FoundSchedules",
    "NoiseSchedule",
    "Program",
    "compile_program",
    "load_schedules",
    "program_from_diffusers",
    "resolve_sampler",
    "resolve_schedule",
]
