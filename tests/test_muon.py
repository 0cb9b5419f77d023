"""The optimiser of pre-training."""

import pytest
import torch

from minimti.config import MODELS
from minimti.muon import Muon, is_matrix, orthogonalised
from minimti.pretrain.stages import PretrainModel


@pytest.mark.parametrize("shape", [(32, 200), (200, 32), (48, 48)])
def test_orthogonalised_keeps_directions_and_equals_lengths(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    in_its_basis = u.T @ orthogonalised(matrix) @ v.T
    values = in_its_basis.diagonal()
    assert 0.6 < values.min() and values.max() < 1.25
    assert torch.allclose(in_its_basis, values.diag(), atol=1e-8)


def test_a_rank_of_one_stays_one():
    matrix = torch.outer(torch.randn(20), torch.randn(30))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert 0.6 < values[0] < 1.25 and values[1] < 1e-2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_the_same_in_every_layout(memory_format):
    """Of a convolution, against the matrix with the same rows."""
    weight, gradient = torch.randn(2, 24, 16, 3, 3)
    p = torch.nn.Parameter(weight.clone(memory_format=memory_format))
    p.grad = gradient.to(memory_format=memory_format)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    update = orthogonalised(gradient.flatten(1)).view_as(weight)
    expected = weight * 0.95 - 0.1 * 0.2 * (16 * 9) ** 0.5 * update
    assert torch.allclose(p, expected, atol=1e-4)
    rms = (p - 0.95 * weight).square().mean().sqrt()
    assert rms.item() == pytest.approx(0.1 * 0.2, rel=0.2)  # as long as a step of Adam's


def test_it_finds_what_few_directions_hide():
    """Least squares of which one direction is a thousand times steeper than another: 200 steps of a falling rate."""
    generator = torch.Generator().manual_seed(0)
    wanted, steepness = torch.randn(20, 20, generator=generator), torch.logspace(0, -3, 20)
    p = torch.nn.Parameter(torch.zeros(20, 20))
    muon = Muon([p], lr=0.3, weight_decay=0.0)
    for step in range(200):
        p.grad = (p.detach() - wanted) * steepness
        muon.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        muon.step()
    assert (p - wanted).norm() < 0.1 * wanted.norm()


def test_matrices_are_what_multiplies():
    model = PretrainModel(MODELS["tiny"])
    kinds = {name: is_matrix(name, p) for name, p in model.named_parameters()}
    transformer = "svd.unet.mid_block.attentions.0.transformer_blocks.0"
    assert (
        kinds[f"{transformer}.attn1.to_q.weight"]
        and kinds["svd.unet.mid_block.resnets.0.spatial_res_block.conv1.weight"]
    )
    for other in (f"{transformer}.norm1.weight", "svd.unet.conv_out.weight", "words.word.weight", "words.slot.weight"):
        assert not kinds[other]
    for part in ("svd.unet", "svd.image_encoder"):
        sizes = {k: p.numel() for k, p in model.named_parameters() if k.startswith(part)}
        assert sum(n for k, n in sizes.items() if kinds[k]) > 0.95 * sum(sizes.values())
