"""Prices against counts by hand, the benchmark at toy sizes, and the prices of the official size."""

import json
import sys
import unittest.mock
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from official import SMALL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from minimti import cli
from minimti.bench import __main__ as main
from minimti.bench import measure
from minimti.bench.cost import Price, price
from minimti.config import MODELS
from minimti.networks.unet import UNet

pytest.importorskip("diffusers")

MIB = 2**20 // 4  # numbers of fp32
UNET = replace(SMALL.unet, channel_mult=(1, 2), attention_resolutions=(2,), num_res_blocks=1)
TOY = replace(SMALL, num_frames=2, size=(32, 16), unet=UNET, vae=replace(SMALL.vae, ch_mult=(1, 2)))


def test_matrix_product():
    def build() -> tuple[Tensor, Tensor]:
        return torch.ones(200, 300), torch.ones(300, 50)

    cost = price(build, lambda a, b: a @ b)
    assert cost.tflop * 1e12 == 2 * 200 * 300 * 50
    assert cost.traffic_tb * 1e12 == 4 * (200 * 300 + 300 * 50 + 200 * 50)
    assert cost.peak_gib * 2**30 == 4 * (200 * 300 + 300 * 50 + 200 * 50)
    assert cost.weights_gib == 0


def test_weights_are_counted_once():
    linear = price(lambda: (nn.Linear(100, 10),), lambda layer: None)
    assert linear.weights_gib * 2**30 == linear.peak_gib * 2**30 == 4 * 1010

    def tied() -> tuple[nn.Module]:
        layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        layers[1].weight.data = layers[0].weight.data
        return (layers,)

    assert price(tied, lambda layers: None).weights_gib * 2**30 == 4 * 64


def test_peak_of_a_chain():
    def chain(x: Tensor) -> None:
        for _ in range(10):
            x = x + 1  # the input is held by the caller; of the others, two at a time

    cost = price(lambda: (torch.ones(MIB),), chain)
    assert cost.peak_gib * 2**10 == 3
    assert cost.traffic_tb * 1e12 == 10 * 2 * 2**20

    def hoard(x: Tensor) -> None:
        kept = [x]
        for _ in range(10):
            kept.append(kept[-1] + 1)

    assert price(lambda: (torch.ones(MIB),), hoard).peak_gib * 2**10 == 11


def test_views_move_nothing_and_writes_do():
    def views(x: Tensor) -> None:
        x.view(-1, 4).t()[1:].unsqueeze(0).expand(3, -1, -1).detach()
        x.reshape(4, -1)

    cost = price(lambda: (torch.ones(MIB),), views)
    assert (cost.traffic_tb, cost.peak_gib * 2**10) == (0, 1)
    in_place = price(lambda: (torch.ones(MIB),), lambda x: x.mul_(2))
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

    peak = price(lambda: (torch.ones(MIB),), step).peak_gib * 2**10
    assert 4 + 8 <= peak <= 4 + 8 + 4 if recompute else 32 <= peak <= 32 + 4


def test_attention_forward_and_backward():
    heads, queries, keys, d = 3, 64, 32, 16

    def build() -> list[Tensor]:
        return [torch.ones(2, heads, n, d) for n in (queries, keys, keys)]

    def attend(*qkv: Tensor) -> None:
        F.scaled_dot_product_attention(*qkv)

    def learn(*qkv: Tensor) -> None:
        F.scaled_dot_product_attention(*(x.detach().requires_grad_() for x in qkv)).sum().backward()

    product = 2 * 2 * heads * queries * keys * d
    assert price(build, attend).tflop * 1e12 == pytest.approx(2 * product)
    assert price(build, learn).tflop * 1e12 == pytest.approx((2 + 5) * product)  # Q K^T again, and two per product


def test_flops_are_those_of_torch():
    case = measure.Case(measure.train, TOY, torch.float32)
    ours, _ = measure.skeletons(case)
    measure.fill([ours], case, "cpu")
    aten = torch.ops.aten
    attention = {  # of which not every version of PyTorch has the formulas
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        measure.train(ours, *measure.inputs(case, "cpu"))
    assert measure._price(case, ours).tflop * 1e12 == counter.get_total_flops() > 0


def test_roofline():
    assert Price(0, 0, tflop=312, traffic_tb=1).roofline_s == 1
    assert Price(0, 0, tflop=312, traffic_tb=4).roofline_s == 2


@pytest.mark.parametrize("step", [measure.train, measure.denoise, measure.encode, measure.decode])
def test_both_do_the_same(step):
    """But for an eps in diffusers' norms."""
    case = measure.Case(step, SMALL, torch.float32)
    both, results = measure.skeletons(case), []
    measure.fill(both, case, "cpu")
    tensors = measure.inputs(case, "cpu")
    for svd in both:
        torch.manual_seed(1)
        results.append(step(svd, *tensors))
    ours, theirs = results
    assert ours.norm() > 0
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_times():
    cases = measure.cpu_cases(replace(TOY, vae=SMALL.vae))
    for name in ("tiny_train_fp32", "train_fp32", "denoise_fp32"):
        found = measure.clock(cases[name], "cpu", repeats=2)
        assert found["ours_s"] > 0 and found["diffusers_s"] > 0
        assert 0 < found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
        assert found["ours_gib"] is None
    alone = measure.clock(replace(cases["train_fp32"], mode="low", checkpointing=None), "cpu", repeats=1)
    assert alone["ours_s"] > 0 and alone["diffusers_s"] is None and alone["ratio"] is None


def test_ours_alone_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((type(module), options)))
    cases = measure.cpu_cases(replace(TOY, vae=SMALL.vae))
    measure.clock(cases["tiny_train_fp32"], "cpu", repeats=1)
    assert not compiled
    measure.clock(cases["tiny_train_compiled_fp32"], "cpu", repeats=1)
    assert compiled == [(UNet, {"fullgraph": True, "dynamic": False})]


@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_timed_where_the_processor_has_it(native, capsys):
    with unittest.mock.patch.object(measure, "multiplies_bf16", lambda: native):
        names = measure.cpu_cases(SMALL).keys()
    assert {"train_fp32", "denoise_fp32", "tiny_train_fp32"} <= names
    assert ("train_bf16" in names) == ("denoise_bf16" in names) == native
    assert capsys.readouterr().err.count("\n") == (not native)


def run(*arguments: str) -> int:
    """The command's exit code."""
    with (
        unittest.mock.patch.object(sys, "argv", ["bench", *arguments]),
        unittest.mock.patch.object(cli.signal, "signal"),
        pytest.raises(SystemExit) as ended,
    ):
        cli.run(main.main)
    return ended.value.code


def test_one_run(tmp_path, capsys):
    """The command, on toy networks and a few of the steps."""
    priced = {name: measure.official_cases(TOY)[name] for name in ("train_balanced", "train_low", "encode", "sample")}
    timed = {"tiny_train_fp32": measure.Case(measure.train, TOY, torch.float32)}
    with (
        unittest.mock.patch.object(main, "official_cases", lambda config: priced),
        unittest.mock.patch.object(main, "cpu_cases", lambda config: timed),
        unittest.mock.patch.object(torch.cuda, "is_available", lambda: False),
    ):
        assert run("--json", str(tmp_path / "b.json"), "--repeats", "1") == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert report.keys() == {"prices", "ratios", "hardware", "versions"}
    alone = {"train_low", "encode_per_step", "sample"}
    assert report["prices"].keys() == {"train_balanced", "encode"} | alone
    for name, found in report["prices"].items():
        assert (found["diffusers"] is None) == (name in alone)
        for cost in (found, found["diffusers"] or found):
            assert cost["peak_gib"] > cost["weights_gib"] > 0 and cost["tflop"] > 0 and cost["traffic_tb"] > 0
    encode, share = report["prices"]["encode"], report["prices"]["encode_per_step"]
    assert share["tflop"] == pytest.approx(encode["tflop"] / 2 * 3 * 25 / 1000)
    assert report["ratios"].keys() == timed.keys()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("ours / diffusers; ") and f"torch {torch.__version__}" in head
    assert len(rows) == 2 + len(report["prices"]) + len(report["ratios"])
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    "arguments", [("--only", "half"), ("--repeats", "0"), ("--json", "/nowhere/b.json"), ("--json", "/")]
)
def test_bad_input(arguments, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_diffusers(capsys):
    with unittest.mock.patch.dict(sys.modules, diffusers=None):
        assert run() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "pip install -e '.[test]'" in message


@pytest.mark.full
def test_official_prices():
    """Limits of the official size; fake tensors, but minutes of them."""
    found = {name: ours for name, (ours, _) in measure.prices(measure.official_cases(MODELS["svd"])).items()}
    limits = {"train_fast": (28, 104), "train_balanced": (14, 118), "train_low": (7, 145)}
    for name, (gib, tflop) in limits.items():
        assert found[name].peak_gib <= gib
        assert found[name].tflop <= tflop
    assert found["denoise"].peak_gib <= 5
    assert found["decode_bf16"].peak_gib <= 5
    assert found["sample"].peak_gib <= 6
    assert found["encode_per_step"].tflop <= 2
    assert found["train_balanced"].traffic_tb + found["encode_per_step"].traffic_tb <= 0.70
