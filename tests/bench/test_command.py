"""The command `python -m minimti.bench`, at toy sizes."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from official import SMALL

from minimti import cli
from minimti.bench.__main__ import Report, compare, main
from minimti.bench.cases import TRAIN, Case, Step, official_cases
from minimti.config import MODELS

pytest.importorskip("diffusers")

UNET = replace(SMALL.unet, channel_mult=(1,), attention_resolutions=(1,), num_res_blocks=1)
TOY = replace(SMALL, num_frames=2, size=(32, 16), unet=UNET, vae=replace(SMALL.vae, ch_mult=(1, 2)))


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main(arguments, TOY))
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


def test_ratios_of_the_whole_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes
        main(["--json", str(tmp_path / "b.json"), "--only", "ratios", "--repeats", "1"], replace(TOY, vae=SMALL.vae))
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["costs"] == {}
    assert {"tiny_train_fp32", "tiny_train_compiled_fp32", "train_fp32", "denoise_fp32"} <= found["ratios"].keys()
    for timing in found["ratios"].values():
        assert timing["ratio"] == pytest.approx(timing["diffusers_s"] / timing["ours_s"])
    streams = capsys.readouterr()
    assert f"torch {torch.__version__}" in streams.out
    assert ("train_bf16" in found["ratios"]) != ("only emulates" in streams.err)


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
def test_costs_of_the_official_size():
    """Upper limits. Fake tensors, but they take minutes."""
    report = Report("", {})
    compare(report, official_cases(MODELS["svd"]), {}, "cpu", repeats=1)
    ours = {name: cost for name, (cost, _) in report.costs.items()}
    limits = {"train_fast": (28, 104), "train_balanced": (14, 118), "train_low": (7, 145)}
    for name, (gib, tflop) in limits.items():
        assert ours[name].peak_gib <= gib
        assert ours[name].tflop <= tflop
    assert ours["denoise"].peak_gib <= 5
    assert ours["decode_bf16"].peak_gib <= 5
    assert ours["sample"].peak_gib <= 6
    assert ours["encode_per_step"].tflop <= 4  # the paper's recipe: 100 views for 1000 steps
    assert ours["train_balanced"].traffic_tb + ours["encode_per_step"].traffic_tb <= 0.70
