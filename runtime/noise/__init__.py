"""Unit noise from a seed, number for number as torch gives it."""
