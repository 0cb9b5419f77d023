"""Pre-trains the embedded model on the procedural world:  python -m minimti.pretrain"""

from pathlib import Path

from minimti import cli
from minimti.checkpoint.find import WEIGHTS
from minimti.config import MODELS
from minimti.pretrain.run import NAMES, pretrain


def parse():
    parser = cli.Parser(prog="python -m minimti.pretrain", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", default="runs/tiny", metavar="FOLDER", help="where it saves and goes on (default: %(default)s)")
    add("--out", default=str(WEIGHTS / "tiny"), metavar="FOLDER", help="of the model (default: weights/tiny)")
    add("--seed", type=cli.integer(0, 2**32 - 1), default=0, help="of every random number (default: %(default)s)")
    add("--scale", type=cli.number(1e-6, 100), default=1.0, help="multiplies the steps of all stages (default: 1)")
    stages = f"of {', '.join(NAMES)} (default: all); without the first they go on with the model in --out"
    add("--stages", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=stages)
    return parser.parse_args()


def main() -> None:
    args = parse()
    pretrain(MODELS["tiny"], Path(args.run), Path(args.out), args.seed, args.scale, args.stages)


if __name__ == "__main__":
    cli.run(main)
