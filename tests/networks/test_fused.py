"""The fused operators equal PyTorch's layers: in Triton's interpreter where there is no GPU, else on the GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from official import SMALLER, fill_by_name
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minimti.networks import fused
from minimti.networks.attention import GEGLU
from minimti.networks.layers import GroupNorm
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE

triton_kernels = pytest.importorskip("minimti.networks.triton_kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the norm. Triton's interpreter cuts a result to 8 bits for bf16, where a GPU rounds it.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 6e-4}

# [N, C, ..., ...] and groups: odd channels, one row, rows of several parts, the shape of layers over time
SHAPES = [((2, 64, 5, 7), 8), ((1, 70, 30, 21), 7), ((3, 40, 1, 1), 2), ((1, 32, 4, 160), 4)]


def difference(ours: Tensor, reference: Tensor) -> float:
    return ((ours.double() - reference).norm() / reference.norm()).item()


def make_norm(channels: int, groups: int, dtype: torch.dtype) -> tuple[GroupNorm, nn.GroupNorm]:
    """Ours with random frozen weights, and PyTorch's with the same in float64."""
    ours = GroupNorm(groups, channels, eps=1e-5)
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    ours.to(DEVICE, dtype).requires_grad_(False)
    reference = nn.GroupNorm(groups, channels, eps=1e-5).to(DEVICE, torch.float64).requires_grad_(False)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("silu, shifted", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_group_norm_and_its_gradient(shape, groups, silu, shifted, dtype):
    ours, reference = make_norm(shape[1], groups, dtype)
    x = torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    shift = torch.randn(shape[:2], device=DEVICE, dtype=dtype) if shifted else None
    with fused.forced(True):
        y = ours(x, shift, silu)
    exact_x = x.detach().double().requires_grad_()
    exact = reference(exact_x if shift is None else exact_x + shift.double()[:, :, None, None])
    exact = F.silu(exact) if silu else exact
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert difference(y, exact) < TOLERANCES[dtype]
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, weight)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, weight.double())
    assert difference(grad, exact_grad) < TOLERANCES[dtype]


def test_inputs_of_any_strides_give_the_same():
    norm, _ = make_norm(8, 2, torch.float32)
    x = torch.randn(2, 8, 6, 10, device=DEVICE)
    views = [x, x.to(memory_format=torch.channels_last), x.repeat(1, 1, 2, 1)[:, :, ::2], x.mT.contiguous().mT]
    views[2] = torch.stack([x, x], dim=3).flatten(2, 3)[:, :, ::2]  # every second row of a larger tensor
    expanded = torch.randn(2, 8, 1, 10, device=DEVICE).expand(-1, -1, 6, -1)
    with fused.forced(True):
        plain = F.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
        assert all(torch.allclose(norm(view), plain, atol=1e-5) for view in views)
        plain = F.group_norm(expanded, 2, norm.weight, norm.bias, norm.eps)
        assert torch.allclose(norm(expanded), plain, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
def test_a_large_mean_does_not_cancel(dtype, tolerance):
    """With a mean of 100 and a deviation of 1, sums of squares in fp32 would lose three digits."""
    norm, reference = make_norm(16, 4, dtype)
    x = (100 + torch.randn(1, 16, 24, 24, device=DEVICE)).to(dtype)
    with fused.forced(True):
        assert difference(norm(x), reference(x.double())) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_geglu_and_its_gradient(dtype):
    layer = GEGLU(10, 37).to(DEVICE, dtype).requires_grad_(False)
    x = torch.randn(3, 11, 10, device=DEVICE, dtype=dtype)
    projected = layer.proj(x).detach().requires_grad_()
    exact_projected = projected.detach().double().requires_grad_()
    with fused.forced(True):
        y = fused.geglu(projected)
        assert torch.equal(layer(x), y)
    value, gate = exact_projected.chunk(2, dim=-1)
    exact = value * F.gelu(gate)
    weight = torch.randn_like(y)
    (grad,), (exact_grad,) = (
        torch.autograd.grad(*args) for args in ((y, projected, weight), (exact, exact_projected, weight.double()))
    )
    assert difference(y, exact) < TOLERANCES[dtype] and difference(grad, exact_grad) < TOLERANCES[dtype]


def test_trained_weights_and_other_devices_take_the_plain_layers():
    norm, _ = make_norm(8, 2, torch.float32)
    x = torch.randn(1, 8, 3, 3, device=DEVICE)
    assert fused.applies(x, norm.weight) == (DEVICE == "cuda")
    with fused.forced(True):
        assert fused.applies(x, norm.weight) and not fused.applies(x.double(), norm.weight.double())
        norm.requires_grad_(True)
        assert not fused.applies(x, norm.weight)
        with torch.no_grad():
            assert fused.applies(x, norm.weight)
    with fused.forced(False):
        norm.requires_grad_(False)
        assert not fused.applies(x, norm.weight)


@pytest.mark.parametrize("keep, runs", [(True, 1), (False, 2)])
def test_selective_checkpointing_handles_the_operators(monkeypatch, keep, runs):
    """A result is kept where the policy says so, else computed again."""
    norm, _ = make_norm(8, 2, torch.float32)
    x = torch.randn(1, 8, 3, 3, device=DEVICE, requires_grad=True)
    calls, kernel = [], triton_kernels.group_norm
    monkeypatch.setattr(triton_kernels, "group_norm", lambda *args: calls.append(args) or kernel(*args))

    def policy(context, op, *args, **kwargs):
        kept = keep and op is torch.ops.minimti.group_norm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    with fused.forced(True):
        (plain,) = torch.autograd.grad(norm(x, silu=True).sin().sum(), x)
        calls.clear()
        contexts = partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(lambda x: norm(x, silu=True).sin(), x, use_reentrant=False, context_fn=contexts)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, plain) and len(calls) == runs


def test_a_small_unet_through_the_operators():
    """The output and the gradient with respect to tokens, where group norms and GEGLUs are all fused."""
    with torch.device("meta"):
        unet = UNet(SMALLER.unet)
    fill_by_name(unet, SMALLER, "unet.").requires_grad_(False).to(DEVICE)
    x = torch.randn(1, 2, SMALLER.unet.in_channels, 8, 8, device=DEVICE)
    tokens = torch.randn(3, 2, SMALLER.unet.context_dim, device=DEVICE, requires_grad=True)
    results = []
    for on in (False, True):
        with fused.forced(on):
            contexts = unet.project_tokens(tokens[None, :2], tokens[2:])
            out = unet(x, torch.ones(1, device=DEVICE), torch.tensor([[6, 127, 0.02]], device=DEVICE), contexts)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), tokens)))
    for plain, ours in zip(*results):
        assert difference(ours, plain.double()) < 1e-5


@pytest.mark.full
@torch.no_grad()
def test_a_small_vae_through_the_operators():
    config = replace(SMALLER.vae, ch=32)
    with torch.device("meta"):
        vae = VAE(config)
    fill_by_name(vae, replace(SMALLER, vae=config), "vae.").to(DEVICE)
    pixels = torch.randn(2, 3, 16, 16, device=DEVICE)
    plain = vae.encode(pixels)
    decoded = vae.decoder(plain, 2)
    with fused.forced(True):
        assert difference(vae.encode(pixels), plain.double()) < 1e-5
        assert difference(vae.decoder(plain, 2), decoded.double()) < 1e-5
