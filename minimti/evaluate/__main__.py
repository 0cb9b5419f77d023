"""The paper's experiments on the embedded model:  python -m minimti.evaluate --seeds 0 1 2 --json found.json"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from minimti import cli, pipeline
from minimti.checkpoint.fingerprint import fingerprint
from minimti.checkpoint.load import open_checkpoint
from minimti.evaluate.evaluation import Evaluation, Settings
from minimti.evaluate.experiments import EXPERIMENTS
from minimti.evaluate.results import HEADER, Results
from minimti.invert import make_recipe
from minimti.io.files import InputError, check_writable, make_folder
from minimti.world import captions
from minimti.world.clips import check_sizes


def parse() -> argparse.Namespace:
    """The command line. Ends the program with exit code 2 where it is wrong."""
    parser = cli.Parser(prog="python -m minimti.evaluate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", metavar="NAME|PATH", help="a model made by minimti.pretrain (default: %(default)s)")
    names = ", ".join(EXPERIMENTS)
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=f"experiments: {names} (default: all)")
    seed = cli.integer(0, 2**31 - 1)
    add("--seeds", type=seed, nargs="+", default=[0], metavar="SEED", help="each draws other motions (default: 0)")
    add("--motions", type=cli.integer(1, 1000), default=Settings.motions, help="per seed (default: %(default)s)")
    add("--targets", type=cli.integer(2, 1000), default=Settings.targets, help="per motion (default: %(default)s)")
    add(
        "--steps",
        type=cli.integer(1, 10**6),
        help="steps per inversion (default: the recipe's); the paper's takes twice",
    )
    add(
        "--out",
        default="runs/evaluate",
        metavar="FOLDER",
        help="for the pictures of each seed (default: %(default)s)",
    )
    add("--device", default="cpu", help="cuda, cpu, ...; results differ by rounding (default: %(default)s)")
    add("--json", metavar="FILE", help="for all numbers; if it exists, experiments that it holds are not run again")
    return parser.parse_args()


def main() -> None:
    """Runs the experiments for each seed and prints their table. Raises InputError where an input is unusable."""
    args = parse()
    if args.json:
        check_writable(args.json)
    checkpoint = open_checkpoint(args.model)
    check_sizes(checkpoint.config)
    words = captions.load(checkpoint.path.with_name("words.safetensors"))
    if words.word.weight.shape[1] != checkpoint.config.unet.context_dim:
        raise InputError(f"{checkpoint.path}: does not fit words.safetensors in its folder; they have another width")
    svd = pipeline.load(checkpoint, device=args.device)
    words.to(args.device)
    settings = Settings(motions=args.motions, targets=args.targets, steps=args.steps)
    determinants = {**asdict(settings), "recipe": asdict(make_recipe(svd.config))}
    results = Results(Path(args.json) if args.json else None, determinants, fingerprint(svd.unet))
    seeds = [*dict.fromkeys(args.seeds)]
    folders = {seed: Path(args.out) / f"seed{seed}" for seed in seeds}
    for folder in folders.values():
        make_folder(folder)
    evaluations = {seed: Evaluation(svd, words, seed, settings, folder) for seed, folder in folders.items()}

    print(HEADER)
    for name in args.only or EXPERIMENTS:
        for seed, evaluation in evaluations.items():
            if not results.has(seed, name):
                began = time.perf_counter()
                result = EXPERIMENTS[name](evaluation)
                results.add(seed, name, result, time.perf_counter() - began)
        for line in results.table(name, seeds):
            print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
