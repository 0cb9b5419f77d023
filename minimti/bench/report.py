"""What was found so far, as JSON, as tables and as a plot; and the order in which it is found within a budget."""

import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from minimti.bench.measure import CostPair, Line, Ratio
from minimti.io.files import atomic_write


@dataclass
class Report:
    """What was found so far; `save` writes it."""

    hardware: str
    versions: Mapping[str, str]
    command: str
    path: Path | None = None  # the JSON file; None: there is none
    lines: list[Line] = field(default_factory=list)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    costs: dict[str, CostPair] = field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)  # milliseconds by category (profiling)
    processes: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds (processes)
    skipped: dict[str, str] = field(default_factory=dict)  # what was not measured, and why
    failed: int = 0  # how many of these are failures

    def save(self) -> None:
        """Writes everything as JSON to `path`, if there is one. Raises InputError where it cannot be written."""
        if self.path is not None:
            costs = {name: asdict(a) | {"diffusers": b and asdict(b)} for name, (a, b) in self.costs.items()}
            found = {name: value for name, value in asdict(self).items() if name not in ("path", "failed")}
            write_json(self.path, found | {"costs": costs})

    def __str__(self) -> str:
        versions = ", ".join(map(" ".join, self.versions.items()))
        parts = [f"{self.command}\n{self.hardware}; {versions}", self._lines(), self._ratios_and_costs()]
        parts += [matrix("GPU time, ms", self.kernels, 1), matrix("process, seconds", self.processes, 3)]
        parts += ["\n".join(f"not measured: {name}: {why}" for name, why in self.skipped.items())]
        return "\n\n".join(part for part in parts if part)

    def find(self, case: str, library: str) -> list[Line]:
        """The lines of a case and a library, in the order of measuring."""
        return [line for line in self.lines if (line.case, line.library) == (case, library)]

    def _lines(self) -> str:
        head = "step, library, form, first s, s, s min..max, GiB allocated, GiB reserved, times diffusers"
        rows = [head.split(", ")]
        for line in self.lines:
            base = [other.seconds for other in self.find(line.case, "diffusers") if other.form == "eager"]
            rows.append(
                [
                    *(line.case, line.library, line.form),
                    *(f"{line.first_s:.1f}", f"{line.seconds:.3f}", f"{line.min_s:.3f}..{line.max_s:.3f}"),
                    *(cell([value], 2) for value in (line.allocated_gib, line.reserved_gib)),
                    cell([seconds / line.seconds for seconds in base], 2),
                ]
            )
        return table(rows)

    def _ratios_and_costs(self) -> str:
        head = "ours / diffusers, peak GiB, TFLOP, TB moved, A100 s, at least"
        rows = [[*head.split(", ", 4), "our form", "s by turns", "diffusers : ours"]]
        for name in {**self.costs, **self.ratios}:
            pair, ratio = self.costs.get(name, ()), self.ratios.get(name)
            row = [name]
            for attribute, digits in (("peak_gib", 2), ("tflop", 2), ("traffic_tb", 3), ("roofline_s", 3)):
                row.append(cell([getattr(cost, attribute, None) for cost in pair], digits))
            row.append(ratio.form if ratio else "-")
            row.append(cell([ratio.ours_s, ratio.diffusers_s], 3) if ratio else "-")
            row.append(f"{ratio.ratio:.2f} ({ratio.ratio_min:.2f}..{ratio.ratio_max:.2f})" if ratio else "-")
            rows.append(row)
        return table(rows)


def write_json(path: Path, found: Any) -> None:
    """Writes JSON, whole or not at all. Raises InputError where the file cannot be written."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(found, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------- tables


def matrix(corner: str, rows: Mapping[str, Mapping[str, float]], digits: int) -> str:
    """Numbers by the names of rows and columns, as a table."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[name, *(cell([row.get(column)], digits) for column in columns)] for name, row in rows.items()]
    return table([[corner, *columns], *cells])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown with aligned columns; the first row is the head. A column of "-" is left out; "" without other rows."""
    if len(rows) < 2:
        return ""
    columns = [column for column in zip(*rows) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    lines = list(zip(*columns))
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def cell(values: Sequence[float | None], digits: int) -> str:
    """The numbers of one cell of a table, joined by slashes; "-" for None and for a cell without numbers."""
    if all(value is None for value in values):
        return "-"
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


# ---------------------------------------------------------------------------------------------- a plot


def plot(lines: Sequence[Line], path: Path) -> None:
    """Time against reserved memory of every training and denoising step on CUDA, as a PNG.

    Raises InputError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, step in zip(figure.subplots(1, 2), ("train", "denoise")):
        for library, marker in (("ours", "o"), ("diffusers", "s")):
            shown = [line for line in lines if line.case.startswith(step) and line.library == library]
            points = [(line.reserved_gib or 0.0, line.seconds) for line in shown]
            axes.scatter(*zip(*points) if points else ([], []), marker=marker, label=library)
            for line, point in zip(shown, points):
                label = f" {line.case.removeprefix(step).lstrip('_')} {line.form}"
                axes.annotate(label, point, fontsize=8, verticalalignment="center")
        axes.set(title=f"{step} step", xlabel="GiB reserved", ylabel="seconds")
        drawn = [line for line in lines if line.case.startswith(step)]
        axes.set_xlim(0, 1.4 * max([line.reserved_gib or 0.0 for line in drawn] + [1.0]))  # room for labels
        axes.set_ylim(0, 1.1 * max([line.seconds for line in drawn] + [0.01]))
        axes.legend(loc="lower right")
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)


# ---------------------------------------------------------------------------------------------- a budget


@dataclass(frozen=True)
class Item:
    """Something to measure, which puts what it finds into the report."""

    name: str  # case, library and form, joined by slashes
    expected_s: float  # how long it took before, or roughly
    measure: Callable[[Report], None]


class NotMeasurable(Exception):
    """Something that cannot be measured here and now; the message says why."""


class OutOfTime(BaseException):
    """The budget has ended. No `except Exception` on the way may take it for a failure of its own."""


def work(report: Report, items: Sequence[Item], budget: float | None, clock: Callable[[], float]) -> None:
    """Measures the items in turn, and saves the report after each.

    An item that is expected to take longer than what is left of the budget, in seconds of `clock`, is skipped; the one
    that runs when it ends is stopped. A failure is noted, and the work goes on.
    """
    began = clock()
    for item in items:
        left = None if budget is None else budget - (clock() - began)
        if left is not None and item.expected_s > left:
            report.skipped[item.name] = f"takes about {item.expected_s:.0f} s, {max(left, 0):.0f} s were left"
        else:
            print(f"measuring {item.name}", file=sys.stderr, flush=True)
            try:
                with time_limit(left):
                    item.measure(report)
            except NotMeasurable as reason:
                report.skipped[item.name] = str(reason)
            except torch.OutOfMemoryError:
                report.skipped[item.name] = "not enough memory"
            except OutOfTime:
                report.skipped[item.name] = "stopped at the end of the budget"
            except Exception as error:
                traceback.print_exc()
                first = (str(error).splitlines() or [""])[0]
                report.skipped[item.name] = f"failed: {type(error).__name__}: {first}"
                report.failed += 1
        if item.name in report.skipped:
            print(f"  not measured: {report.skipped[item.name]}", file=sys.stderr, flush=True)
        report.save()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds; None, or a system without such signals (Windows): never."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: Any) -> NoReturn:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
