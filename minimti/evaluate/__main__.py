"""The paper's experiments on the embedded model:  python -m minimti.evaluate --seeds 0 1 2 --json found.json

Seeds 0 to 4 are for whatever is tuned. Seeds 21 to 25 are for reports: nothing is decided by what they show.
"""

if __name__ == "__main__":  # before anything else is imported: from here on a signal ends the program with one line
    from minimti import signals

    signals.install(signals.end)


import argparse
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from minimti import cli
from minimti.config import DTYPES
from minimti.evaluate.evaluation import NUM_REFERENCES, Settings, weights_of
from minimti.evaluate.experiments import EXPERIMENTS
from minimti.evaluate.results import HEADER, Results
from minimti.evaluate.tasks import Task, load, run
from minimti.invert import make_recipe
from minimti.io.files import check_writable
from minimti.jobs import in_processes


def parse() -> argparse.Namespace:
    """The command line. Ends the program with exit code 2 where it is wrong."""
    parser = cli.Parser(prog="python -m minimti.evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", default="tiny", metavar="NAME|PATH", help="a model made by minimti.pretrain (default: %(default)s)")
    names = ", ".join(EXPERIMENTS)
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=f"experiments: {names} (default: all)")
    seed = cli.integer(0, 2**31 - 1)
    add("--seeds", type=seed, nargs="+", default=[0], metavar="SEED", help="each draws other motions (default: 0)")
    add("--motions", type=cli.integer(1, 1000), default=Settings.motions, help="per seed (default: %(default)s)")
    add("--targets", type=cli.integer(2, 1000), default=Settings.targets, help="per motion (default: %(default)s)")
    steps = (
        f"steps of the model's own recipe, at least {NUM_REFERENCES}; others keep their ratio to it (default: its own)"
    )
    add("--steps", type=cli.integer(NUM_REFERENCES, 10**6), help=steps)
    out = "for pictures and embeddings of each seed; embeddings that are there are not learned again, so name another"
    add("--out", default="runs/evaluate", metavar="FOLDER", help=f"{out} after a change of code (default: %(default)s)")
    add("--json", metavar="FILE", help="for all numbers; if it exists, experiments that it holds are not run again")
    add("--jobs", type=cli.integer(1, 1000), default=1, metavar="K", help="processes that share the work (default: 1)")
    add("--device", default="cpu", help="cuda, cpu, ...; results differ by rounding (default: %(default)s)")
    precision = "precision of UNet and image encoder (default: bfloat16 on cuda, else float32)"
    add("--dtype", choices=DTYPES, help=precision)
    return parser.parse_args()


def main() -> None:
    """Runs the experiments for each seed and prints their table. Raises InputError where an input is unusable."""
    args = parse()
    if args.json:
        check_writable(args.json)  # before a model is loaded
    settings = Settings(motions=args.motions, targets=args.targets, steps=args.steps)
    task = Task(args.model, args.device, args.dtype, settings, Path(args.out))
    svd, _ = load(task)
    determinants = {**asdict(settings), "recipe": asdict(make_recipe(svd.config)), "dtype": str(svd.dtype)}
    results = Results(Path(args.json) if args.json else None, determinants, weights_of(svd))
    names, seeds = args.only or [*EXPERIMENTS], [*dict.fromkeys(args.seeds)]
    missing = [(task, name, seed) for name in names for seed in seeds if not results.has(seed, name)]

    print(HEADER, flush=True)
    with closing(in_processes(run, missing, args.jobs)) as found:
        for name in names:
            while not all(results.has(seed, name) for seed in seeds):
                results.add(*next(found))
            for line in results.table(name, seeds):
                print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
