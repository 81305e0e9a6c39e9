"""Fused group norms against torch's own in float64, and in whole models; without a GPU by Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from fewstep.export.fused.group_norm import FusedGroupNorm, fuse_group_norms
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@settings(max_examples=25, deadline=None)
@example(
    pictures=1, groups=32, per_group=2, positions=(1,), dtype=torch.float32, silu=False, last=False, mean=30.0, seed=1
)
@given(
    pictures=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 32]),
    per_group=st.integers(1, 11),
    positions=st.one_of(
        st.tuples(st.integers(1, 37), st.integers(1, 23)),
        st.tuples(st.integers(1, 300)),
    ),
    dtype=st.sampled_from(list(DTYPES)),
    silu=st.booleans(),
    last=st.booleans(),
    mean=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_it_is_torchs_norm(
    pictures: int,
    groups: int,
    per_group: int,
    positions: tuple[int, ...],
    dtype: torch.dtype,
    silu: bool,
    last: bool,
    mean: float,
    seed: int,
) -> None:
    """Any layout, channel counts that are no powers of two, means far from zero."""
    assume(per_group > 1 or sum(positions) > len(positions))  # torch takes no variance of one value
    torch.manual_seed(seed)
    norm = nn.GroupNorm(groups, groups * per_group, eps=1e-5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(pictures, groups * per_group, *positions) + mean).to(dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    half = nn.GroupNorm(groups, groups * per_group, eps=1e-5).to(dtype)
    half.load_state_dict(norm.state_dict())
    norm.load_state_dict({k: v.double() for k, v in half.state_dict().items()})
    with torch.no_grad():
        expected = norm(x.double())
        expected = nn.functional.silu(expected) if silu else expected
        out = FusedGroupNorm(half.to(DEVICE), silu=silu)(x.to(DEVICE)).cpu()
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.movedim(1, -1).is_contiguous()
    largest = float(expected.abs().max())
    # what a group's mean takes of the digits of its deviations: by how much it exceeds them
    members = x.double().reshape(pictures, groups, -1)
    lost = float((members.mean(2).abs() / (members.var(2, correction=0) + norm.eps).sqrt()).max())
    assert float((out.double() - expected).abs().max()) <= DTYPES[dtype] * (1 + lost) * max(1.0, largest)


def test_a_picture_of_more_positions_than_tiles_hold_at_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 130, 131).to(memory_format=torch.channels_last)
    norm = nn.GroupNorm(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(FusedGroupNorm(norm.to(DEVICE))(x.to(DEVICE)).cpu(), norm.cpu()(x))


def random_model(config: dict[str, object], kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = kind(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


UNET = {
    "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip
VAE = {
    "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


@pytest.mark.parametrize("act_fn", ["silu", "gelu"])
@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_unets_give_what_they_gave(shift: str, act_fn: str) -> None:
    model = random_model({**UNET, "resnet_time_scale_shift": shift, "act_fn": act_fn}, UNet2DConditionModel)
    given_ = torch.randn(2, 4, 8, 12), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 16)
    before = model(*given_, return_dict=False)[0]
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    names = set(model.state_dict())
    assert fuse_group_norms(model) == norms > 20
    assert set(model.state_dict()) == names, "weights keep their names"
    model = model.to(DEVICE, memory_format=torch.channels_last)
    after = model(*(t.to(DEVICE) for t in given_), return_dict=False)[0].cpu()
    assert float((after - before).abs().max() / before.abs().max()) < 2e-5
    activations = sum(type(m) is nn.SiLU for m in model.modules())
    assert activations == (0 if act_fn == "gelu" else activations)
    if (shift, act_fn) == ("default", "silu"):
        assert activations == 1, "that of the time embedding is left"


def test_autoencoders_give_what_they_gave() -> None:
    model = random_model(VAE, AutoencoderKL)
    picture, latent = torch.randn(1, 3, 16, 24), torch.randn(2, 4, 8, 12)
    before = model.encode(picture).latent_dist.mean, model.decode(latent).sample
    fuse_group_norms(model)
    assert [n for n, m in model.named_modules() if type(m) in (nn.GroupNorm, nn.SiLU)] == []
    model = model.to(DEVICE, memory_format=torch.channels_last)
    after = model.encode(picture.to(DEVICE)).latent_dist.mean.cpu(), model.decode(latent.to(DEVICE)).sample.cpu()
    for a, b in zip(after, before, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 2e-5
