"""Every shortcut of the networks equals what it stands for, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from official import SMALL, fill_by_name
from torch import Tensor

from minimti.networks.attention import FEW_SCORES, CrossAttention, SelfAttention, SelfAttentionOverTime
from minimti.networks.layers import Conv3x3, ConvOverTime, clips_of, frames_of
from minimti.networks.unet import UNet
from minimti.svd import SVD, Conditioning


def close(ours: Tensor, plain: Tensor) -> bool:
    return torch.allclose(ours, plain, rtol=0, atol=1e-12)


def attention(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """Paper equation 4, head by head; [L, dim], [N, dim], [N, dim] -> [L, dim]."""
    heads = zip(*(t.split(head_dim, dim=-1) for t in (q, k, v)))
    return torch.cat([(q @ k.T / head_dim**0.5).softmax(-1) @ v for q, k, v in heads], dim=-1)


@given(sets=st.integers(1, 3), num_tokens=st.integers(1, 6), heads=st.integers(1, 3), positions=st.integers(1, 5))
def test_projections_applied_to_the_tokens(sets, num_tokens, heads, positions):
    """Both directions: what comes out, and the gradient of the tokens. A single token takes the way past Q and K."""
    layer = CrossAttention(8 * heads, 6, head_dim=8).double()
    x = torch.randn(sets, positions, 8 * heads, dtype=torch.float64)
    tokens = torch.randn(sets, num_tokens, 6, dtype=torch.float64, requires_grad=True)
    ours = layer(x, *layer.absorb(tokens)).expand(x.shape)
    rows = zip(layer.to_q(x), layer.to_k(tokens), layer.to_v(tokens))
    plain = layer.to_out(torch.stack([attention(*row, head_dim=8) for row in rows]))
    assert close(ours, plain)
    weight = torch.randn_like(plain)
    assert close(*(torch.autograd.grad((out * weight).sum(), tokens)[0] for out in (ours, plain)))


@pytest.mark.parametrize("few_scores", [0, FEW_SCORES])
@torch.no_grad()
@given(batch=st.integers(1, 2), num_frames=st.integers(1, 5), positions=st.integers(1, 4))
def test_self_attention_of_either_kind_fused_or_not(few_scores, batch, num_frames, positions):
    """Among the positions of a frame, and among the frames of a position."""
    over_space, over_time = (kind(16, head_dim=8).double() for kind in (SelfAttention, SelfAttentionOverTime))
    x = torch.randn(batch, num_frames, positions, 16, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimti.networks.attention.FEW_SCORES", few_scores)
        spatial, temporal = (layer(x.flatten(0, 1), num_frames).view(x.shape) for layer in (over_space, over_time))
    for b in range(batch):
        for f in range(num_frames):
            assert close(spatial[b, f], alone(over_space, x[b, f]))
        for i in range(positions):
            assert close(temporal[b, :, i], alone(over_time, x[b, :, i]))


def alone(layer: SelfAttention, x: Tensor) -> Tensor:
    """[L, dim], one sequence."""
    return layer.to_out(attention(layer.to_q(x), layer.to_k(x), layer.to_v(x), layer.head_dim))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch, height, width", [(1, 1, 1), (2, 2, 3), (3, 4, 4), (2, 7, 5)])
def test_a_convolution_of_few_positions_is_a_product(batch, height, width, memory_format):
    """On either side of the bound, with the gradients of input, weight and bias; and in its memory format."""
    layer = Conv3x3(60, 8).double()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.to(memory_format=memory_format))
    plain = torch.randn(batch, 60, height, width, dtype=torch.float64, requires_grad=True)
    x = plain.detach().to(memory_format=memory_format).requires_grad_()
    wanted, ours = F.conv2d(plain, layer.weight, layer.bias, padding=1), layer(x)
    assert close(ours, wanted)
    direction = torch.randn_like(wanted)
    ours_back = torch.autograd.grad(ours, (x, layer.weight, layer.bias), direction)
    wanted_back = torch.autograd.grad(wanted, (plain, layer.weight, layer.bias), direction)
    assert all(map(close, ours_back, wanted_back))


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_over_time_is_the_official_one(memory_format):
    layer = ConvOverTime(6, 4).double()
    x = torch.randn(2 * 5, 6, 3, 7, dtype=torch.float64).to(memory_format=memory_format)
    ours = frames_of(layer(clips_of(x, num_frames=5)), height=3)
    clips = x.unflatten(0, (2, 5)).transpose(1, 2)
    plain = F.conv3d(clips, layer.weight, layer.bias, padding=(1, 0, 0))
    assert close(ours, plain.transpose(1, 2).flatten(0, 1))


def test_with_channels_innermost_a_clip_is_a_view():
    x = torch.randn(6, 4, 3, 7).to(memory_format=torch.channels_last)
    clips = clips_of(x, num_frames=3)
    assert clips.data_ptr() == x.data_ptr() and clips.is_contiguous(memory_format=torch.channels_last)
    assert frames_of(clips, height=3).stride() == x.stride()


@pytest.fixture(scope="module")
def svd() -> SVD:
    with torch.device("meta"):
        svd = SVD(SMALL)
    fill_by_name(svd.unet, SMALL, "unet.", torch.float64)
    return svd


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_zeroed_tokens_are_no_tokens(svd, num_tokens):
    """In a batch behind clips without tokens, alone, and as the zeros that they officially are."""
    x = torch.randn(2, 3, 8, 8, 8, dtype=torch.float64)
    spatial = torch.randn(1, 3, num_tokens, 48, dtype=torch.float64)
    temporal = torch.randn(1, num_tokens, 48, dtype=torch.float64)

    def run(x: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        c_noise, micro = torch.zeros(len(x)), torch.tensor([[6, 127, 0.02]]).expand(len(x), 3)
        return svd.unet(x, c_noise, micro, svd.unet.absorb(spatial, temporal))

    zeros = [torch.cat([torch.zeros_like(tokens), tokens]) for tokens in (spatial, temporal)]
    official = run(x, *zeros)
    assert close(run(x, spatial, temporal), official)
    assert close(run(x[:1], spatial[:0], temporal[:0]), official[:1])


@torch.no_grad()
def test_constant_tokens_are_absorbed_once(svd, monkeypatch):
    """Not once per step: twenty-five steps of guidance ask for them a single time."""
    absorbed, evaluated = [], []
    absorb, forward = UNet.absorb, UNet.forward
    monkeypatch.setattr(UNet, "absorb", lambda unet, *tokens: absorbed.append(1) or absorb(unet, *tokens))
    monkeypatch.setattr(UNet, "forward", lambda unet, *args: evaluated.append(1) or forward(unet, *args))
    image = torch.zeros(1, 2, 4, 8, 8, dtype=torch.float64)
    tokens = torch.randn(1, 2, 3, 48, dtype=torch.float64)
    cond = Conditioning(image, torch.tensor([[6, 127, 0.02]]), tokens, tokens[:, 0])
    list(svd.sample(cond, torch.randn_like(image), 4, (1.0, 3.0)))
    assert (len(absorbed), len(evaluated)) == (1, 4)
