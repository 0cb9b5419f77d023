"""The command `python -m minimti.bench`, at toy sizes."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from official import SMALL

from minimti import cli
from minimti.bench.__main__ import Report, compare, main, plan
from minimti.bench.cases import TRAIN, Case, Step, official_cases
from minimti.bench.measure import summarise

pytest.importorskip("diffusers")

UNET = replace(SMALL.unet, channel_mult=(1,), attention_resolutions=(1,), num_res_blocks=1)
TOY = replace(SMALL, num_frames=2, size=(32, 16), unet=UNET, vae=replace(SMALL.vae, ch_mult=(1, 2), num_res_blocks=1))


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main(arguments))
    return ended.value.code


def test_costs_are_printed_and_saved(tmp_path, capsys):
    cases = {name: official_cases(TOY)[name] for name in ("encode", "sample")}
    compare(Report("a CPU", {"torch": "2.14"}, tmp_path / "b.json"), cases, {}, "cpu", repeats=1)
    found = json.loads((tmp_path / "b.json").read_text())
    assert found.keys() == {"costs", "ratios", "hardware", "versions"}
    ours_alone = {"encode_per_step", "sample"}
    assert found["costs"].keys() == {"encode"} | ours_alone
    for name, ours in found["costs"].items():
        assert (ours["diffusers"] is None) == (name in ours_alone)
        for cost in (ours, ours["diffusers"] or ours):
            assert cost["peak_gib"] > cost["weights_gib"] > 0 and cost["tflop"] > 0 and cost["traffic_tb"] > 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "ours / diffusers; a CPU; torch 2.14"
    assert [row.split()[1] for row in rows[2:]] == list(found["costs"])


def test_ratios_are_printed_and_saved(tmp_path, capsys):
    report = Report("a CPU", {"torch": "2.14"}, tmp_path / "b.json")
    compare(report, {}, {"train": Case(TRAIN, TOY, torch.float32)}, "cpu", repeats=1)
    found = json.loads((tmp_path / "b.json").read_text())
    timing = found["ratios"]["train"]
    assert timing["ratio"] == pytest.approx(timing["diffusers_s"] / timing["ours_s"])
    assert found["costs"] == {}
    assert f"| {timing['ratio']:.2f} (" in capsys.readouterr().out


@pytest.mark.parametrize("only", [None, "costs", "ratios"])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_timed_on_the_official_steps_and_a_cpu_on_small_ones(gpu, only, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    device, hardware, estimated, timed = plan(TOY, only)
    assert (device, hardware == "a card") == (("cuda", True) if gpu else ("cpu", False))
    assert estimated == ({} if only == "ratios" else official_cases(TOY))
    if only == "costs":
        assert timed == {}
    elif gpu:
        assert timed == official_cases(TOY)
    else:
        assert {"tiny_train_fp32", "train_fp32", "denoise_fp32"} <= timed.keys()
        assert {case.config.size for case in timed.values()} == {(64, 64), (128, 128)}


@pytest.mark.parametrize("speedup", [0.1, 0.9])
def test_bf16_is_timed_only_where_the_processor_has_it(speedup, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    *_, timed = plan(TOY, "ratios", lambda: speedup)
    assert ("train_bf16" in timed) == (speedup == 0.9)
    assert ("only emulates" in capsys.readouterr().err) == (speedup == 0.1)


def test_a_failure_loses_nothing_that_was_measured_before_it(tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("no such kernel")

    good = Case(TRAIN, TOY, torch.float32, compared=False)
    bad = replace(good, step=Step(fail, networks=(), inputs=()))
    report = Report("a CPU", {"torch": "2.14"}, tmp_path / "b.json")
    with pytest.raises(RuntimeError, match="no such kernel"):
        compare(report, {}, {"good": good, "bad": bad}, "cpu", repeats=1)
    assert json.loads((tmp_path / "b.json").read_text())["ratios"].keys() == {"good"}
    assert "| good " in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_holds_one_library_at_a_time(device):
    calls = []

    def clock(case, device, repeats, by_turns):
        calls.append((case, device, repeats, by_turns))
        return summarise([], [])

    case = Case(TRAIN, TOY, torch.float32)
    compare(Report("", {}), {}, {"train": case}, device, repeats=3, clock=clock)
    assert calls == [(case, device, 3, device == "cpu")]


def test_a_step_that_releases_networks_is_not_timed():
    report = Report("a CPU", {})
    compare(report, {}, {"sample": official_cases(TOY)["sample"]}, "cpu", repeats=1)
    assert report.timings == {}


@pytest.mark.parametrize(
    "arguments", [("--only", "half"), ("--repeats", "0"), ("--json", "/nowhere/b.json"), ("--json", "/")]
)
def test_bad_input_ends_with_one_line(arguments, capsys):
    assert exit_code(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_diffusers_the_message_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert exit_code() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "pip install -e '.[test]'" in message


@pytest.mark.full
def test_costs_of_the_official_size(tmp_path):
    """Upper limits. Fake tensors, but they take minutes."""
    main(["--only", "costs", "--json", str(tmp_path / "b.json")])
    ours = json.loads((tmp_path / "b.json").read_text())["costs"]
    limits = {"train_fast": (28, 104), "train_balanced": (14, 118), "train_low": (7, 145)}
    for name, (gib, tflop) in limits.items():
        assert ours[name]["peak_gib"] <= gib
        assert ours[name]["tflop"] <= tflop
    assert ours["denoise"]["peak_gib"] <= 5
    assert ours["decode_bf16"]["peak_gib"] <= 5
    assert ours["sample"]["peak_gib"] <= 6
    assert ours["encode_per_step"]["tflop"] <= 4  # the paper's recipe: 100 views for 1000 steps
    assert ours["train_balanced"]["traffic_tb"] + ours["encode_per_step"]["traffic_tb"] <= 0.70
