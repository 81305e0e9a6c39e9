"""The update of slots by their programs, in torch, for a device.

Every slot's coefficients lie in tables on the device, so one call serves slots with different samplers, step counts and
histories, with no host synchronisation and no Python loop over slots: it can be captured in a CUDA graph, and another
program is another table. It has been run on CPU tensors against the NumPy kernels, not on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...errors import ArgumentError
from ...schedules import Program
from ..pictures.inpaint import Blend
from .memory import upload

_OF_PROGRAM = ("input_scale", "timesteps", "h_x", "h_out", "a", "c", "c_prev", "x0_x", "x0_out")
_SCALARS = (*_OF_PROGRAM, "holds", "kept_latent", "kept_noise")
COLUMN = {name: column for column, name in enumerate(_SCALARS)}


class TorchSlotState:
    """The sampling state of S slots on a device.

    latent, noise: float32 [S, *shape]; history: float32 [S, K, *shape], on `device`. Programs of up to
    `longest_program` evaluations are loaded into slots; `position` int64 [S] says which evaluation of its own each is
    at, and only `advance` moves it. With `max_draws`, `draws` float32 [S, D, *shape] holds all the noise of each slot's
    program, and each position takes its own; without, the caller fills `noise[slot]` where the coming one draws. What
    inpainting keeps of a picture: mask float32 [S, 1, h, w], kept_latent, kept_noise float32 [S, *shape].
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...],
        history: int,
        *,
        longest_program: int = 64,
        max_draws: int = 0,
        device: str | torch.device = "cuda",
    ) -> None:
        if slots < 1 or history < 1 or longest_program < 1 or any(d < 1 for d in shape):
            raise ArgumentError(f"{slots} slots of shape {shape} with {history} history", expected="positive sizes")
        self.device = torch.device(device)
        self.shape, self.history_slots, self.longest_program = shape, history, longest_program
        make: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self.latent = torch.zeros((slots, *shape), **make)
        self.history = torch.zeros((slots, history, *shape), **make)
        self.noise = torch.zeros((slots, *shape), **make)
        self._held = torch.zeros((slots, *shape), **make)
        self._mask = torch.ones((slots, 1, *shape[1:]), **make)
        self._kept_latent = torch.zeros((slots, *shape), **make)
        self._kept_noise = torch.zeros((slots, *shape), **make)
        self.position = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._scalars = torch.zeros((slots, longest_program, len(_SCALARS)), **make)
        self._b = torch.zeros((slots, longest_program, history), **make)
        self._write = torch.zeros((slots, longest_program), dtype=torch.int64, device=self.device)
        self._finish = torch.ones(slots, **make)
        self.max_draws = max_draws
        self.draws = torch.zeros((slots, max_draws, *shape), **make) if max_draws else None
        self._draw_at = torch.zeros((slots, longest_program), dtype=torch.int64, device=self.device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What an update reads or moves on: latents, history, noise held, and where each slot is."""
        return self.latent, self.history, self.noise, self._held, self.position

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """All of its memory: the state and its tables."""
        tables = (self._scalars, self._b, self._write, self._finish, self._draw_at)
        kept = (self._mask, self._kept_latent, self._kept_noise)
        return (*self.tensors, *tables, *kept, *(() if self.draws is None else (self.draws,)))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers)

    def grown(self, longest_program: int, draws: int) -> TorchSlotState:
        """A state with room for longer programs, which holds what this one does."""
        slots, history = len(self.latent), self.history_slots
        state = type(self)(
            slots, self.shape, history, longest_program=longest_program, max_draws=draws, device=self.device
        )
        for new, old in zip(state.buffers, self.buffers, strict=True):
            new[tuple(slice(0, n) for n in old.shape)] = old
        return state

    def wipe(self, slot: int) -> None:
        """Forget who was in a slot. A zero coefficient would not silence a NaN, so the memory itself is zeroed."""
        state = (self.latent, self.history, self.noise, self._held, self._kept_latent, self._kept_noise)
        for tensor in (*state, self._scalars, self._b):
            tensor[slot].zero_()
        self._mask[slot].fill_(1.0)
        if self.draws is not None:
            self.draws[slot].zero_()
        for table in (self.position[slot : slot + 1], self._write[slot], self._draw_at[slot]):
            table.zero_()  # an assignment would copy a number from the host, and wait for the stream

    def load(self, slot: int, program: Program, blend: Blend | None = None) -> None:
        """Write a program, and what is blended in after each update, into the slot's tables; it is at position 0."""
        length = program.evaluations
        if length > self.longest_program or program.history > self.history_slots:
            raise ArgumentError(
                f"program {program.sampler!r} with {length} evaluations and {program.history} history slots",
                expected=f"at most {self.longest_program} and {self.history_slots}",
                remedy="Make TorchSlotState with a larger longest_program or history.",
            )
        holds = np.append(program.c_prev[1:] != 0.0, False).astype(np.float64)
        factors = np.zeros((length, 2)) if blend is None else blend.factors
        columns = [*(getattr(program, name) for name in _OF_PROGRAM), holds, *factors.T]
        upload(self._scalars[slot, :length], _float32(np.stack(columns, axis=1)))
        if blend is not None:
            upload(self._mask[slot], blend.mask)
            upload(self._kept_latent[slot], blend.kept_latent)
            upload(self._kept_noise[slot], blend.kept_noise)
        self._b[slot].zero_()
        upload(self._b[slot, :length, : program.history], _float32(program.b))
        upload(self._write[slot, :length], program.write)
        self._finish[slot : slot + 1].fill_(float(program.state_scale[-1]))
        if self.draws is not None:
            count = int(np.count_nonzero(program.draws))
            if count > self.max_draws:
                raise ArgumentError(
                    f"program {program.sampler!r} draws {count} times",
                    expected=f"at most {self.max_draws}",
                    remedy="Make TorchSlotState with a larger max_draws.",
                )
            latest = np.maximum(np.cumsum(program.draws) - 1, 0)
            upload(self._draw_at[slot, :length], latest.astype(np.int64))
        self.position[slot : slot + 1].zero_()

    def finish(self, slots: torch.Tensor) -> torch.Tensor:
        """float32 [A, *shape]: the results of these slots, in diffusers' latent coordinates."""
        return self._finish[slots].reshape(-1, *(1,) * len(self.shape)) * self.latent[slots]

    def model_input(self, slots: torch.Tensor, out: torch.Tensor, timestep: torch.Tensor) -> None:
        """Write the network's input of these slots into `out` [A, *shape], and what it is fed as timestep [A].

        slots: int64 [A] on the device. Both buffers are of the engine's own float types.
        """
        factors = self._factors(slots)
        out.copy_(factors("input_scale") * self.latent[slots])  # in_i = input_scale x
        timestep.copy_(factors("timesteps").reshape(-1))

    def step(
        self,
        out: torch.Tensor,
        rows_of: torch.Tensor,
        weights: torch.Tensor,
        slots: torch.Tensor,
        *,
        x0: torch.Tensor | None = None,
        blends: bool = False,
    ) -> None:
        """Guidance over the network's rows `out` [R, *shape], then `advance`; x0 [A, *shape], if given, gets previews.

        rows_of: int64 [A, 2] and weights: float32 [A, 2] say from which rows, with which factors, a slot's output is.
        """
        first, second = out[rows_of[:, 0]].float(), out[rows_of[:, 1]].float()
        factors = (-1, *(1,) * (out.ndim - 1))
        # u + g (c - u) = (1 - g) u + g c
        outputs = weights[:, 0].reshape(factors) * first + weights[:, 1].reshape(factors) * second
        if x0 is not None:
            x0.copy_(self.preview(slots, outputs))
        self.advance(slots, outputs, blends=blends)

    def preview(self, slots: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """float32 [A, *shape]: x0 as these slots' outputs imply it. Call it before `advance`."""
        factors = self._factors(slots)
        # x0 = x0_x x + x0_out out
        return factors("x0_x") * self.latent[slots] + factors("x0_out") * outputs.float()

    def advance(self, slots: torch.Tensor, outputs: torch.Tensor, *, blends: bool = False) -> None:
        """Apply the coefficients at each slot's own position, given outputs [A, *shape] of the network, and move on.

        slots: int64 [A] on the device, no slot twice. blends: whether any of them keeps something of a picture.
        """
        position, factors = self.position[slots], self._factors(slots)
        x, previous = self.latent[slots], self._held[slots]
        noise = self.noise[slots] if self.draws is None else self.draws[slots, self._draw_at[slots, position]]
        # H[write] = h_x x + h_out out
        kept = factors("h_x") * x + factors("h_out") * outputs.float()
        self.history[slots, self._write[slots, position]] = kept
        b = self._b[slots, position]
        weights = b.reshape(*b.shape, *(1,) * len(self.shape))
        past = torch.where(weights == 0.0, torch.zeros_like(kept)[:, None], self.history[slots])
        # x' = a x + sum_k b[k] H[k] + c n_i + c_prev n_{i-1}
        x = factors("a") * x + (weights * past).sum(dim=1)
        x = x + factors("c") * noise + factors("c_prev") * previous
        if blends:
            # m x' + f_z (1 - m) z + f_n (1 - m) n
            x = self._mask[slots] * x + factors("kept_latent") * self._kept_latent[slots]
            x = x + factors("kept_noise") * self._kept_noise[slots]
        self.latent[slots] = x
        self._held[slots] = torch.where(factors("holds") != 0.0, noise, previous)
        self.position[slots] = torch.clamp(position + 1, max=self.longest_program - 1)

    def _factors(self, slots: torch.Tensor) -> Callable[[str], torch.Tensor]:
        """The coefficients at each slot's position, gathered once: by name, [A, 1, 1, ...]."""
        values = self._scalars[slots, self.position[slots]]
        ones = (1,) * len(self.shape)
        return lambda name: values[:, COLUMN[name]].reshape(-1, *ones)


def _float32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(values, np.float32)
