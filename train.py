"""Learn the motion of one reference video as an embedding:  python train.py ref.mp4 --out m.pt"""

import argparse
import time

from minimti import cli
from minimti.config import NUM_TOKENS, RECIPES
from minimti.io.files import check_writable, require_file


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = cli.Parser(prog="train.py", description=__doc__)
    clip = parser.add_argument_group("clip").add_argument
    clip("video", metavar="VIDEO", help="the clip whose motion is learned")
    clip(
        "--start", type=cli.number(0, 1e6), default=0.0, metavar="SECONDS", help="time of the first frame (default: 0)"
    )
    clip("--end", type=cli.number(0, 1e6), metavar="SECONDS", help="spread the frames evenly from --start to here")
    clip("--stride", type=cli.integer(1, 10**6), default=1, metavar="K", help="take every K-th frame (default: 1)")
    clip("--frames", type=cli.integer(1, 1000), metavar="F", help="frames to learn from (default: the model's)")
    clip("--size", type=cli.size, metavar="WxH", help="crop and resize to it (default: the model's, 1024x576 for svd)")
    clip("--no-flip", action="store_true", help="never mirror the clip: for motions with a left and a right")

    group = parser.add_argument_group("learning")
    learning = group.add_argument
    recipe = (
        "paper: Adam, 1000 steps for svd, as published for SVD (B.2). muon: half the steps and a third of the error"
        " on tiny (3 motions), never tried on SVD (default: paper for svd, muon for tiny)"
    )
    learning("--recipe", choices=RECIPES, help=recipe)
    learning("--steps", type=cli.integer(0, 10**6), help="optimisation steps (default: the recipe's)")
    learning(
        "--tokens",
        type=cli.integer(1, 1000),
        default=NUM_TOKENS,
        metavar="N",
        help="tokens per set (default: %(default)s)",
    )
    sets = "frames: a token set for each frame and one for the layers over time; shared: one for all (default: frames)"
    learning("--sets", choices=("frames", "shared"), default="frames", help=sets)
    cli.add_seed(group)

    cli.add_model_arguments(parser, default_model="auto")

    output = parser.add_argument_group("output").add_argument
    out = "the embedding; a name that ends in .safetensors gives that format (default: %(default)s)"
    output("--out", default="m.pt", metavar="FILE", help=out)

    advanced = cli.add_advanced_arguments(parser).add_argument
    advanced("--lr", type=cli.number(0, 100), help="learning rate (default: the recipe's)")
    advanced("--p-mean", type=cli.number(-10, 10), help="mean of ln(sigma) (default: the model's, 2.8 for svd)")
    advanced("--p-std", type=cli.number(0, 10), help="deviation of ln(sigma) (default: the model's, 1.6 for svd)")
    cache = "augmented views to encode once and use in turn; 0: a fresh one every step (default: paper 100, muon 25)"
    advanced("--cache", type=cli.integer(0, 10**5), metavar="K", help=cache)
    return parser.parse_args()


def main() -> None:
    """Parse, learn, report."""
    args = parse()
    from minimti import learn, make_recipe, read_clip

    require_file(args.video)
    check_writable(args.out, args.video, args.model or "")
    checkpoint, device = cli.find_model(args, "auto" if args.model is None else args.model)
    config = checkpoint.config
    recipe = cli.overridden(
        make_recipe(config, args.recipe),
        steps=args.steps,
        lr=args.lr,
        p_mean=args.p_mean,
        p_std=args.p_std,
        num_cached_views=args.cache,
    )
    which = {"start": args.start, "end": args.end, "stride": args.stride, "size": args.size}
    clip = read_clip(args.video, config, num_frames=args.frames, **which)
    print(
        f"reference  {clip.source}: {len(clip.times)} frames from {clip.times[0]:.4g} to {clip.times[-1]:.4g} s,"
        f" {clip.source_size[0]}x{clip.source_size[1]} fitted to {clip.frames.shape[-1]}x{clip.frames.shape[-2]}"
    )
    began = time.perf_counter()
    svd = cli.load_model(args, checkpoint, device)
    seconds = time.perf_counter() - began
    print(f"model      {config.name} from {checkpoint.path}, {svd.dtype} on {device}, {seconds:.1f} s")

    bars = cli.Bars()
    options = {"num_tokens": args.tokens, "shared": args.sets == "shared", "flip": not args.no_flip}
    try:
        learn(svd, clip, recipe=recipe, seed=args.seed, memory=args.memory, progress=bars, release=True, **options)
    finally:  # an interrupt at step 900 keeps the 900
        bars.close()
        motion = bars.motion
        if motion is not None and (motion.steps > 0 or recipe.steps == 0):
            motion.save(args.out)
            shape = "x".join(map(str, motion.tokens.shape))
            print(f"embedding  {args.out}: {shape} tokens after {motion.steps} steps")


if __name__ == "__main__":
    cli.run(main)
