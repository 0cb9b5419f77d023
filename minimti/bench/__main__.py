"""Speed and memory of training and sampling, beside diffusers:  python -m minimti.bench

On a GPU: the steps at the official size with random weights, each library and form with nothing else in memory; then
both by turns. On a CPU, which would need hours for those: the full-size UNet on a smaller clip, by turns. And costs at
the official size, which follow from shapes alone. Every result is written to --json as soon as it is there.
"""

if __name__ == "__main__":  # before anything else is imported: from here on a signal ends the program with one line
    from minimti import signals

    signals.install(signals.end)


import functools
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import minimti
from minimti import cli
from minimti.bench import operators, processes, profiling
from minimti.bench.cases import LIBRARIES, Case, build, cpu_cases, inputs, official_cases, start, timed_cases
from minimti.bench.measure import Ratio, alone, by_turns, encoding_per_step, estimate, free
from minimti.bench.report import Item, NotMeasurable, Report, plot, work, write_json
from minimti.config import MODELS, SVDConfig
from minimti.hardware import bf16_speedup
from minimti.invert import make_recipe
from minimti.io.files import InputError, check_writable

EMULATED = 0.5  # a bf16_speedup below it means that the processor does not multiply in bf16 itself
REPEATS = 5
FITS = 0.9  # the share of a card's memory that two libraries by turns may take

# Seconds that an item takes, from the runs on an H100 and on 2 CPU cores: for the order and the budget.
RANKS = {"graph": 0, "eager": 0, "channels_last": 1, "by_turns": 2, "compiled": 3}
BY_TURNS = ("denoise", "train_balanced", "train_max", "encode", "decode")  # the precisions that are the defaults
ALONE_S = {"graph": 10.0, "eager": 10.0, "channels_last": 10.0, "compiled": 80.0}
DIFFUSERS_COMPILED_S = 150.0
BY_TURNS_S = 25.0
CPU_S = {"tiny_train_compiled": 90.0, "tiny_train": 15.0, "train": 150.0, "denoise": 130.0}
COST_S = 15.0
KERNELS_S = 20.0
PROCESS_S = {"write": 40.0, "train_cold": 70.0, "sample_cold": 60.0, "train_warm": 50.0, "sample_warm": 45.0}


def parse(argv: Sequence[str] | None):
    """The arguments; None stands for those of the process."""
    parser = cli.Parser(prog="python -m minimti.bench", description=__doc__)
    add = parser.add_argument
    cases = (
        "only these: names or shell patterns of a step (denoise, 'train_*') or of a line of the report"
        " ('denoise/ours/*')"
    )
    add("--cases", nargs="+", metavar="NAME", help=cases)
    budget = "seconds in all; cheapest and most telling first; what does not fit is listed"
    add("--budget", type=cli.number(0, 1e6), metavar="SECONDS", help=budget)
    add("--repeats", type=cli.integer(1, 1000), metavar="N", help=f"runs to time (default: {REPEATS})")
    add("--json", metavar="FILE", help="also write the numbers there, after every step")
    add("--plot", metavar="FILE", help="also draw time against memory there, as a PNG (on a GPU)")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--only", choices=("costs", "ratios"), help="from shapes, or measured (default: both)")
    what("--operators", action="store_true", help="instead: operators, bytes and layouts of a step, from shapes alone")
    what("--kernels", action="store_true", help="instead: GPU time of a step by kind of kernel")
    what("--processes", action="store_true", help="instead: whole train.py and sample.py processes, cold and warm")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------- what to measure


def gpu_items(config: SVDConfig, repeats: int, device: str = "cuda") -> list[Item]:
    """Every step in every form, the cheapest and most telling first: what needs a compiler comes last."""
    found: list[tuple[int, Item]] = []
    for name, case in timed_cases(config).items():
        for library, forms in case.forms.items():
            for form in forms:
                rank, expected = RANKS[form], ALONE_S[form]
                if (library, form) == ("diffusers", "compiled"):
                    rank, expected = rank + 1, DIFFUSERS_COMPILED_S
                found.append((rank, _alone_item(name, case, library, form, device, repeats, expected)))
        if case.compared and name in BY_TURNS:
            found.append((RANKS["by_turns"], _turns_item(name, case, device, repeats)))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def _alone_item(name: str, case: Case, library: str, form: str, device: str, repeats: int, expected_s: float) -> Item:
    def measure(report: Report) -> None:
        line = alone(name, case, library, form, device, repeats)
        report.lines.append(line)
        gib = "" if line.reserved_gib is None else f", {line.reserved_gib:.2f} GiB reserved"
        _note(f"first {line.first_s:.1f} s, then {line.seconds:.3f} s{gib}")

    return Item(f"{name}/{library}/{form}", expected_s, measure)


def _turns_item(name: str, case: Case, device: str, repeats: int) -> Item:
    """Our fastest form that was measured, beside diffusers as it comes; only where both fit into memory."""

    def measure(report: Report) -> None:
        ours = [line for line in report.find(name, "ours") if line.form != "compiled"]
        theirs = [line for line in report.find(name, "diffusers") if line.form == "eager"]
        if not (ours and theirs):
            raise NotMeasurable("not both libraries were measured alone")
        best = min(ours, key=lambda line: line.seconds)
        needed = (best.reserved_gib or 0) + (theirs[0].reserved_gib or 0)
        total = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else float("inf")
        if needed > FITS * total:
            raise NotMeasurable(f"both need {needed:.0f} GiB of {total:.0f} GiB at once")
        _add_ratio(report, name, by_turns(case, best.form, device, repeats))

    return Item(f"{name}/by_turns", BY_TURNS_S, measure)


def cpu_items(config: SVDConfig, repeats: int) -> list[Item]:
    """Small steps of both libraries by turns, those of the tiny UNet first."""
    speedup = functools.cache(bf16_speedup)  # measured where a step in bf16 is due, once for all of them

    def item(name: str, case: Case, form: str) -> Item:
        def measure(report: Report) -> None:
            if case.dtype == torch.bfloat16 and speedup() < EMULATED:
                raise NotMeasurable("this processor only emulates bf16")
            _add_ratio(report, name, by_turns(case, form, "cpu", repeats))

        return Item(name, next(seconds for part, seconds in CPU_S.items() if name.startswith(part)), measure)

    items = [item(name, case, form) for name, (case, form) in cpu_cases(config).items()]
    return sorted(items, key=lambda item: item.expected_s)


def cost_items(config: SVDConfig) -> list[Item]:
    """Costs from shapes."""

    def item(name: str, case: Case) -> Item:
        def measure(report: Report) -> None:
            report.costs[name] = estimate(case)
            if name == "encode":
                share = encoding_per_step(report.costs[name][0], make_recipe(config), config.num_frames)
                report.costs["encode_per_step"] = share, None

        return Item(f"{name}/costs", COST_S, measure)

    return [item(name, case) for name, case in official_cases(config).items()]


def kernel_items(config: SVDConfig, device: str = "cuda") -> list[Item]:
    """GPU time of a denoising and of a training step, of ours as a graph and eager, and of diffusers."""
    cases = timed_cases(config)

    def item(name: str, library: str, form: str) -> Item:
        def measure(report: Report) -> None:
            free(device)
            case = cases[name]
            step = start(build(LIBRARIES[library], case, device), case, form, inputs(case, device))
            step()
            report.kernels[f"{name}/{library}/{form}"] = profiling.gpu_time(step)

        return Item(f"{name}/{library}/{form}", KERNELS_S, measure)

    forms = [("ours", "graph"), ("ours", "eager"), ("diffusers", "eager")]
    return [item(name, *form) for form in forms for name in ("denoise", "train_balanced")]


def process_items(programs: processes.Programs) -> list[Item]:
    """Both programs, cold and then warm."""
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "write": programs.write,
        "train_cold": lambda: programs.train(cold=True),
        "sample_cold": lambda: programs.sample(cold=True),
        "train_warm": lambda: programs.train(cold=False),
        "sample_warm": lambda: programs.sample(cold=False),
    }

    def item(name: str) -> Item:
        def measure(report: Report) -> None:
            report.processes[name] = runs[name]()
            _note(", ".join(f"{what} {seconds:.3g}" for what, seconds in report.processes[name].items()))

        return Item(name, PROCESS_S[name], measure)

    return [item(name) for name in runs]


def _add_ratio(report: Report, name: str, ratio: Ratio) -> None:
    report.ratios[name] = ratio
    _note(f"{ratio.ours_s:.3f} / {ratio.diffusers_s:.3f} s, diffusers : ours {ratio.ratio:.2f}")


def _note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def chosen(items: Sequence[Item], patterns: Sequence[str] | None) -> list[Item]:
    """The items whose name, or its part before the first slash, matches one of the shell patterns; None: all.

    Raises InputError where a pattern matches none.
    """
    if patterns is None:
        return list(items)

    def matches(item: Item, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in (item.name, item.name.partition("/")[0]))

    for pattern in patterns:
        if not any(matches(item, pattern) for item in items):
            known = ", ".join(dict.fromkeys(item.name.partition("/")[0] for item in items))
            raise InputError(f"--cases {pattern}: there is none of that name here; name some of {known}")
    return [item for item in items if any(matches(item, pattern) for pattern in patterns)]


# ---------------------------------------------------------------------------------------------- the command


def hardware(gpu: bool) -> str:
    """The name of the card, or what is known of the CPU."""
    if gpu:
        return torch.cuda.get_device_name()
    return f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What the numbers depend on, where it is installed."""
    found = {"minimti": minimti.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def has_diffusers() -> bool:
    """Whether diffusers, which only the extra `test` installs, is here."""
    return find_spec("diffusers") is not None


def count_operators(config: SVDConfig, patterns: Sequence[str] | None, path: Path | None) -> None:
    """Prints the counts of both libraries, of ours alone without diffusers, and writes ours as JSON."""
    libraries = ["ours", "diffusers"] if has_diffusers() else ["ours"]
    found: dict[str, dict[str, operators.Count]] = {library: {} for library in LIBRARIES}
    cases = operators.counted_cases(config)
    names = [item.name for item in chosen([Item(name, 0, lambda _: None) for name in cases], patterns)]
    for name in names:
        case, device = cases[name]
        for library in libraries[: 1 + case.compared]:
            found[library][name] = operators.count(case, device, library)
        if path:
            write_json(path, operators.as_json(found["ours"]))
    print("ours / diffusers, one step; denoising on fake tensors of a GPU, training on those of a CPU")
    print(operators.as_table(found["ours"], found["diffusers"]))


def plan(config: SVDConfig, only: str | None, repeats: int) -> list[Item]:
    """For a model's sizes: what to measure on this machine, in order."""
    costs = [] if only == "ratios" else cost_items(config)
    if only == "costs":
        return costs
    if torch.cuda.is_available():
        return gpu_items(config, repeats) + costs
    return costs + cpu_items(config, repeats)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; a failure of something that it measures ends it with 1, after all else.

    Raises InputError where diffusers, a GPU or the programs are missing, or a file cannot be written.
    """
    args, began = parse(argv), time.monotonic()
    path = check_writable(args.json) if args.json else None
    picture = check_writable(args.plot) if args.plot else None
    config, gpu = MODELS["svd"], torch.cuda.is_available()
    timed = not (args.operators or args.kernels or args.processes or args.only == "costs")
    if (picture or args.repeats) and not timed:
        raise InputError(
            "--plot and --repeats are for timed steps: they go with --only ratios, or without such an option"
        )
    if args.operators and args.budget is not None:
        raise InputError("--budget does not go with --operators, which takes half a minute; choose with --cases")
    if not gpu and (args.kernels or picture):
        raise InputError(f"--{'kernels' if args.kernels else 'plot'} needs a GPU, and there is none here")
    if args.operators:
        return count_operators(config, args.cases, path)
    if not args.processes and not has_diffusers():
        raise InputError("diffusers, to compare with, is not installed: pip install -e '.[test]'")

    command = shlex.join(["python", "-m", "minimti.bench", *(sys.argv[1:] if argv is None else argv)])
    report = Report(hardware(gpu), versions(), command, path)
    with ExitStack() as stack:
        if args.processes:
            processes.check_programs()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            items = process_items(processes.Programs(folder, config, "cuda" if gpu else "cpu"))
        elif args.kernels:
            items = kernel_items(config)
        else:
            items = plan(config, args.only, args.repeats or REPEATS)
        items = chosen(items, args.cases)
        try:
            left = None if args.budget is None else args.budget - (time.monotonic() - began)
            work(report, items, left, time.monotonic)
        finally:
            print(report, flush=True)
            if picture:
                plot(report.lines, picture)
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
