"""The paper's experiments on the embedded model, measured:  python -m minimti.evaluate --out FOLDER"""

import json
import time
from pathlib import Path

import torch

from minimti import cli, pipeline
from minimti.checkpoint.load import open_checkpoint
from minimti.evaluate.evaluation import Evaluation
from minimti.evaluate.experiments import EXPERIMENTS
from minimti.invert import recipe
from minimti.io.files import InputError, atomic_write, check_writable, make_folder
from minimti.world import captions
from minimti.world.clips import check_sizes

DETAILS = ("deviation", "loss", "plain", "own colour", "own shape")  # what a table's last column says of a figure


def lines(name: str, result: dict) -> list[str]:
    """The rows of a table: what was measured, its main figure, and its spread."""
    rows = []
    for label, part in ((name, result), *((f"{name}: {key}", value) for key, value in result.items())):
        if not isinstance(part, dict):
            continue
        for figure in ("error", "rate"):
            if part.get(figure) is not None:
                more = [f"{key} {part[key]:.4g}" for key in DETAILS if key in part]
                more += [
                    f"{key} {', '.join(f'{e:.4g}' for e in part[key])}" for key in ("seeds", "losses") if key in part
                ]
                more += [f"of {part['pairs']} pairs"] if "pairs" in part else []
                rows.append(f"| {label} | {figure} | {part[figure]:.2f} | {'; '.join(more)} |")
    return rows


def parse():
    parser = cli.Parser(prog="python -m minimti.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", metavar="NAME|PATH", help="a model made by minimti.pretrain (default: %(default)s)")
    add("--out", default="runs/evaluate", metavar="FOLDER", help="of the pictures (default: %(default)s)")
    add("--json", metavar="FILE", help="the figures, by experiment")
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    add("--motions", type=cli.integer(1, 1000), default=8, help="reference clips (default: %(default)s)")
    add("--targets", type=cli.integer(2, 1000), default=4, help="of each motion (default: %(default)s)")
    add("--steps", type=cli.integer(1, 10**6), help="of an inversion (default: the model's); the paper's takes twice")
    add("--seed", type=cli.integer(0, 2**32 - 1), default=0, help="of every random number (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.json:
        check_writable(args.json)
    checkpoint = open_checkpoint(args.model)
    check_sizes(checkpoint.config)
    table = captions.load(checkpoint.path.with_name("words.safetensors"))
    if table.word.weight.shape[1] != checkpoint.config.unet.context_dim:
        raise InputError(f"{checkpoint.path}: its words are not those of words.safetensors beside it")
    make_folder(args.out)
    svd = pipeline.load(checkpoint, torch.device("cpu"), torch.float32).requires_grad_(False)
    steps = args.steps or recipe(svd.config)["steps"]
    lab = Evaluation(svd, table, args.seed, args.motions, args.targets, steps, Path(args.out))
    results = {}
    print("| experiment | figure | mean | spread |\n|---|---|---|---|")
    for name in args.only or EXPERIMENTS:
        began = time.perf_counter()
        results[name] = EXPERIMENTS[name](lab)
        results[name]["seconds"] = time.perf_counter() - began
        print(*lines(name, results[name]), sep="\n", flush=True)
        if args.json:
            with atomic_write(args.json) as part:
                part.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
