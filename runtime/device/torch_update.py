"""The update of slots by their programs, in torch, for a device.

Every slot's coefficients lie in tables on the device, so one call serves slots with different samplers, step counts and
histories, with no host synchronisation and no Python loop over slots: it can be captured in a CUDA graph, and another
program is another table. It has been run on CPU tensors against the NumPy kernels, not on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...errors import ArgumentError
from ...schedules import Program
from ..arrays import Float32
from ..pictures.inpaint import Blend
from .torch_records import Fields, Records

_OF_PROGRAM = ("input_scale", "timesteps", "h_x", "h_out", "a", "c", "c_prev", "x0_x", "x0_out")
_SCALARS = (*_OF_PROGRAM, "holds", "kept_latent", "kept_noise", "limit", "ratio", "clip_h", "clip_x", "spread")
COLUMN = {name: column for column, name in enumerate(_SCALARS)}


class Extras(NamedTuple):
    """What an update does beside the rows of programs, for any of its slots: x0 is written out (`previews`), something
    of a picture is blended in (`blends`), x0 is clipped (`clips`), to bounds of the images' own (`thresholds`), and
    noise is spread by the network's variance (`spreads`)."""

    previews: bool = False
    blends: bool = False
    clips: bool = False
    thresholds: bool = False
    spreads: bool = False


NOTHING = Extras()


class TorchSlotState:
    """The sampling state of S slots on a device.

    latent: float32 [S, *shape]; history: float32 [S, K, *shape], on `device`. Programs of up to `longest_program`
    evaluations are loaded into slots; `position` int64 [S] says which evaluation of its own each is at, and only
    `advance` moves it. `draws` float32 [S, D, *shape] holds all the noise of each slot's program, and each position
    takes its own. What inpainting keeps of a picture: mask float32 [S, 1, h, w], kept_latent, kept_noise float32
    [S, *shape]. All that an image brings lies in records by slot, so that it comes in one upload, in two more where it
    draws or keeps something.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...],
        history: int,
        *,
        longest_program: int = 64,
        max_draws: int = 1,
        device: str | torch.device = "cuda",
    ) -> None:
        if min(slots, history, longest_program, max_draws, *shape) < 1:
            raise ArgumentError(f"{slots} slots of shape {shape} with {history} history", expected="positive sizes")
        self.device = torch.device(device)
        self.shape, self.history_slots, self.longest_program = shape, history, longest_program
        self.max_draws = max_draws
        of_steps: Fields = {
            "position": (np.int64, ()),
            "finish": (np.float32, ()),
            "scalars": (np.float32, (longest_program, len(_SCALARS))),
            "b": (np.float32, (longest_program, history)),
            "write": (np.int64, (longest_program,)),
            "draw_at": (np.int64, (longest_program,)),
            "latent": (np.float32, shape),
        }
        self.own = Records(slots, of_steps, self.device)
        self._drawn = Records(slots, {"draws": (np.float32, (max_draws, *shape))}, self.device)
        kept = dict.fromkeys(("kept_latent", "kept_noise"), (np.float32, shape))
        self.kept = Records(slots, {"mask": (np.float32, (1, *shape[1:])), **kept}, self.device)
        self.position, self.latent = self.own.on_device["position"], self.own.on_device["latent"]
        self.draws = self._drawn.on_device["draws"]
        self._finish, self._scalars, self._b, self._write, self._draw_at = (
            self.own.on_device[n] for n in ("finish", "scalars", "b", "write", "draw_at")
        )
        self._mask, self._kept_latent, self._kept_noise = (
            self.kept.on_device[n] for n in ("mask", "kept_latent", "kept_noise")
        )
        self._mask.fill_(1.0)
        self.work = torch.zeros((slots, history + 1, *shape), dtype=torch.float32, device=self.device)
        self.history, self._held = self.work[:, :history], self.work[:, history]
        self._drawing: set[int] = set()
        self._keeping: set[int] = set()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What an update reads or moves on: latents, history and noise held, and where each slot is."""
        return self.latent, self.work, self.position

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """All of its memory: the state and its tables."""
        return self.own.block, self._drawn.block, self.kept.block, self.work

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers)

    def grown(self, longest_program: int, draws: int) -> TorchSlotState:
        """A state with room for longer programs, which holds what this one does."""
        self.flush()
        slots, history = len(self.latent), self.history_slots
        state = type(self)(
            slots, self.shape, history, longest_program=longest_program, max_draws=draws, device=self.device
        )
        for mine, other in ((self.own, state.own), (self._drawn, state._drawn), (self.kept, state.kept)):
            for name, old in mine.on_device.items():
                other.on_device[name][tuple(slice(0, n) for n in old.shape)] = old
        state.work.copy_(self.work)
        state._drawing, state._keeping = set(self._drawing), set(self._keeping)
        return state

    def wipe(self, slot: int) -> None:
        """Forget who was in a slot. A zero coefficient would not silence a NaN, so the memory itself is zeroed."""
        self.own.forget(slot)
        self.work[slot].zero_()
        if slot in self._drawing:
            self._drawn.forget(slot)
            self._drawing.discard(slot)
        if slot in self._keeping:
            self.kept.forget(slot)
            self._mask[slot].fill_(1.0)
            self._keeping.discard(slot)

    def load(
        self, slot: int, program: Program, start: Float32, draws: Sequence[Float32] = (), blend: Blend | None = None
    ) -> None:
        """Write an image into a wiped slot's records: where it starts, its program's tables, its noise [D, *shape] in
        the order in which it is drawn, and what is blended in after each update. `flush` sends it.
        """
        length = program.evaluations
        if length > self.longest_program or program.history > self.history_slots:
            raise ArgumentError(
                f"program {program.sampler!r} with {length} evaluations and {program.history} history slots",
                expected=f"at most {self.longest_program} and {self.history_slots}",
                remedy="Make TorchSlotState with a larger longest_program or history.",
            )
        count = int(np.count_nonzero(program.draws))
        if count > self.max_draws or count != len(draws):
            raise ArgumentError(
                f"program {program.sampler!r} draws {count} times and is given {len(draws)} draws",
                expected=f"as many, and at most {self.max_draws}",
                remedy="Make TorchSlotState with a larger max_draws.",
            )
        holds = np.append(program.c_prev[1:] != 0.0, False).astype(np.float64)
        factors = np.zeros((length, 2)) if blend is None else blend.factors
        columns = [*(getattr(program, name) for name in _OF_PROGRAM), holds, *factors.T, *_additions(program)]
        own = self.own.of(slot)
        for table in own.values():
            table[...] = 0
        own["finish"][...] = program.state_scale[-1]
        own["scalars"][:length] = np.stack(columns, axis=1)
        own["b"][:length, : program.history] = program.b
        own["write"][:length] = program.write
        own["draw_at"][:length] = np.maximum(np.cumsum(program.draws) - 1, 0)
        own["latent"][...] = start
        if count:
            drawn = self._drawn.of(slot)["draws"]
            drawn[:count], drawn[count:] = draws, 0.0
            self._drawing.add(slot)
        if blend is not None:
            kept = self.kept.of(slot)
            kept["mask"][...], kept["kept_latent"][...] = blend.mask, blend.kept_latent
            kept["kept_noise"][...] = blend.kept_noise
            self._keeping.add(slot)

    def flush(self) -> None:
        """Send what was loaded since the last time to the device."""
        for records in (self.own, self._drawn, self.kept):
            records.flush()

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
        x0: torch.Tensor,
        extras: Extras,
        variance: torch.Tensor | None = None,
    ) -> None:
        """Guidance over the network's rows `out` [R, *shape], then `advance`; x0 [A, *shape] gets previews, if any.

        rows_of: int64 [A, 2] and weights: float32 [A, 2] say from which rows, with which factors, a slot's output is;
        weights float32 [A, 2, F] say the factors by frame. variance: what the network says of it, [R, *shape], of which
        a slot takes its last row's.
        """
        outputs = self._guided(out, rows_of, weights)
        if extras.previews:
            x0.copy_(self.preview(slots, outputs))
        self.advance(slots, outputs, extras, None if variance is None else variance[rows_of[:, 1]].float())

    @staticmethod
    def _guided(out: torch.Tensor, rows_of: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One output a slot, float32 [A, *shape]."""
        first, second = out[rows_of[:, 0]].float(), out[rows_of[:, 1]].float()
        factors = weights.reshape(*weights.shape, *(1,) * (out.ndim + 1 - weights.ndim))
        # u + g (c - u) = (1 - g) u + g c
        return factors[:, 0] * first + factors[:, 1] * second

    def preview(self, slots: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """float32 [A, *shape]: x0 as these slots' outputs imply it, clipped where that is done. Before `advance`."""
        factors = self._factors(slots)
        x0 = self._x0(factors, self.latent[slots], outputs.float())
        return _clipped(x0, factors("limit"), *image_bounds(x0, factors, thresholds=True))

    def advance(
        self,
        slots: torch.Tensor,
        outputs: torch.Tensor,
        extras: Extras = NOTHING,
        variance: torch.Tensor | None = None,
    ) -> None:
        """Apply the coefficients at each slot's own position, given outputs [A, *shape] of the network, and move on.

        slots: int64 [A] on the device, no slot twice. variance: float32 [A, *shape], where it spreads any slot's noise.
        """
        position, factors = self.position[slots], self._factors(slots)
        x, previous, outputs = self.latent[slots], self._held[slots], outputs.float()
        noise = self.draws[slots, self._draw_at[slots, position]]
        if extras.spreads and variance is not None:
            log = factors("spread")  # n exp(log v); of slots whose noise is not spread, v may be anything
            noise = noise * torch.exp(torch.where(log != 0.0, log * variance, torch.zeros_like(variance)))
        # H[write] = h_x x + h_out out
        kept = factors("h_x") * x + factors("h_out") * outputs
        change: torch.Tensor | None = None
        if extras.clips:
            x0 = self._x0(factors, x, outputs)
            change = _clipped(x0, factors("limit"), *image_bounds(x0, factors, thresholds=extras.thresholds)) - x0
            kept = kept + factors("clip_h") * change  # + h d
        self.history[slots, self._write[slots, position]] = kept
        b = self._b[slots, position]
        weights = b.reshape(*b.shape, *(1,) * len(self.shape))
        past = torch.where(weights == 0.0, torch.zeros_like(kept)[:, None], self.history[slots])
        # x' = a x + sum_k b[k] H[k] + c n_i + c_prev n_{i-1}
        x = factors("a") * x + (weights * past).sum(dim=1)
        x = x + factors("c") * noise + factors("c_prev") * previous
        if change is not None:
            x = x + factors("clip_x") * change  # + x d
        if extras.blends:
            # m x' + f_z (1 - m) z + f_n (1 - m) n
            x = self._mask[slots] * x + factors("kept_latent") * self._kept_latent[slots]
            x = x + factors("kept_noise") * self._kept_noise[slots]
        self.latent[slots] = x
        self._held[slots] = torch.where(factors("holds") != 0.0, noise, previous)
        self.position[slots] = torch.clamp(position + 1, max=self.longest_program - 1)

    @staticmethod
    def _x0(factors: Callable[[str], torch.Tensor], x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """x0 = x0_x x + x0_out out."""
        return factors("x0_x") * x + factors("x0_out") * outputs

    def _factors(self, slots: torch.Tensor) -> Callable[[str], torch.Tensor]:
        """The coefficients at each slot's position, gathered once: by name, [A, 1, 1, ...]."""
        values = self._scalars[slots, self.position[slots]]
        ones = (1,) * len(self.shape)
        return lambda name: values[:, COLUMN[name]].reshape(-1, *ones)


def _additions(program: Program) -> npt.NDArray[np.float64]:
    """float64 [5, n]: limit, ratio, clip_h, clip_x and spread; a ratio below 0 stands for none."""
    clip, length = program.clip, program.evaluations
    rows = np.zeros((5, length))
    if clip is not None:
        rows[0], rows[1] = clip.bound.limit, -1.0 if clip.bound.ratio is None else clip.bound.ratio
        rows[2], rows[3] = clip.h, clip.x
    if program.spread is not None:
        rows[4] = program.spread.log
    return rows


def image_bounds(
    x0: torch.Tensor, factors: Callable[[str], torch.Tensor], *, thresholds: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each image's x0 [A, *shape] may reach, and what is then divided by, as `Bound` says: [A, 1, ...] each.

    thresholds: whether any of the images has a bound of its own.
    """
    limit, ratio = factors("limit"), factors("ratio")
    if not thresholds:
        return limit, torch.ones_like(limit)
    ordered = x0.abs().flatten(1).sort(dim=1).values
    place = ratio.reshape(-1, 1).clamp(min=0.0) * (ordered.shape[1] - 1)  # as torch.quantile has it, in float32
    low = place.floor()
    below, above = ordered.gather(1, low.long()), ordered.gather(1, place.ceil().long())
    s = torch.lerp(below, above, place - low).reshape(limit.shape)
    s = torch.minimum(s.clamp(min=1.0), limit)  # s = min(max(quantile(|x0|, ratio), 1), limit)
    return torch.where(ratio >= 0.0, s, limit), torch.where((ratio >= 0.0) & (limit > 0.0), s, torch.ones_like(s))


def _clipped(x0: torch.Tensor, limit: torch.Tensor, bound: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """x0 as it is where the limit is 0, which stands for no clipping."""
    return torch.where(limit > 0.0, torch.clamp(x0, -bound, bound) / divisor, x0)
