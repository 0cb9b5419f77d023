"""Options that save memory change nothing else."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official import SMALL, fill_by_name
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from minimti.budget import Budget
from minimti.networks.attention import FeedForward
from minimti.networks.lowmem_decode import decode
from minimti.networks.recompute import MODES, flops_per_byte, set_mode
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE, Decoder
from minimti.svd import SVD, Conditioning

SLICE_BYTES = 2**16  # so that the small feed-forwards go in slices too


def difference(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return ((ours - plain).norm() / plain.norm()).item()


def small_decoder() -> Decoder:
    """In float64. From latents of w cells a row, the widest levels are 64 channels at 2 w and 32 channels at 4 w."""
    config = replace(SMALL.vae, ch_mult=(1, 2, 2), num_res_blocks=1)
    with torch.device("meta"):
        vae = VAE(config)
    return fill_by_name(vae, replace(SMALL, vae=config), "vae.", torch.float64).decoder


@torch.no_grad()
@given(num_frames=st.integers(1, 5), cells=st.tuples(st.integers(1, 3), st.integers(2, 4)), rows=st.integers(1, 9))
def test_decoding_layer_by_layer_is_decoding(num_frames, cells, rows):
    decoder = small_decoder()
    z = torch.randn(num_frames, 4, *cells, dtype=torch.float64)
    plain = decoder(z, num_frames)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        rows_bytes = rows * num_frames * 32 * 4 * cells[1] * dtype.itemsize  # the widest levels go by `rows` rows
        for keep in (False, True):
            assert difference(decode(decoder.to(dtype), z.to(dtype), rows_bytes, keep), plain) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("rows_bytes, num_rows", [(1, [1] * 12), (5 * 3 * 32 * 8 * 8, [5, 5, 2]), (2**30, [12])])
def test_temporal_layers_take_as_many_rows_as_fit(rows_bytes, num_rows):
    """At the last level: 3 frames of 32 channels, 12 rows of 8 numbers of 8 bytes."""
    seen, decoder = [], small_decoder()
    second = decoder.up_blocks[-1].resnets[-1].temporal_res_block.conv2  # used once for each group of rows
    second.register_forward_hook(lambda layer, inputs, out: seen.append(out.shape[-1] // 8))
    decode(decoder, torch.randn(3, 4, 3, 2, dtype=torch.float64), rows_bytes)
    assert seen == num_rows


@pytest.fixture(scope="module")
def unet() -> UNet:
    with torch.device("meta"):
        unet = UNet(SMALL.unet)
    set_mode(unet, None, SLICE_BYTES)
    return fill_by_name(unet, SMALL, "unet.", torch.float64).requires_grad_(False)


def gradients(unet: UNet) -> list[torch.Tensor]:
    """Output, and gradients of both token sets."""
    generator = torch.Generator().manual_seed(0)
    x, c_noise, spatial, temporal = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 3, 8, 8, 16), (1,), (1, 3, 5, 48), (1, 5, 48))
    )
    spatial, temporal = spatial.requires_grad_(), temporal.requires_grad_()
    out = unet(x, c_noise, torch.tensor([[6, 127, 0.02]]), unet.project_tokens(spatial, temporal))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [spatial, temporal])]


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_gives_the_same_gradients(unet, mode):
    set_mode(unet, None)
    plain = gradients(unet)
    set_mode(unet, mode, SLICE_BYTES)
    for ours, reference in zip(gradients(unet), plain):
        assert difference(ours, reference) < 1e-12


def test_feed_forwards_in_slices_are_feed_forwards(unet):
    """Without gradients, as in sampling. No slice is larger than was set, and together they are all rows."""
    layer = next(module for module in unet.modules() if isinstance(module, FeedForward))
    norm, sizes = torch.nn.LayerNorm(layer.net[-1].out_features, dtype=torch.float64), []
    hook = norm.register_forward_hook(lambda _, inputs, out: sizes.append(8 * out.nbytes))
    x = torch.randn(3, 100, *norm.normalized_shape, dtype=torch.float64)
    with torch.no_grad(), hook:
        layer.slice_bytes = 8 * x.nbytes
        plain = layer(x, norm)
        layer.slice_bytes = SLICE_BYTES
        assert difference(layer(x, norm), plain) < 1e-12
    assert sizes[0] == sum(sizes[1:]) and max(sizes[1:]) <= SLICE_BYTES < sizes[0]


@torch.no_grad()
def test_guidance_in_turn_is_guidance_as_a_batch(unet):
    with torch.device("meta"):
        svd = SVD(SMALL)
    svd.unet = unet
    image, tokens = torch.randn(1, 3, 4, 8, 16, dtype=torch.float64), torch.randn(4, 5, 48, dtype=torch.float64)
    cond = Conditioning(image, torch.tensor([[6, 127, 0.02]]), tokens[None, :3], tokens[3:])
    n = torch.randn_like(image)
    *_, plain = svd.sample(cond, n, 3, (1.0, 3.0))
    svd.budget = Budget(in_turn=True)
    *_, ours = svd.sample(cond, n, 3, (1.0, 3.0))
    assert difference(ours, plain) < 1e-12


def test_which_operations_are_expensive():
    """FLOPs per byte of a result, against the counter that PyTorch has for FLOPs."""
    x, weight = torch.randn(2, 6, 7, 9), torch.randn(4, 6, 3, 3)
    a, b = torch.randn(5, 8), torch.randn(8, 3)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 11, 8)
    aten = torch.ops.aten
    for op, args in (
        (aten.mm.default, (a, b)),
        (aten.addmm.default, (torch.randn(3), a, b)),
        (aten.bmm.default, (a[None], b[None])),
        (aten.convolution.default, (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    ):
        out = op(*args)
        flops = flop_registry[op.overloadpacket](
            *(v.shape if torch.is_tensor(v) else v for v in args), out_val=out.shape
        )
        assert flops_per_byte(op, args) == flops / out.nbytes
    flops = sdpa_flop_count(q.shape, k.shape, k.shape)
    fused = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert flops_per_byte(fused, (q, k, k)) == flops / q.nbytes
    assert flops_per_byte(aten.silu.default, (x,)) == 0
