"""diffusers' schedulers as programs: their classes, their options, the grids that they step over."""
