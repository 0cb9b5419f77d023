"""What is written, printed and drawn, and what a budget leaves out."""

import json
import signal
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from minimti.bench.cost import Cost
from minimti.bench.measure import Line, summarise
from minimti.bench.report import Item, NotMeasurable, Report, plot, table, work

LINE = Line("train_fast", "ours", "graph", 8.0, 0.4, 0.39, 0.41, allocated_gib=20.0, reserved_gib=25.0)
LINES = [
    LINE,
    replace(LINE, library="diffusers", form="eager", seconds=0.5),
    replace(LINE, case="train_low", seconds=0.6),
    replace(LINE, case="denoise", seconds=0.3),
]


def report(path=None) -> Report:
    return Report("a card", {"torch": "2.14"}, "python -m minimti.bench", path)


class Clock:
    """Time passes only while something is measured."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def item(self, name, expected, takes=None):
        def measure(report):
            self.seconds += expected if takes is None else takes
            report.lines.append(replace(LINE, case=name))

        return Item(name, expected, measure)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]


# ---------------------------------------------------------------------------------------------- a budget


def test_what_no_longer_fits_is_skipped_and_listed_and_what_still_fits_is_measured():
    clock, found = Clock(), report()
    clock.seconds = 1000
    work(found, [clock.item("a", 40), clock.item("slow", 61), clock.item("b", 60), clock.item("c", 1)], 100, clock)
    assert [line.case for line in found.lines] == ["a", "b"]
    assert found.skipped == {"slow": "takes about 61 s, 60 s were left", "c": "takes about 1 s, 0 s were left"}
    assert "not measured: slow: takes about 61 s" in str(found)
    assert found.failed == 0


def test_without_a_budget_everything_is_measured_in_the_given_order():
    clock, found = Clock(), report()
    work(found, [clock.item(name, 1e6) for name in "cab"], None, clock)
    assert [line.case for line in found.lines] == ["c", "a", "b"] and not found.skipped


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
def test_what_runs_when_the_budget_ends_is_stopped_even_where_it_catches_errors():
    def long(_):
        for _ in range(2):
            try:
                threading.Event().wait(1)
            except Exception:
                continue

    found, before = report(), signal.getsignal(signal.SIGALRM)
    work(found, [Item("long", 0.1, long)], 0.2, lambda: 0.0)
    assert found.skipped == {"long": "stopped at the end of the budget"} and found.failed == 0
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_every_line_is_saved_before_the_next_is_measured(tmp_path):
    """So that a run that is killed keeps its lines."""
    saved, clock, found = [], Clock(), report(tmp_path / "b.json")

    def look(_):
        saved.append(json.loads((tmp_path / "b.json").read_text()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(found, [clock.item("first", 1), clock.item("second", 1), Item("look", 1, look)], None, clock)
    assert [line["case"] for line in saved[0]["lines"]] == ["first", "second"]


def test_a_failure_is_listed_and_the_work_goes_on(capsys):
    def fail(_):
        raise RuntimeError("no such kernel\nand a second line")

    def refuse(_):
        raise NotMeasurable("the card is too small")

    def fill_the_card(_):
        raise torch.OutOfMemoryError("tried to allocate 60 GiB")

    clock, found = Clock(), report()
    items = [Item("bad", 1, fail), Item("large", 1, refuse), Item("larger", 1, fill_the_card), clock.item("good", 1)]
    work(found, items, None, clock)
    assert [line.case for line in found.lines] == ["good"]
    assert found.skipped == {
        "bad": "failed: RuntimeError: no such kernel",
        "large": "the card is too small",
        "larger": "not enough memory",
    }
    assert found.failed == 1
    assert "Traceback" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- JSON, tables, a plot


def test_json_has_everything(tmp_path):
    found = report(tmp_path / "b.json")
    found.lines += LINES
    found.ratios["denoise"] = summarise("graph", [1.0], [2.0])
    found.costs["denoise"] = Cost(1, 2, 3, 4), Cost(1, 4, 3, 4)
    found.costs["sample"] = Cost(1, 2, 3, 4), None
    found.kernels["denoise/ours/graph"] = {"norms": 3.0}
    found.processes["train_cold"] = {"wall": 30.0}
    found.skipped["decode"] = "too slow"
    found.save()
    read = json.loads((tmp_path / "b.json").read_text())
    first = {"case": "train_fast", "library": "ours", "form": "graph", "seconds": 0.4, "reserved_gib": 25.0}
    assert first.items() <= read["lines"][0].items() and len(read["lines"]) == 4
    assert read["ratios"]["denoise"]["ratio"] == 2
    assert read["costs"]["denoise"]["peak_gib"] == 2 and read["costs"]["denoise"]["diffusers"]["peak_gib"] == 4
    assert read["costs"]["sample"]["diffusers"] is None
    assert read["kernels"] == {"denoise/ours/graph": {"norms": 3}} and read["skipped"] == {"decode": "too slow"}
    assert read["processes"] == {"train_cold": {"wall": 30}}
    assert (read["hardware"], read["command"]) == ("a card", "python -m minimti.bench")
    assert read["versions"] == {"torch": "2.14"}


def test_the_table_of_lines_compares_with_diffusers_as_it_comes():
    found = report()
    found.lines += LINES
    head, _, *rows = cells(str(found))
    assert head[-3:] == ["GiB allocated", "GiB reserved", "times diffusers"]
    ours = ["train_fast", "ours", "graph", "8.0", "0.400", "0.390..0.410", "20.00", "25.00", "1.25"]
    assert rows[0] == ours
    assert [row[-1] for row in rows] == ["1.25", "1.00", "-", "-"]


def test_the_table_leaves_out_what_was_not_measured():
    found, cost = report(), Cost(weights_gib=1, peak_gib=2, tflop=31.2, traffic_tb=0.1)
    found.costs |= {"train": (cost, replace(cost, peak_gib=4, traffic_tb=0.2)), "sample": (cost, None)}
    found.ratios["train"] = summarise("eager", [0.5], [0.75])
    head, line, train, sample = cells(str(found))
    assert head[:5] == ["ours / diffusers", "peak GiB", "TFLOP", "TB moved", "A100 s, at least"]
    assert head[5:] == ["our form", "s by turns", "diffusers : ours"]
    assert set("".join(line)) == {"-"}
    moved = ["0.100 / 0.200", "0.100 / 0.100"]
    assert train == ["train", "2.00 / 4.00", "31.20 / 31.20", *moved, "eager", "0.500 / 0.750", "1.50 (1.50..1.50)"]
    assert sample == ["sample", "2.00 / -", "31.20 / -", "0.100 / -", "0.100 / -", "-", "-", "-"]
    found.ratios.clear()
    assert cells(str(found))[0] == head[:5]
    assert table([["only", "a head"]]) == ""


def test_kernels_and_processes_are_tables_too():
    found = report()
    found.kernels |= {"denoise/ours/graph": {"norms": 3.04}, "denoise/diffusers/eager": {"norms": 5.0, "idle": 1.0}}
    found.processes["train_cold"] = {"wall": 30.0}
    head, _, *rows = cells(str(found).partition("| process")[0])
    assert head == ["GPU time, ms", "norms", "idle"]
    assert rows == [["denoise/ours/graph", "3.0", "-"], ["denoise/diffusers/eager", "5.0", "1.0"]]
    assert "train_cold" in str(found) and "30.000" in str(found)


def test_the_plot_is_a_png_with_a_mark_for_every_line(tmp_path):
    def coloured(lines) -> int:
        plot(lines, tmp_path / "p.png")
        with Image.open(tmp_path / "p.png") as picture:
            assert picture.format == "PNG" and picture.width > 1000
            return sum(picture.convert("HSV").getchannel("S").histogram()[128:])

    assert coloured(LINES) > coloured([])  # without lines there are the marks of the legends
