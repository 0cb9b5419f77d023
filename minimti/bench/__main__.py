"""Compares the cost of training and sampling with diffusers, ours / diffusers:  python -m minimti.bench

Costs follow from shapes alone: the official size in bf16. Times are measured on this machine with the same random
weights: on a GPU the same steps, one library in memory after the other; on a CPU, which would need hours for those, the
full-size UNet on a smaller clip, by turns. Where a step is called compiled, our UNet is; diffusers' never is.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import minimti
from minimti import cli
from minimti.bench.cases import Case, cpu_cases, official_cases
from minimti.bench.measure import CostPair, Timing, cell, clock, encoding_per_step, estimate, table
from minimti.config import MODELS, SVDConfig
from minimti.hardware import bf16_speedup
from minimti.invert import make_recipe
from minimti.io.files import InputError, atomic_write, check_writable

EMULATED = 0.5  # a bf16_speedup below it means that the processor does not multiply in bf16 itself


@dataclass
class Report:
    """What was found so far."""

    hardware: str
    versions: dict[str, str]
    path: Path | None = None  # written by `save`
    costs: dict[str, CostPair] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)

    def save(self) -> None:
        """Writes everything as JSON to `path`, if there is one. Raises InputError where it cannot be written."""
        if self.path is None:
            return
        costs = {name: asdict(a) | {"diffusers": b and asdict(b)} for name, (a, b) in self.costs.items()}
        timings = {name: asdict(timing) for name, timing in self.timings.items()}
        found = {"costs": costs, "ratios": timings, "hardware": self.hardware, "versions": self.versions}
        with atomic_write(self.path) as part:
            part.write_text(json.dumps(found, indent=2) + "\n")

    def __str__(self) -> str:
        versions = ", ".join(map(" ".join, self.versions.items()))
        return f"ours / diffusers; {self.hardware}; {versions}\n{table(self.costs, self.timings)}"


def parse(argv: Sequence[str] | None):
    """The arguments; None stands for those of the process."""
    parser = cli.Parser(prog="python -m minimti.bench", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there, after every step")
    parser.add_argument("--only", choices=("costs", "ratios"), help="half of the work (default: both)")
    parser.add_argument("--repeats", type=cli.integer(1, 1000), default=5, help="runs to time (default: %(default)s)")
    return parser.parse_args(argv)


def compare(
    report: Report, estimated: Mapping[str, Case], timed: Mapping[str, Case], device: str, repeats: int
) -> None:
    """Estimates some cases, times others, and prints the report.

    Each result is saved before the next case begins. An error or an interrupt loses nothing that was found before it.
    """
    try:
        for name, case in estimated.items():
            print(f"estimating {name}", file=sys.stderr)
            report.costs[name] = estimate(case)
            if name == "encode":
                share = encoding_per_step(report.costs[name][0], make_recipe(case.config), case.config.num_frames)
                report.costs["encode_per_step"] = share, None
            report.save()
        for name, case in timed.items():
            if not case.step.repeatable:
                continue
            print(f"timing {name}", file=sys.stderr)
            report.timings[name] = timing = clock(case, device, repeats, by_turns=device == "cpu")
            report.save()
            print(f"  {cell([timing.ours_s, timing.diffusers_s], 3)} s", file=sys.stderr)
    finally:
        print(report)


def main(argv: Sequence[str] | None = None, config: SVDConfig = MODELS["svd"]) -> None:
    """Runs the benchmark of a model's sizes with the given command-line arguments."""
    args = parse(argv)
    path = check_writable(args.json) if args.json else None
    try:
        import diffusers
    except ImportError as error:
        raise InputError("diffusers, to compare with, is not installed: pip install -e '.[test]'") from error
    versions = {"minimti": minimti.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    if torch.cuda.is_available():
        device, hardware, timed = "cuda", torch.cuda.get_device_name(), official_cases(config)
    else:
        device, hardware = "cpu", f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
        bf16 = args.only != "costs" and bf16_speedup() > EMULATED
        if args.only != "costs" and not bf16:
            print("no times in bf16: this processor only emulates it", file=sys.stderr)
        timed = cpu_cases(config, bf16)
    report = Report(hardware, versions, path)
    estimated = {} if args.only == "ratios" else official_cases(config)
    compare(report, estimated, {} if args.only == "costs" else timed, device, args.repeats)


if __name__ == "__main__":
    cli.run(main)
