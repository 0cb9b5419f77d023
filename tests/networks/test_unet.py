"""Properties of the UNet that need no reference implementation."""

import pytest
import torch
from official import SMALL, fill_by_name

from minimti.networks.layers import Blend
from minimti.svd import SVD

F, N, D = SMALL.num_frames, 5, SMALL.unet.context_dim


@pytest.fixture(scope="module")
def svd() -> SVD:
    with torch.device("meta"):
        svd = SVD(SMALL)
    fill_by_name(svd.unet, SMALL, "unet.")
    return svd


def inputs(batch: int) -> dict[str, torch.Tensor]:
    return dict(
        x=torch.randn(batch, F, SMALL.unet.in_channels, 8, 16),
        c_noise=torch.randn(batch),
        micro=torch.tensor([[6.0, 127.0, 0.02], [10.0, 30.0, 0.1]])[:batch],
        spatial=torch.randn(batch, F, N, D),
        temporal=torch.randn(batch, N, D),
    )


def evaluate(svd, x, c_noise, micro, spatial, temporal) -> torch.Tensor:
    return svd.unet(x, c_noise, micro, svd.unet.project_tokens(spatial, temporal))


@torch.no_grad()
def test_a_batch_of_two_is_two_batches_of_one(svd):
    both = inputs(2)
    out = evaluate(svd, **both)
    for i in range(2):
        alone = evaluate(svd, **{name: value[i : i + 1] for name, value in both.items()})
        assert torch.allclose(alone[0], out[i], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("weighs_temporal", [False, True])
def test_blend_extremes_are_the_single_branch(weighs_temporal):
    spatial, temporal = torch.randn(2, 3, 4)
    blend = Blend(weighs_temporal)
    for factor, first in ((-100.0, False), (100.0, True)):
        blend.mix_factor.fill_(factor)
        branch = temporal if first == weighs_temporal else spatial
        assert torch.equal(blend(spatial, temporal), branch)


@torch.no_grad()
def test_frames_are_independent_where_every_blend_is_spatial(svd):
    """A token set reaches other frames through the layers over time alone; without them, only its own frame."""
    mixers = [module for module in svd.unet.modules() if isinstance(module, Blend)]
    kept = [mixer.mix_factor.clone() for mixer in mixers]
    plain = inputs(1)
    changed = plain | {"spatial": plain["spatial"].clone()}
    changed["spatial"][:, 2] += 1
    with_time = (evaluate(svd, **changed) - evaluate(svd, **plain)).abs().amax(dim=(0, 2, 3, 4))
    for mixer in mixers:
        mixer.mix_factor.fill_(100.0)
    alone = (evaluate(svd, **changed) - evaluate(svd, **plain)).abs().amax(dim=(0, 2, 3, 4))
    for mixer, factor in zip(mixers, kept):
        mixer.mix_factor.copy_(factor)
    assert (with_time > 1e-6).all()
    assert alone[2] > 1e-3 and (alone[[0, 1, 3]] == 0).all()


@torch.no_grad()
def test_temporal_tokens_reach_every_frame(svd):
    plain = inputs(1)
    moved = evaluate(svd, **plain | {"temporal": plain["temporal"] + 1}) - evaluate(svd, **plain)
    assert (moved.abs().amax(dim=(0, 2, 3, 4)) > 1e-4).all()


@torch.no_grad()
def test_equal_tokens_are_one_token(svd):
    """N copies of a token share the attention that one would have: plain image-to-video is N = 1 broadcast."""
    plain = inputs(1)
    one = plain | {"spatial": plain["spatial"][:, :, :1], "temporal": plain["temporal"][:, :1]}
    five = one | {"spatial": one["spatial"].expand(-1, -1, 5, -1), "temporal": one["temporal"].expand(-1, 5, -1)}
    assert torch.allclose(evaluate(svd, **one), evaluate(svd, **five), atol=1e-5)


def test_shapes_that_do_not_fit_are_named(svd):
    plain = inputs(1)
    with pytest.raises(ValueError, match="3 spatial and 1 temporal sets of tokens do not fit 1 clips of 4 frames"):
        evaluate(svd, **plain | {"spatial": plain["spatial"][:, :3]})
    for width, height in ((16, 9), (15, 8)):
        with pytest.raises(ValueError, match=f"{width}x{height} cannot be halved 3 times"):
            evaluate(svd, **plain | {"x": torch.randn(1, F, 8, height, width)})
