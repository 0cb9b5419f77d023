"""The numbers that tell weights apart: the same for every precision and file layout, others after more training."""

import time

import pytest
import torch
from official import SMALL, fill_by_name, write_folder, write_official
from torch import nn

from minimti.checkpoint.fingerprint import TOLERANCE, differs, fingerprint
from minimti.checkpoint.load import load_into, open_checkpoint
from minimti.config import MODELS
from minimti.networks.unet import UNet
from minimti.svd import SVD


def unet(dtype: torch.dtype = torch.float32) -> UNet:
    with torch.device("meta"):
        network = UNet(SMALL.unet)
    return fill_by_name(network, SMALL, "unet.", dtype)


def loaded(path, dtype: torch.dtype = torch.float32) -> SVD:
    checkpoint = open_checkpoint(str(path))
    with torch.device("meta"):
        svd = SVD(checkpoint.config)
    load_into(svd, checkpoint, torch.device("cpu"), dtype, torch.float32)
    return svd


def largest_difference(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    assert a.keys() == b.keys()
    return max(abs(x - y) for name in a for x, y in zip(a[name], b[name]))


def test_the_numbers_are_normalised_sums_of_every_fourth_element():
    numbers = fingerprint(unet())
    assert len(numbers) == 8
    state = unet().state_dict()
    for name, values in numbers.items():
        flat = state[name].double().flatten()  # in the order of its indices, whatever the memory format
        rms, count = flat.square().mean().sqrt(), flat.numel() / 4
        # Here with the rms of the whole weight, which differs from that of a quarter by its sampling error.
        assert values == pytest.approx([(flat[i::4].sum() / (rms * count**0.5)).item() for i in range(4)], rel=0.1)
    values = torch.tensor(list(numbers.values()))
    assert 0.6 < values.std() < 1.4  # random weights: N(0, 1)


def test_they_are_spread_over_the_whole_network():
    names = list(fingerprint(unet()))
    assert names[0] == "time_embedding.linear_1.weight" and names[-1] == "conv_out.weight"
    assert {name.split(".")[0] for name in names} >= {"down_blocks", "mid_block", "up_blocks"}


@pytest.mark.parametrize("model", ["tiny", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_makes_no_difference(tmp_path, model, dtype):
    path = write_official(tmp_path / "small.safetensors") if model == "small" else model
    full, rounded = fingerprint(loaded(path).unet), fingerprint(loaded(path, dtype).unet)
    assert not differs(full, rounded)
    assert largest_difference(full, rounded) < TOLERANCE / 2


def test_both_file_layouts_give_the_same(tmp_path):
    single = loaded(write_official(tmp_path / "svd.safetensors"))
    folder = loaded(write_folder(tmp_path / "folder", single))
    assert not differs(fingerprint(single.unet), fingerprint(folder.unet))
    assert fingerprint(single.half().unet) == fingerprint(folder.half().unet)


def test_other_weights_differ():
    network = unet()
    before = fingerprint(network)
    torch.manual_seed(0)
    for weight in network.parameters():  # a fine-tune: 2 % of noise
        weight += 0.02 * weight.square().mean().sqrt() * torch.randn_like(weight)
    assert differs(before, fingerprint(network)) and differs(before, fingerprint(network.bfloat16()))


def test_what_counts_as_different():
    a = {"x.weight": [0.1, 0.2, 0.3, 0.4], "y.weight": [1.0, -1.0, 0.0, 0.5]}
    near = {name: [value + 0.9 * TOLERANCE for value in values] for name, values in a.items()}
    assert not differs(a, a) and not differs(a, near)
    assert not differs({}, a) and not differs(a, {}) and not differs({}, {})
    assert differs(a, {"x.weight": a["x.weight"]}) and differs(a, {**a, "z.weight": [0.0] * 4})
    assert differs(a, {"x.weight": a["x.weight"], "z.weight": a["y.weight"]})
    for wrong in (1.0 - 1.1 * TOLERANCE, float("nan")):
        assert differs(a, {**a, "y.weight": [wrong, -1.0, 0.0, 0.5]})
    assert differs(a, {**a, "y.weight": [1.0, -1.0]})


def test_it_takes_less_than_a_second_at_full_size():
    """The eight weights of the official UNet that are read; the others stay on the meta device."""
    with torch.device("meta"):
        network = UNet(MODELS["svd"].unet)
    matrices = [name for name, weight in network.named_parameters() if weight.ndim > 1]
    chosen = [matrices[round(k * (len(matrices) - 1) / 7)] for k in range(8)]
    for name in chosen:
        weight = torch.randn(network.get_parameter(name).shape, dtype=torch.bfloat16)
        owner, _, last = name.rpartition(".")
        setattr(network.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))
    began = time.perf_counter()
    assert list(fingerprint(network)) == chosen
    assert time.perf_counter() - began < 1


def test_zero_weights_have_a_fingerprint():
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    assert fingerprint(layer) == {"weight": [0.0] * 4}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same():
    network = unet()
    assert largest_difference(fingerprint(network), fingerprint(network.cuda())) < 1e-4
