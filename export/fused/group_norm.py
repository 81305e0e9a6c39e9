"""Group normalisation fused with the SiLU behind it, in the modules of a diffusers model."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from .group_norm_kernel import group_norm


class FusedGroupNorm(nn.Module):
    """`nn.GroupNorm` with its parameters under its names, and SiLU after it where `silu` is set."""

    def __init__(self, norm: nn.GroupNorm, *, silu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = group_norm(x, self.weight, self.bias, self.groups, self.eps, self.silu)
        return out


class SiluOfVectors(nn.Module):
    """What is left of a block's SiLU whose pictures had it with their norm: that of the time embedding [R, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x) if x.ndim == 2 else x


def fuse_group_norms(model: nn.Module) -> int:
    """Replace each group norm of a model, with the SiLU that its block applies to it; returns how many were replaced.

    Blocks that do anything between the two (`scale_shift`), or use another activation, keep theirs.
    """
    fused = 0
    for module in list(model.modules()):
        pairs = _norms_before_silu(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.GroupNorm and child.affine:
                setattr(module, name, FusedGroupNorm(child, silu=name in pairs))
                fused += 1
        if "norm1" in pairs:
            module.nonlinearity = SiluOfVectors()
        elif "conv_norm_out" in pairs:
            module.conv_act = nn.Identity()
    return fused


def _norms_before_silu(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's norms that nothing but SiLU follows, where all of them are such."""
    if isinstance(module, ResnetBlock2D):
        plain = module.time_embedding_norm != "scale_shift" and isinstance(module.nonlinearity, nn.SiLU)
        return ("norm1", "norm2") if plain else ()
    silu = isinstance(getattr(module, "conv_act", None), nn.SiLU)
    return ("conv_norm_out",) if silu and type(getattr(module, "conv_norm_out", None)) is nn.GroupNorm else ()
