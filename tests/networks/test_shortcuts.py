"""Every shortcut of the networks equals what it stands for, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from official import SMALL, fill_by_name
from torch import Tensor

from minimti.budget import Budget
from minimti.networks.attention import FEW_SCORES, CrossAttention, SelfAttention, SelfAttentionOverTime, num_parts
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
def test_cross_attention_is_equation_4(sets, num_tokens, heads, positions):
    """The output, and the gradient with respect to the tokens; with one token there is no softmax to compute."""
    layer = CrossAttention(8 * heads, 6, head_dim=8).double()
    x = torch.randn(sets, positions, 8 * heads, dtype=torch.float64)
    tokens = torch.randn(sets, num_tokens, 6, dtype=torch.float64, requires_grad=True)
    ours = layer(x, *layer.keys_values(tokens)).expand(x.shape)
    rows = zip(layer.to_q(x), layer.to_k(tokens), layer.to_v(tokens))
    plain = layer.to_out(torch.stack([attention(*row, head_dim=8) for row in rows]))
    assert close(ours, plain)
    weight = torch.randn_like(plain)
    assert close(*(torch.autograd.grad((out * weight).sum(), tokens)[0] for out in (ours, plain)))


@torch.no_grad()
@pytest.mark.parametrize("positions, parts", [(2048, 2), (3 * 4096, 8), (2047, 1), (100, 1)])
def test_positions_that_attend_in_parts_attend_to_the_tokens_of_their_set(positions, parts):
    layer = CrossAttention(8, 6, head_dim=8).double()
    x, tokens = torch.randn(2, positions, 8, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    rows = zip(layer.to_q(x), layer.to_k(tokens), layer.to_v(tokens))
    plain = layer.to_out(torch.stack([attention(*row, head_dim=8) for row in rows]))
    assert num_parts(positions) == parts
    assert close(layer(x, *layer.keys_values(tokens)), plain)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_fewer_than_two_tokens_give_all_positions_the_same(num_tokens):
    layer = CrossAttention(16, 6, head_dim=8).double()
    tokens = torch.randn(3, num_tokens, 6, dtype=torch.float64)
    out = layer(torch.randn(3, 7, 16, dtype=torch.float64), *layer.keys_values(tokens))
    wanted = layer.to_out(layer.to_v(tokens)) if num_tokens else layer.to_out[0].bias.expand(3, 1, 16)
    assert out.shape == (3, 1, 16) and close(out, wanted)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_no_tokens_are_zeroed_tokens(num_tokens):
    layer = CrossAttention(16, 6, head_dim=8).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    zeros = torch.zeros(3, num_tokens, 6, dtype=torch.float64)
    zeroed, none = (layer(x, *layer.keys_values(tokens)) for tokens in (zeros, zeros[:, :0]))
    assert close(zeroed.expand(x.shape), none.expand(x.shape))


@pytest.mark.parametrize("few_scores", [0, FEW_SCORES])
@torch.no_grad()
@given(batch=st.integers(1, 2), num_frames=st.integers(1, 5), positions=st.integers(1, 4))
def test_self_attention_of_either_kind_fused_or_not(few_scores, batch, num_frames, positions):
    """Among the positions of a frame, and among the frames of a position."""
    over_space, over_time = (kind(16, head_dim=8).double() for kind in (SelfAttention, SelfAttentionOverTime))
    over_space.few_scores = over_time.few_scores = few_scores
    x = torch.randn(batch, num_frames, positions, 16, dtype=torch.float64)
    spatial, temporal = (layer(x.flatten(0, 1), num_frames).view(x.shape) for layer in (over_space, over_time))
    for b in range(batch):
        for f in range(num_frames):
            assert close(spatial[b, f], alone(over_space, x[b, f]))
        for i in range(positions):
            assert close(temporal[b, :, i], alone(over_time, x[b, :, i]))


def alone(layer: SelfAttention, x: Tensor) -> Tensor:
    """One sequence [L, dim] -> the same shape."""
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


def inputs(batch: int, num_tokens: int) -> dict[str, Tensor]:
    """For a small UNet in float64: B clips of 3 frames."""
    return dict(
        x=torch.randn(batch, 3, 8, 8, 8, dtype=torch.float64),
        c_noise=torch.randn(batch),
        micro=torch.tensor([[6, 127, 0.02]]).expand(batch, 3),
        spatial=torch.randn(batch, 3, num_tokens, 48, dtype=torch.float64),
        temporal=torch.randn(batch, num_tokens, 48, dtype=torch.float64),
    )


def run(unet: UNet, x: Tensor, c_noise: Tensor, micro: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    return unet(x, c_noise, micro, unet.project_tokens(spatial, temporal))


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_network_without_tokens_is_one_with_zeroed_tokens(svd, num_tokens):
    """Alone, and in the batch of guidance, where the other clip has tokens."""
    both = inputs(2, num_tokens)
    both["spatial"][0], both["temporal"][0] = 0, 0
    first = {name: tensor[:1] for name, tensor in both.items()}
    none = {**first, "spatial": first["spatial"][:, :, :0], "temporal": first["temporal"][:, :0]}
    assert close(run(svd.unet, **none), run(svd.unet, **both)[:1])
    assert close(run(svd.unet, **none), run(svd.unet, **first))


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_sums_in_place_change_nothing(svd, num_tokens):
    """Without gradients, layers write their results over tensors that they own; no input may be among these."""
    given = inputs(2, num_tokens)
    before = {name: tensor.clone() for name, tensor in given.items()}
    with torch.no_grad():
        in_place = [run(svd.unet, **given) for _ in range(2)]
    apart = run(svd.unet, **given)
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert torch.equal(*in_place) and close(in_place[0], apart)


def test_contexts_of_other_clips_are_refused(svd):
    two = inputs(2, num_tokens=3)
    with pytest.raises(ValueError, match="spatial tokens are for 1 clips, temporal tokens for 2"):
        svd.unet.project_tokens(two["spatial"][:1], two["temporal"])
    one = svd.unet.project_tokens(two["spatial"][:1], two["temporal"][:1])
    with pytest.raises(ValueError, match="3 spatial and 1 temporal sets of tokens do not fit 2 clips of 3 frames"):
        svd.unet(two["x"], two["c_noise"], two["micro"], one)
    three_of_two_frames = torch.randn(3, 2, 3, 48), torch.randn(3, 3, 48)
    with pytest.raises(ValueError, match="6 spatial and 3 temporal sets of tokens do not fit 2 clips of 3 frames"):
        svd.unet(two["x"], two["c_noise"], two["micro"], svd.unet.project_tokens(*three_of_two_frames))


@torch.no_grad()
@pytest.mark.parametrize("in_turn", [False, True])
def test_tokens_are_projected_once_per_sampling_run(svd, monkeypatch, in_turn):
    """Once per run for each branch that is evaluated by itself, however many steps there are."""
    calls = []
    project_tokens, forward = UNet.project_tokens, UNet.forward
    monkeypatch.setattr(UNet, "project_tokens", lambda *args: calls.append("tokens") or project_tokens(*args))
    monkeypatch.setattr(UNet, "forward", lambda *args: calls.append("network") or forward(*args))
    image = torch.zeros(1, 2, 4, 8, 8, dtype=torch.float64)
    tokens = torch.randn(1, 2, 3, 48, dtype=torch.float64)
    cond = Conditioning(image, torch.tensor([[6, 127, 0.02]]), tokens, tokens[:, 0])
    monkeypatch.setattr(svd, "budget", Budget(in_turn=in_turn))
    list(svd.sample(cond, torch.randn_like(image), 4, (1.0, 3.0)))
    branches = 2 if in_turn else 1
    assert calls == ["tokens"] * branches + ["network"] * branches * 4
