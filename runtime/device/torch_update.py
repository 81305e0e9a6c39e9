"""The update of slots by rows of their programs, in torch, for a CUDA device.

Every slot's row lies in tables on the device, so one call serves slots with different samplers, step counts and
histories, with no host synchronisation and no Python loop over slots: it can be captured in a CUDA graph, and another
program is another table. It has been run on CPU tensors against the NumPy kernels, not on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import ArgumentError
from ...schedules import Program
from .memory import upload

_SCALARS = ("input_scale", "h_x", "h_out", "a", "c", "c_prev", "x0_x", "x0_out", "holds")
_COLUMN = {name: column for column, name in enumerate(_SCALARS)}


class CudaSlotState:
    """The sampling state of S slots on a device.

    latent, noise: float32 [S, *shape]; history: float32 [S, K, *shape], on `device`. Programs of up to `max_rows` rows
    are loaded into slots; `row` int64 [S] says which row each is at, and only `advance` moves it. With `max_draws`,
    `draws` float32 [S, D, *shape] holds all the noise of each slot's program, and each row takes its own; without, the
    caller fills `noise[slot]` where the coming row draws.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...],
        history: int,
        *,
        max_rows: int = 64,
        max_draws: int = 0,
        device: str | torch.device = "cuda",
    ) -> None:
        if slots < 1 or history < 1 or max_rows < 1 or any(d < 1 for d in shape):
            raise ArgumentError(f"{slots} slots of shape {shape} with {history} history", expected="positive sizes")
        self.device = torch.device(device)
        self.shape, self.history_slots, self.max_rows = shape, history, max_rows
        make: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self.latent = torch.zeros((slots, *shape), **make)
        self.history = torch.zeros((slots, history, *shape), **make)
        self.noise = torch.zeros((slots, *shape), **make)
        self._held = torch.zeros((slots, *shape), **make)
        self.row = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._scalars = torch.zeros((slots, max_rows, len(_SCALARS)), **make)
        self._b = torch.zeros((slots, max_rows, history), **make)
        self._write = torch.zeros((slots, max_rows), dtype=torch.int64, device=self.device)
        self._timesteps = torch.zeros((slots, max_rows), **make)
        self._finish = torch.ones(slots, **make)
        self.max_draws = max_draws
        self.draws = torch.zeros((slots, max_draws, *shape), **make) if max_draws else None
        self._draw_at = torch.zeros((slots, max_rows), dtype=torch.int64, device=self.device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a row reads or moves on: latents, history, noise held, and where each slot is."""
        return self.latent, self.history, self.noise, self._held, self.row

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """All of its memory: the state and its tables."""
        tables = (self._scalars, self._b, self._write, self._timesteps, self._finish, self._draw_at)
        return (*self.tensors, *tables, *(() if self.draws is None else (self.draws,)))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers)

    def grown(self, rows: int, draws: int) -> CudaSlotState:
        """A state with room for longer programs, which holds what this one does."""
        made = CudaSlotState(
            len(self.latent), self.shape, self.history_slots, max_rows=rows, max_draws=draws, device=self.device
        )
        for new, old in zip(made.buffers, self.buffers, strict=True):
            new[tuple(slice(0, n) for n in old.shape)] = old
        return made

    def wipe(self, slot: int) -> None:
        """Forget a slot's tenant. A zero coefficient would not silence a NaN, so the memory itself is zeroed."""
        for tensor in (self.latent, self.history, self.noise, self._held, self._scalars, self._b):
            tensor[slot].zero_()
        if self.draws is not None:
            self.draws[slot].zero_()
        self.row[slot] = 0
        self._write[slot] = 0
        self._draw_at[slot] = 0

    def load(self, slot: int, program: Program) -> None:
        """Write a program's rows into the slot's tables and put it at its first row."""
        rows = program.evaluations
        if rows > self.max_rows or program.history > self.history_slots:
            raise ArgumentError(
                f"program {program.sampler!r} with {rows} rows and {program.history} history slots",
                expected=f"at most {self.max_rows} and {self.history_slots}",
                remedy="Make CudaSlotState with a larger max_rows or history.",
            )
        holds = np.append(program.c_prev[1:] != 0.0, False).astype(np.float64)
        columns = [holds if name == "holds" else getattr(program, name) for name in _SCALARS]
        upload(self._scalars[slot, :rows], _float32(np.stack(columns, axis=1)))
        self._b[slot].zero_()
        upload(self._b[slot, :rows, : program.history], _float32(program.b))
        upload(self._write[slot, :rows], program.write)
        upload(self._timesteps[slot, :rows], _float32(program.timesteps))
        self._finish[slot] = float(program.state_scale[-1])
        if self.draws is not None:
            count = int(np.count_nonzero(program.draws))
            if count > self.max_draws:
                raise ArgumentError(
                    f"program {program.sampler!r} draws {count} times",
                    expected=f"at most {self.max_draws}",
                    remedy="Make CudaSlotState with a larger max_draws.",
                )
            latest = np.maximum(np.cumsum(program.draws) - 1, 0)
            upload(self._draw_at[slot, :rows], latest.astype(np.int64))
        self.row[slot] = 0

    def finish(self, slots: torch.Tensor) -> torch.Tensor:
        """float32 [A, *shape]: the results of these slots, in diffusers' latent coordinates."""
        return self._finish[slots].reshape(-1, *(1,) * len(self.shape)) * self.latent[slots]

    def timesteps(self, slots: torch.Tensor) -> torch.Tensor:
        """float32 [A]: what the network is fed for these slots' rows. slots: int64 [A] on the device."""
        return self._timesteps[slots, self.row[slots]]

    def model_input(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        """Write the network's input of these slots into `out` [A, *shape], of the engine's own float type."""
        out.copy_(self._column(slots, "input_scale") * self.latent[slots])

    def preview(self, slots: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """float32 [A, *shape]: x0 as these slots' rows see it. Call it before `advance`."""
        return self._column(slots, "x0_x") * self.latent[slots] + self._column(slots, "x0_out") * outputs.float()

    def advance(self, slots: torch.Tensor, outputs: torch.Tensor) -> None:
        """Apply each slot's own row, given outputs [A, *shape] of the network, and move on to its next row.

        slots: int64 [A] on the device, no slot twice.
        """
        rows = self.row[slots]
        x, held = self.latent[slots], self._held[slots]
        noise = self.noise[slots] if self.draws is None else self.draws[slots, self._draw_at[slots, rows]]
        kept = self._column(slots, "h_x") * x + self._column(slots, "h_out") * outputs.float()
        self.history[slots, self._write[slots, rows]] = kept
        b = self._b[slots, rows]
        weights = b.reshape(*b.shape, *(1,) * len(self.shape))
        past = torch.where(weights == 0.0, torch.zeros_like(kept)[:, None], self.history[slots])
        x = self._column(slots, "a") * x + (weights * past).sum(dim=1)
        x = x + self._column(slots, "c") * noise + self._column(slots, "c_prev") * held
        self.latent[slots] = x
        self._held[slots] = torch.where(self._column(slots, "holds") != 0.0, noise, held)
        self.row[slots] = torch.clamp(rows + 1, max=self.max_rows - 1)

    def _column(self, slots: torch.Tensor, name: str) -> torch.Tensor:
        """One coefficient of each slot's row, [A, 1, 1, ...]."""
        values = self._scalars[slots, self.row[slots], _COLUMN[name]]
        return values.reshape(-1, *(1,) * len(self.shape))


def _float32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(values, np.float32)


def slot_index(slots: Sequence[int], device: str | torch.device) -> torch.Tensor:
    """Slot numbers as the index tensor that the calls above take."""
    return torch.tensor(list(slots), dtype=torch.int64, device=device)
