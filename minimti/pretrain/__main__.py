"""Pre-trains the embedded model on the procedural world:  python -m minimti.pretrain"""

if __name__ == "__main__":  # before anything else is imported: from here on a signal ends the program with one line
    from minimti import signals

    signals.install(signals.end)


import argparse
from dataclasses import replace
from pathlib import Path

from minimti import cli, pipeline
from minimti.checkpoint.find import WEIGHTS
from minimti.config import MODELS
from minimti.pretrain.run import pretrain
from minimti.pretrain.state import DEFAULT, begin, with_batch

NAMES = [stage.name for stage in DEFAULT.stages]


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = cli.Parser(
        prog="python -m minimti.pretrain", description="Pre-trains the embedded model on the procedural world."
    )
    add = parser.add_argument
    add(
        "--run",
        default="runs/tiny",
        metavar="FOLDER",
        help="where the run saves its state, and resumes from it; for one process at a time (default: %(default)s)",
    )
    out = "where the model goes at the end, in place of the one that is there (default: weights/tiny)"
    add("--out", default=str(WEIGHTS / "tiny"), metavar="FOLDER", help=out)
    add("--seed", type=cli.integer(0, 2**32 - 1), default=0, help="for all random draws (default: %(default)s)")
    add("--scale", type=cli.number(1e-6, 100), default=1.0, help="multiplies the steps of all stages (default: 1)")
    add(
        "--stages",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="NAME",
        help=f"any of {', '.join(NAMES)} (default: all); without the first, the model in --out is trained further",
    )
    add("--lr", type=cli.number(1e-6, 1), default=DEFAULT.lr, help="largest learning rate (default: %(default)s)")
    batch = "clips in a step of captions and images; the number of encoded clips grows with it (default: %(default)s)"
    add("--batch", type=cli.integer(1, 10**4), default=DEFAULT.batch, help=batch)
    add("--jobs", type=cli.integer(1, 1000), default=1, metavar="K", help="processes that draw clips (default: 1)")
    add("--device", default="cpu", help="cuda, cpu, ...; a run can go on on another one (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse()
    device = pipeline.check_device(args.device)
    settings = replace(with_batch(DEFAULT, args.batch), lr=args.lr)
    folders = Path(args.run), Path(args.out)
    pretrain(begin(MODELS["tiny"], *folders, args.seed, args.scale, args.stages, settings, device, args.jobs))


if __name__ == "__main__":
    cli.run(main)
