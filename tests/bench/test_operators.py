"""Counts of operators by hand, and of steps at toy sizes."""

import pytest
import torch
import torch.nn.functional as F
from toy import TOY

from minimti.bench.cases import Case, Step
from minimti.bench.operators import Count, as_json, as_table, count, counted_cases
from minimti.config import MODELS
from minimti.networks.attention import attention
from minimti.networks.layers import Conv3x3

pytest.importorskip("diffusers")


def counted(step, device="cpu") -> Count:
    """The counts of a function without arguments."""
    return count(Case(Step(lambda _: step, (), ()), TOY, torch.float32), device, "ours")


def test_views_and_allocations_are_no_operators():
    def step():
        x = torch.empty(8, 4)
        return x.view(4, 8).t()[1:] + x.reshape(-1)[:4]

    found = counted(step)
    assert found.operators == 1
    assert found.terabytes * 1e12 == 4 * (28 + 4 + 28)


def test_writes_in_place_are():
    assert counted(lambda: torch.empty(8).mul_(2)).operators == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_convolution_whose_input_has_channels_outermost_is_counted(device):
    def step(memory_format):
        x = torch.empty(2, 8, 6, 6).to(memory_format=memory_format)
        w = torch.empty(8, 8, 3, 3).to(memory_format=torch.channels_last)
        return lambda: F.conv2d(x, w)

    found = [counted(lambda m=m: step(m)(), device) for m in (torch.contiguous_format, torch.channels_last)]
    assert [(c.convolutions, c.convolutions_outermost) for c in found] == [(1, 1), (1, 0)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_group_norm_flips_the_layout(device):
    """What the count is for (pytorch issue 111824). Fake tensors show it on every device."""

    def step():
        x = torch.empty(2, 8, 6, 6).to(memory_format=torch.channels_last)
        return F.conv2d(F.group_norm(x, 2), torch.empty(8, 8, 3, 3))

    assert counted(step, device).convolutions_outermost == 1


def test_layers_are_counted_in_the_forms_that_a_gpu_runs():
    """Of a training step too, which is counted on fake tensors of a CPU."""
    conv, q = Conv3x3(8, 8), torch.empty(2, 4, 64, 8)
    found = counted(lambda: conv(torch.empty(1, 8, 2, 2)))
    assert (found.operators, found.convolutions) == (1, 1)  # on a CPU: padding, neighbours side by side, a product
    assert counted(lambda: attention(q, q, q)).operators == 1  # on a CPU: two products and a softmax


def test_denoising_and_training_can_be_counted():
    cases = counted_cases(TOY)
    assert list(cases) == ["denoise", "train_fast", "train_balanced", "train_low"]
    assert [device for _, device in cases.values()] == ["cuda", "cpu", "cpu", "cpu"]
    ours = {name: count(*cases[name], "ours") for name in ("denoise", "train_fast")}
    assert 100 < ours["denoise"].operators < ours["train_fast"].operators
    assert all(c.terabytes > 0 and c.convolutions > 0 for c in ours.values())


def test_the_form_of_the_json_and_of_the_table():
    found = Count(operators=2500, terabytes=0.5, convolutions_outermost=3, convolutions=110)
    assert as_json({"denoise": found}) == {
        "denoise": {"operators": 2500, "terabytes": 0.5, "convolutions_outermost": 3}
    }
    assert "| 2,500 / 2,500 | 0.500 / 0.500 | 3 of 110 / 3 of 110" in as_table({"denoise": found}, {"denoise": found})
    assert "| 2,500 " in as_table({"denoise": found}, {})


def test_counting_makes_no_tensor():
    """A model of 1.5 billion parameters would not fit beside the tests."""
    step = Step(lambda svd: lambda: svd.unet.conv_in.weight + 1, ("unet",), ())
    assert count(Case(step, MODELS["svd"], torch.bfloat16), "cuda", "ours").operators == 1
