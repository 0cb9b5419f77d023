"""Muon, for matrices and for tokens."""

import math

import pytest
import torch

from minimti.muon import Muon, SharedMuon, is_matrix, orthogonalised


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("weight", (16, 16), True),
        ("weight", (15, 99), False),
        ("weight", (99, 15), False),
        ("conv.weight", (16, 2, 3, 3), True),  # 18 columns
        ("conv.weight", (16, 15), False),
        ("norm.weight", (64,), False),
        ("embedding", (32, 32), False),
    ],
)
def test_matrices_are_weights_with_16_rows_and_columns(name, shape, expected):
    assert is_matrix(name, torch.empty(shape)) is expected


@pytest.mark.parametrize("shape", [(32, 200), (200, 32), (48, 48)])
def test_orthogonalised_keeps_directions_and_equals_lengths(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    in_its_basis = u.T @ orthogonalised(matrix) @ v.T
    values = in_its_basis.diagonal()
    assert 0.6 < values.min() and values.max() < 1.25
    assert torch.allclose(in_its_basis, values.diag(), atol=1e-8)


def test_a_rank_of_one_stays_one():
    """Its only singular value starts at 1; five iterations of 3.4445 s - 4.775 s^3 + 2.0315 s^5 make it 0.6964."""
    matrix = torch.outer(torch.randn(20), torch.randn(30))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values[0].item() == pytest.approx(0.6964, abs=1e-3) and values[1] < 1e-2


def test_orthogonalised_keeps_precision_and_device():
    out = orthogonalised(torch.empty(3, 5, dtype=torch.float16, device="meta"))
    assert (out.dtype, out.device.type) == (torch.float16, "meta")


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_the_same_in_every_layout(memory_format):
    """For a convolution, against the matrix with the same rows."""
    weight, gradient = torch.randn(2, 24, 16, 3, 3)
    p = torch.nn.Parameter(weight.clone(memory_format=memory_format))
    p.grad = gradient.to(memory_format=memory_format)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    update = orthogonalised(gradient.flatten(1)).view_as(weight)
    expected = weight * 0.95 - 0.1 * 0.2 * (16 * 9) ** 0.5 * update
    assert torch.allclose(p, expected, atol=1e-4)
    rms = (p - 0.95 * weight).square().mean().sqrt()
    assert rms.item() == pytest.approx(0.1 * 0.2, rel=0.2)  # as long as a step of Adam's


def test_a_parameter_without_a_gradient_stays_and_the_next_one_moves():
    first, second = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    second.grad = torch.eye(2)
    Muon([first, second], lr=0.1, weight_decay=0.5).step()
    assert (first == 1).all() and (second != 1).all()


def test_it_learns_also_along_directions_with_small_gradients():
    """Least squares in which one direction is a thousand times steeper than another: 200 steps of a falling rate."""
    generator = torch.Generator().manual_seed(0)
    target, steepness = torch.randn(20, 20, generator=generator), torch.logspace(0, -3, 20)
    p = torch.nn.Parameter(torch.zeros(20, 20))
    muon = Muon([p], lr=0.3, weight_decay=0.0)
    for step in range(200):
        p.grad = (p.detach() - target) * steepness
        muon.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        muon.step()
    assert (p - target).norm() < 0.1 * target.norm()


def second_step(momentum: float) -> torch.Tensor:
    """The second step of a matrix of one row, whose gradient is first along axis 0 and then along axis 1."""
    p = torch.nn.Parameter(torch.zeros(1, 2))
    muon = Muon([p], lr=1.0, momentum=momentum)
    for gradient in ([[1.0, 0.0]], [[0.0, 1.0]]):
        before, p.grad = p.detach().clone(), torch.tensor(gradient)
        muon.step()
    return (p.detach() - before)[0]


@pytest.mark.parametrize("momentum, ratio", [(0.9, 0.81 / 1.9), (0.5, 0.25 / 1.5), (0.0, 0.0)])
def test_momentum_is_nesterovs(momentum, ratio):
    """After g1, g2 the average is m (1-m) g1 + (1-m) g2, and one step further along it m^2 (1-m) g1 + (1-m^2) g2: axis
    0 has m^2 / (1 + m) of axis 1. Without the step ahead it were m, without momentum 0."""
    step = second_step(momentum)
    assert (step[0] / step[1]).item() == pytest.approx(ratio, rel=1e-4, abs=1e-6)


def test_tokens_have_a_momentum_of_0_9():
    tokens = torch.zeros(1, 1, 2)
    optimizer = SharedMuon(tokens, lr=1.0, steps=1000)
    for gradient in ([[[1.0, 0.0]]], [[[0.0, 1.0]]]):
        before = tokens.clone()
        optimizer.step(torch.tensor(gradient))
    step = (tokens - before).flatten()
    assert (step[0] / step[1]).item() == pytest.approx(0.81 / 1.9, rel=1e-3)


def test_a_gradient_of_one_set_moves_all_and_its_own_a_quarter_further():
    tokens, gradient = torch.zeros(3, 2, 32), torch.zeros(3, 2, 32)
    gradient[0, 1] = torch.randn(32)
    SharedMuon(tokens, lr=0.5, steps=1000).step(gradient)
    assert torch.equal(tokens[1], tokens[2]) and tokens[1].norm() > 0
    assert torch.allclose(tokens[0], 1.25 * tokens[1], rtol=1e-4)
    assert (tokens[1, 1] @ gradient[0, 1]) < 0 and tokens[:, 0].abs().max() < 1e-6


def test_sets_share_the_sum_of_their_gradients():
    """Gradients that cancel move nothing together, and each set along its own."""
    tokens, gradient = torch.zeros(2, 1, 32), torch.randn(1, 1, 32)
    SharedMuon(tokens, lr=1.0, steps=1000).step(torch.cat([gradient, -gradient]))
    assert torch.allclose(tokens[0], -tokens[1], atol=1e-6) and tokens.norm() > 0


def test_the_rate_of_tokens_falls_along_half_a_cosine():
    tokens, gradient = torch.zeros(2, 3, 16), torch.randn(2, 3, 16)
    optimizer, lengths = SharedMuon(tokens, lr=1.0, steps=64), []
    for _ in range(64):
        before = tokens.clone()
        optimizer.step(gradient)
        lengths.append((tokens - before).norm().item())
    for step in (16, 32, 63):
        assert lengths[step] / lengths[0] == pytest.approx((1 + math.cos(math.pi * step / 64)) / 2, rel=1e-2)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="no closure"):
        Muon([torch.zeros(2, 2)], lr=1.0).step(lambda: 0.0)
