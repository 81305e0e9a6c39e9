"""The update of slots in three kernels a tick; see `triton_update.py`."""

from __future__ import annotations

import torch

from .torch_update import COLUMN, Extras, TorchSlotState, image_bounds
from .triton_update import advance, gather

_ADVANCED = (
    "h_x",
    "h_out",
    "a",
    "c",
    "c_prev",
    "x0_x",
    "x0_out",
    "holds",
    "kept_latent",
    "kept_noise",
    "limit",
    "clip_h",
    "clip_x",
    "spread",
)


class TritonSlotState(TorchSlotState):
    """`TorchSlotState` with its arithmetic in Triton; the memory and what is loaded into it are the same."""

    def model_input(self, slots: torch.Tensor, out: torch.Tensor, timestep: torch.Tensor) -> None:
        columns = COLUMN["input_scale"], COLUMN["timesteps"]
        gather(slots, self.position, self._scalars, self.latent, out, timestep, *columns)

    def step(
        self,
        out: torch.Tensor,
        rows_of: torch.Tensor,
        weights: torch.Tensor,
        slots: torch.Tensor,
        *,
        x0: torch.Tensor,
        extras: Extras,
        variance: torch.Tensor | None = None,
    ) -> None:
        """Bounds of images' own are of all their pixels, which no block of a kernel sees: torch orders them before."""
        columns = [COLUMN[n] for n in _ADVANCED]
        bounds, spreads = weights, extras.spreads and variance is not None
        if extras.thresholds:
            factors = self._factors(slots)
            implied = self._x0(factors, self.latent[slots], self._guided(out, rows_of, weights))
            bounds = torch.stack([b.reshape(-1) for b in image_bounds(implied, factors, thresholds=True)], 1)
        tables = (self._scalars, self._b, self._write, self._draw_at)
        state = (self.latent, self.history, self.draws, self._held, self._mask, self._kept_latent, self._kept_noise)
        said = (out if variance is None else variance, bounds)
        flags = (extras.previews, extras.blends, extras.clips, extras.thresholds, spreads)
        advance(out, rows_of, weights, slots, self.position, *tables, *state, x0, *said, columns, *flags)
