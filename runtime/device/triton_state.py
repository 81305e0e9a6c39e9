"""The update of slots in three kernels a tick; see `triton_update.py`."""

from __future__ import annotations

import torch

from .torch_update import COLUMN, Extras, TorchSlotState
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
    ) -> None:
        columns = [COLUMN[n] for n in _ADVANCED]
        tables = (self._scalars, self._b, self._write, self._draw_at)
        state = (self.latent, self.history, self.draws, self._held, self._mask, self._kept_latent, self._kept_noise)
        advance(out, rows_of, weights, slots, self.position, *tables, *state, x0, columns, *extras)
