"""What every training stage shares: one-thread workers with averaged gradients, resumable state, EMA."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Trainer:
    """AdamW with a cosine rate over wall-clock progress, averaged gradients, EMA, and a checkpoint every minute.

    Progress is `max(steps done / steps, time used / minutes)`, so that a stage ends in the time it was given
    however busy the machine is, and a stage that was killed goes on where it was.
    """

    def __init__(
        self,
        *,
        name: str,
        folder: Path,
        parameters: Iterable[torch.nn.Parameter],
        minutes: float,
        rate: float,
        decay: float = 0.01,
        ema: float = 0.999,
        clip: float = 1.0,
        warmup: int = 200,
    ) -> None:
        self.name, self.folder, self.minutes, self.rate, self.clip, self.warmup = (
            name,
            folder,
            minutes,
            rate,
            clip,
            warmup,
        )
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay, betas=(0.9, 0.99))
        self.ema_decay = ema
        self.ema = [p.detach().clone() for p in self.parameters]
        self.step, self.used = 0, 0.0
        self.averages: dict[str, float] = {}
        self.path = folder / f"{name}.state.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.used = state["step"], state["used"]
            for p, e, value, mean in zip(self.parameters, self.ema, state["parameters"], state["ema"], strict=True):
                p.data.copy_(value)
                e.copy_(mean)
        self.saved = self.started = self.printed = time.monotonic()
        self.base = self.used

    @property
    def progress(self) -> float:
        return min(1.0, self.used / (60 * self.minutes))

    def update(self, loss: torch.Tensor, **shown: float) -> None:
        """One optimiser step on `loss`, averaged over the workers."""
        self.optimiser.zero_grad(set_to_none=False)
        loss.backward()
        flat = torch.cat(
            [p.grad.reshape(-1) if p.grad is not None else torch.zeros(p.numel()) for p in self.parameters]
        )
        clock = torch.tensor([self.base + time.monotonic() - self.started])
        flat = torch.cat([flat, clock])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        self.used = float(flat[-1])
        norm = float(flat[:-1].norm())
        if not math.isfinite(norm):
            return
        flat *= min(1.0, self.clip / (norm + 1e-6))
        at = 0
        for p in self.parameters:
            p.grad = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
        warm = min(1.0, (self.step + 1) / self.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        self.optimiser.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        for key, value in {"loss": loss.item(), **shown}.items():
            self.averages[key] = self.averages.get(key, value) * 0.99 + value * 0.01
        if dist.get_rank() == 0:
            self._report()

    def _report(self) -> None:
        now = time.monotonic()
        if now - self.printed > 20:
            self.printed = now
            values = " ".join(f"{k}={v:.4f}" for k, v in self.averages.items())
            print(f"{self.name} {self.used / 60:6.1f}/{self.minutes:g} min step {self.step} {values}", flush=True)
        if now - self.saved > 60:
            self.saved = now
            self.save()

    def save(self) -> None:
        """Write the state, from the first worker alone: all have the same."""
        if dist.get_rank():
            return
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "used": self.used,
                "parameters": [p.detach() for p in self.parameters],
                "ema": self.ema,
            },
            part,
        )
        part.replace(self.path)

    def use_ema(self) -> None:
        for p, e in zip(self.parameters, self.ema, strict=True):
            p.data.copy_(e)

    @property
    def running(self) -> bool:
        return self.progress < 1.0


def _worker(
    rank: int, size: int, port: int, stage: Callable[[argparse.Namespace], None], options: argparse.Namespace
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    torch.manual_seed(options.seed * 1000 + rank)
    stage(options)
    dist.destroy_process_group()


def launch(stage: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run `stage` in `options.workers` processes of one thread each."""
    mp.spawn(_worker, args=(options.workers, 29500 + os.getpid() % 1000, stage, options), nprocs=options.workers)
