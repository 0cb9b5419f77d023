"""The command `python -m minimti.bench`: what it measures, in which order; at toy sizes."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import TOY

from minimti import cli, signals
from minimti.bench import __main__ as command
from minimti.bench.__main__ import chosen, cpu_items, gpu_items, kernel_items, main, plan, process_items
from minimti.bench.cases import official_cases, timed_cases
from minimti.bench.measure import Line, summarise
from minimti.bench.processes import Programs
from minimti.bench.report import Item, Report, work
from minimti.config import MODELS
from minimti.io.files import InputError

pytest.importorskip("diffusers")

LINE = Line("denoise", "ours", "graph", 8.0, 0.4, 0.39, 0.41, allocated_gib=20.0, reserved_gib=25.0)


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main(arguments))
    return ended.value.code


def report(path=None) -> Report:
    return Report("a CPU", {"torch": "2.14"}, "python -m minimti.bench", path)


def names(items) -> list[str]:
    return [item.name for item in items]


# ---------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("only", [None, "costs", "ratios"])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_timed_on_the_official_steps_and_a_cpu_on_small_ones(gpu, only, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = names(plan(TOY, only, repeats=1))
    costs = [name for name in found if name.endswith("/costs")]
    assert costs == ([] if only == "ratios" else [f"{name}/costs" for name in official_cases(TOY)])
    timed = [name for name in found if name not in costs]
    expected = [] if only == "costs" else gpu_items(TOY, 1) if gpu else cpu_items(TOY, 1)
    assert timed == names(expected)
    assert only is not None or found == (timed + costs if gpu else costs + timed)


@pytest.mark.parametrize("speedup", [0.1, 0.9])
def test_bf16_is_timed_only_where_the_processor_has_it(speedup, monkeypatch):
    monkeypatch.setattr(command, "bf16_speedup", lambda: speedup)
    monkeypatch.setattr(command, "by_turns", lambda case, form, device, repeats: summarise(form, [1.0], [2.0]))
    found, items = report(), cpu_items(TOY, repeats=1)
    work(found, items, None, lambda: 0.0)
    left_out = {name for name in names(items) if "bf16" in name and speedup == 0.1}
    assert found.skipped == dict.fromkeys(left_out, "this processor only emulates bf16")
    assert found.ratios.keys() == set(names(items)) - left_out


def test_a_gpu_measures_every_form_of_every_step_and_compiles_last():
    items = gpu_items(TOY, repeats=1)
    alone = {f"{name}/{library}/{form}" for name, case in timed_cases(TOY).items()
             for library, forms in case.forms.items() for form in forms}  # fmt: skip
    assert {name for name in names(items) if not name.endswith("/by_turns")} == alone
    assert len(set(names(items))) == len(items)
    rank = {"eager": 0, "graph": 0, "channels_last": 1, "by_turns": 2, "compiled": 3}
    ranks = [rank[name.rpartition("/")[2]] + ("diffusers/compiled" in name) for name in names(items)]
    assert ranks == sorted(ranks) and set(ranks) == {0, 1, 2, 3, 4}
    assert names(items)[:3] == ["train_max/ours/graph", "train_max/ours/eager", "train_max/diffusers/eager"]
    assert max(item.expected_s for item in items[: ranks.index(3)]) < min(i.expected_s for i in items[ranks.index(3) :])


def test_a_cpu_begins_with_what_takes_least():
    seconds = [item.expected_s for item in cpu_items(TOY, repeats=1)]
    assert seconds == sorted(seconds) and len(seconds) == 8


def test_names_and_patterns_choose():
    items = gpu_items(TOY, repeats=1)
    ours = ["denoise/ours/graph", "denoise/ours/eager", "denoise/ours/compiled"]
    assert names(chosen(items, ["denoise/ours/*"])) == ours
    assert {name.partition("/")[0] for name in names(chosen(items, ["denoise", "train_[fl]*"]))} == {
        "denoise",
        "train_fast",
        "train_low",
    }
    assert chosen(items, None) == items
    with pytest.raises(InputError, match="--cases decoding: .* name some of train_max, denoise"):
        chosen(items, ["denoise", "decoding"])


# ---------------------------------------------------------------------------------------------- measuring


@pytest.mark.full
def test_costs_are_printed_and_saved(tmp_path):
    found = report(tmp_path / "b.json")
    work(found, chosen(plan(TOY, "costs", 1), ["encode", "sample"]), None, lambda: 0.0)
    costs = json.loads((tmp_path / "b.json").read_text())["costs"]
    ours_alone = {"encode_per_step", "sample"}
    assert costs.keys() == {"encode"} | ours_alone
    for name, ours in costs.items():
        assert (ours["diffusers"] is None) == (name in ours_alone)
        for cost in (ours, ours["diffusers"] or ours):
            assert cost["peak_gib"] > cost["weights_gib"] > 0 and cost["tflop"] > 0 and cost["traffic_tb"] > 0
    assert not found.skipped and "| encode_per_step " in str(found)


def test_lines_and_ratios_of_a_gpu_are_measured(tmp_path):
    """On a CPU in its place, where nothing can be recorded as a graph."""
    found = report(tmp_path / "b.json")
    wanted = ["train_max/*/eager", "train_max/diffusers/channels_last", "train_max/by_turns", "decode/*/eager"]
    work(found, chosen(gpu_items(TOY, repeats=1, device="cpu"), wanted), None, lambda: 0.0)
    assert not found.skipped
    saved = json.loads((tmp_path / "b.json").read_text())
    assert [(line["case"], line["library"], line["form"]) for line in saved["lines"]] == [
        ("train_max", "ours", "eager"),
        ("train_max", "diffusers", "eager"),
        ("decode", "ours", "eager"),
        ("decode", "diffusers", "eager"),
        ("train_max", "diffusers", "channels_last"),
    ]
    ratio = saved["ratios"]["train_max"]
    assert ratio["form"] == "eager"
    assert ratio["ratio"] == pytest.approx(ratio["diffusers_s"] / ratio["ours_s"])


@pytest.mark.parametrize(
    "lines, card_gib, reason",
    [
        ([LINE], 80, "not both libraries were measured alone"),
        ([LINE, replace(LINE, library="diffusers", form="channels_last")], 80, "not both libraries"),
        ([LINE, replace(LINE, library="diffusers", form="eager", reserved_gib=50.0)], 80, "75 GiB of 80 GiB"),
        ([LINE, replace(LINE, library="diffusers", form="eager", reserved_gib=46.0)], 80, None),
        ([LINE, replace(LINE, library="diffusers", form="eager"), replace(LINE, form="compiled", seconds=0.1),
          replace(LINE, form="eager", seconds=0.5)], 80, None),
    ],
)  # fmt: skip
def test_libraries_go_by_turns_where_both_fit_with_our_fastest_form_that_is_not_compiled(
    lines, card_gib, reason, monkeypatch
):
    class Card:
        total_memory = card_gib * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(command, "by_turns", lambda case, form, device, repeats: summarise(form, [1.0], [2.0]))
    found = report()
    found.lines += lines
    work(found, chosen(gpu_items(TOY, repeats=1), ["denoise/by_turns"]), None, lambda: 0.0)
    if reason is None:
        assert found.ratios["denoise"].form == "graph" and not found.skipped
    else:
        assert reason in found.skipped["denoise/by_turns"] and not found.ratios


def test_kernels_of_ours_in_two_forms_and_of_diffusers(monkeypatch):
    items = kernel_items(TOY, device="cpu")
    assert names(items)[:2] == ["denoise/ours/graph", "train_balanced/ours/graph"]
    assert {name.partition("/")[2] for name in names(items)} == {"ours/graph", "ours/eager", "diffusers/eager"}
    shapes = []
    monkeypatch.setattr(command.profiling, "gpu_time", lambda step: shapes.append(step().shape) or {"norms": 1.0})
    found = report()
    work(found, chosen(items, ["*/ours/eager", "denoise/diffusers/*"]), None, lambda: 0.0)
    assert list(found.kernels) == ["denoise/ours/eager", "train_balanced/ours/eager", "denoise/diffusers/eager"]
    assert [shape[1] for shape in shapes] == [TOY.num_frames, 5, TOY.num_frames]


def test_processes_run_cold_before_warm(tmp_path, monkeypatch):
    calls = []
    programs = Programs(tmp_path, TOY, "cpu")
    monkeypatch.setattr(programs, "write", lambda: calls.append("write") or {"GB": 4.5})
    for name in ("train", "sample"):
        monkeypatch.setattr(programs, name, lambda cold, name=name: calls.append((name, cold)) or {"wall": 9.0})
    found = report()
    work(found, process_items(programs), None, lambda: 0.0)
    assert calls == ["write", ("train", True), ("sample", True), ("train", False), ("sample", False)]
    assert list(found.processes) == ["write", "train_cold", "sample_cold", "train_warm", "sample_warm"]


# ---------------------------------------------------------------------------------------------- the command


def run(monkeypatch, items, *arguments: str) -> int:
    """The command with other things to measure, as on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(command, "plan", lambda *_: items)
    return exit_code(*arguments)


def test_the_budget_counts_from_the_start_of_the_command(monkeypatch, capsys):
    left, times = [], iter([500.0, 530.0])
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(command, "work", lambda report, items, budget, clock: left.append(budget))
    assert run(monkeypatch, [], "--budget", "100") == 0 and left == [70]


def test_a_run_prints_saves_and_draws_what_it_measured(tmp_path, monkeypatch, capsys):
    items = [Item("denoise/ours/graph", 1, lambda report: report.lines.append(LINE)), Item("slow", 1e5, None)]
    out = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "p.png")]
    assert run(monkeypatch, items, "--budget", "100", *out) == 0
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["lines"][0]["seconds"] == 0.4 and saved["skipped"].keys() == {"slow"}
    assert saved["hardware"] == "a card" and saved["versions"]["cudnn"] == "91900"
    assert saved["command"].startswith("python -m minimti.bench --budget 100 --json ")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| denoise | ours " in printed and "not measured: slow" in printed


def test_a_failure_ends_the_run_with_1_after_everything_else(tmp_path, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("no such kernel")

    items = [Item("bad", 1, fail), Item("good", 1, lambda report: report.lines.append(LINE))]
    assert run(monkeypatch, items, "--json", str(tmp_path / "b.json")) == 1
    assert len(json.loads((tmp_path / "b.json").read_text())["lines"]) == 1
    assert "failed: RuntimeError: no such kernel" in capsys.readouterr().out


def test_an_interrupt_prints_and_draws_what_was_measured(tmp_path, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(signals, "end", lambda number: sys.exit(128 + number))  # which ends the process
    items = [Item("good", 1, lambda report: report.lines.append(LINE)), Item("long", 1, interrupt)]
    assert run(monkeypatch, items, "--plot", str(tmp_path / "p.png")) == 130
    assert "| denoise | ours " in capsys.readouterr().out and (tmp_path / "p.png").exists()


def test_counts_of_operators_are_printed_and_saved_in_their_own_form(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "svd", TOY)
    main(["--operators", "--cases", "denoise", "--json", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())
    assert found.keys() == {"denoise"}
    assert found["denoise"].keys() == {"operators", "terabytes", "convolutions_outermost"}
    both = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "diffusers", None)
    main(["--operators", "--cases", "denoise"])
    ours = capsys.readouterr().out.splitlines()[-1]
    assert both.split("|")[2].count("/") == 1 and ours.split("|")[2].count("/") == 0
    assert f" {found['denoise']['operators']:,} " in ours


@pytest.mark.parametrize(
    "arguments",
    [
        ("--only", "half"),
        ("--repeats", "0"),
        ("--budget", "-1"),
        ("--json", "/nowhere/b.json"),
        ("--json", "/"),
        ("--plot", "/nowhere/p.png"),
        ("--plot", "p.png"),  # without a GPU
        ("--kernels",),  # the same
        ("--kernels", "--operators"),
        ("--plot", "p.png", "--operators"),
        ("--plot", "p.png", "--only", "costs"),
        ("--repeats", "3", "--operators"),
        ("--repeats", "3", "--only", "costs"),
        ("--budget", "9", "--operators"),
        ("--cases", "nothing"),
        ("--operators", "--cases", "decode"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "bf16_speedup", lambda: 0.1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out


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
    limits = {"train_max": (40, 98), "train_fast": (26, 104), "train_balanced": (13, 118), "train_low": (5.9, 160)}
    for name, (gib, tflop) in limits.items():
        assert ours[name]["peak_gib"] <= gib
        assert ours[name]["tflop"] <= tflop
    assert ours["denoise"]["peak_gib"] <= 5
    assert ours["decode_low"]["peak_gib"] <= 6 and ours["decode_fast"]["peak_gib"] <= 9
    assert ours["sample"]["peak_gib"] <= 6
    assert ours["encode_per_step"]["tflop"] <= 4  # the paper's recipe: 100 views for 1000 steps
    assert ours["train_balanced"]["traffic_tb"] + ours["encode_per_step"]["traffic_tb"] <= 0.55
