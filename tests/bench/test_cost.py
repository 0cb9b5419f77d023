"""Costs against counts by hand, and against torch's own counter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimti.bench.cost import Cost, estimate_cost

MIB = 2**20 // 4  # numbers of fp32


def test_matrix_product():
    def build() -> tuple[Tensor, Tensor]:
        return torch.ones(200, 300), torch.ones(300, 50)

    cost = estimate_cost(build, lambda a, b: a @ b)
    assert cost.tflop * 1e12 == 2 * 200 * 300 * 50
    assert cost.traffic_tb * 1e12 == 4 * (200 * 300 + 300 * 50 + 200 * 50)
    assert cost.peak_gib * 2**30 == 4 * (200 * 300 + 300 * 50 + 200 * 50)
    assert cost.weights_gib == 0


def test_weights_are_counted_once():
    linear = estimate_cost(lambda: (nn.Linear(100, 10),), lambda layer: None)
    assert linear.weights_gib * 2**30 == linear.peak_gib * 2**30 == 4 * 1010

    def tied() -> tuple[nn.Module]:
        layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        layers[1].weight.data = layers[0].weight.data
        return (layers,)

    assert estimate_cost(tied, lambda layers: None).weights_gib * 2**30 == 4 * 64


def test_the_peak_of_a_chain_is_that_of_its_live_tensors():
    def chain(x: Tensor) -> None:
        for _ in range(10):
            x = x + 1  # the caller holds the input; of the others two exist at a time

    cost = estimate_cost(lambda: (torch.ones(MIB),), chain)
    assert cost.peak_gib * 2**10 == 3
    assert cost.traffic_tb * 1e12 == 10 * 2 * 2**20

    def keep_all(x: Tensor) -> None:
        kept = [x]
        for _ in range(10):
            kept.append(kept[-1] + 1)

    assert estimate_cost(lambda: (torch.ones(MIB),), keep_all).peak_gib * 2**10 == 11


def test_views_move_nothing_and_writes_in_place_do():
    def views(x: Tensor) -> None:
        x.view(-1, 4).t()[1:].unsqueeze(0).expand(3, -1, -1).detach()
        x.reshape(4, -1)

    cost = estimate_cost(lambda: (torch.ones(MIB),), views)
    assert (cost.traffic_tb, cost.peak_gib * 2**10) == (0, 1)
    in_place = estimate_cost(lambda: (torch.ones(MIB),), lambda x: x.mul_(2))
    assert (in_place.traffic_tb * 1e12, in_place.peak_gib * 2**10) == (2 * 2**20, 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_lowers_the_peak(recompute):
    def block(x: Tensor) -> Tensor:
        for _ in range(8):
            x = x.sin()  # keeps its input
        return x

    def step(x: Tensor) -> None:
        x = x.detach().requires_grad_()
        y = x
        for _ in range(4):
            y = checkpoint(block, y, use_reentrant=False) if recompute else block(y)
        y.backward(torch.ones_like(y))

    peak = estimate_cost(lambda: (torch.ones(MIB),), step).peak_gib * 2**10
    assert 4 + 8 <= peak <= 4 + 8 + 4 if recompute else 32 <= peak <= 32 + 4


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_recomputation_are_counted_once(recompute):
    n = 8

    def build() -> tuple[Tensor, Tensor]:
        return torch.ones(n, n), torch.ones(n, n)

    def step(x: Tensor, weight: Tensor) -> None:
        def block(x: Tensor) -> Tensor:
            return ((x @ weight).sin() @ weight).sin()

        x = x.detach().requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        y.sum().backward()

    products = 2 + 2 + (2 if recompute else 0)  # forward, backward to x alone, forward again
    assert estimate_cost(build, step).tflop * 1e12 == products * 2 * n**3


def test_attention_forward_and_backward():
    heads, queries, keys, d = 3, 64, 32, 16

    def build() -> tuple[Tensor, ...]:
        return tuple(torch.ones(2, heads, n, d) for n in (queries, keys, keys))

    def forward(*qkv: Tensor) -> None:
        F.scaled_dot_product_attention(*qkv)

    def backward(*qkv: Tensor) -> None:
        F.scaled_dot_product_attention(*(x.detach().requires_grad_() for x in qkv)).sum().backward()

    product = 2 * 2 * heads * queries * keys * d
    assert estimate_cost(build, forward).tflop * 1e12 == pytest.approx(2 * product)
    # The backward pass computes Q K^T again, and two products for each of the two.
    assert estimate_cost(build, backward).tflop * 1e12 == pytest.approx((2 + 5) * product)


def test_the_roofline_is_the_slower_of_compute_and_memory():
    assert Cost(0, 0, tflop=312, traffic_tb=1).roofline_s == 1
    assert Cost(0, 0, tflop=312, traffic_tb=4).roofline_s == 2
