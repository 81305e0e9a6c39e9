"""Networks that look at a picture beside a UNet, in one graph with it: what they add to it, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import nn
from torch.nn import functional

from ...families.control import controls_of, is_t2i, is_xl, picture_input, scale_input


class ControlledUNet(nn.Module):
    """A UNet and what is beside it: what `build_model` gives where a configuration has any of it.

    controls: ControlNets by name. ip_adapter: an IP-Adapter's layers by their numbers.
    """

    def __init__(
        self,
        model: UNet2DConditionModel,
        controls: Mapping[str, nn.Module],
        ip_adapter: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.controls = nn.ModuleDict(controls)
        self.ip_adapter = nn.ModuleDict(ip_adapter or {})


def build_controls(config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The networks beside a UNet of this configuration, with whatever parameters their constructors give them."""
    return {name: build_control(own) for name, own in controls_of(config).items()}


def build_control(config: Mapping[str, Any]) -> nn.Module:
    cls: Any = T2IAdapter if is_t2i(config) else ControlNetModel
    made = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()
    if is_xl(config):
        made.adapter.unshuffle = CellPairs(int(config["downscale_factor"]))
    return made


class CellPairs(nn.Module):
    """`PixelUnshuffle` of a factor that is two latent cells, for pictures of any number of cells.

    A view would need a height that the factor divides, which `height * 8` does not say of itself. A convolution by
    unit vectors copies the same pixels, and with a cell more below and at the right it gives ceil(height / 2) as the
    UNet's own halving does: (8 h + 8 - 16) // 16 + 1 = (h - 1) // 2 + 1. Of an even number none of that cell is read.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        factor, channels, cell = self.factor, picture.shape[1], self.factor // 2
        unit = torch.eye(factor * factor, dtype=picture.dtype, device=picture.device)
        kernels = unit.reshape(-1, 1, factor, factor).repeat(channels, 1, 1, 1)
        return functional.conv2d(functional.pad(picture, (0, cell, 0, cell)), kernels, stride=factor, groups=channels)


def control_arguments(
    controls: Mapping[str, nn.Module],
    sample: torch.Tensor,
    timestep: torch.Tensor,
    told: Mapping[str, Any],
    conditions: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """What ControlNets and T2I adapters have a UNet add, the sum of theirs, as its arguments.

    ControlNets add to its skip connections and its middle, T2I adapters to each level on the way down. told: the UNet's
    own arguments. conditions: pictures [R, C, H, W] and factors [R, N] by input.
    """
    shared = {k: v for k, v in told.items() if k in ("encoder_hidden_states", "added_cond_kwargs")}
    sums: dict[bool, list[torch.Tensor]] = {}
    for name, network in controls.items():
        picture, factors = (conditions[n(name)].to(sample.dtype) for n in (picture_input, scale_input))
        levels = isinstance(network, T2IAdapter)
        if levels:
            made = network(picture)
        else:
            down, middle = network(sample, timestep, controlnet_cond=picture, **shared, return_dict=False)
            made = (*down, middle)
        scaled = [r * factors[:, i].reshape(-1, 1, 1, 1) for i, r in enumerate(made)]
        sums[levels] = [a + b for a, b in zip(sums[levels], scaled, strict=True)] if levels in sums else scaled
    arguments: dict[str, Any] = {}
    if False in sums:
        arguments["down_block_additional_residuals"] = tuple(sums[False][:-1])
        arguments["mid_block_additional_residual"] = sums[False][-1]
    if True in sums:
        arguments["down_intrablock_additional_residuals"] = list(sums[True])
    return arguments
