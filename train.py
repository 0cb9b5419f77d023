"""Learn the motion of one reference video as an embedding:  python train.py ref.mp4 --out m.pt

Beside it, m.run/ holds the loss curve and all that --resume needs to go on.
"""

if __name__ == "__main__":  # before anything else is imported: from here on a signal ends the program with one line
    import os

    from minimti import signals

    signals.begin()
    # Threads that spin while they wait take the time of those they wait for, once a core has other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minimti import cli, signals
from minimti.config import MODELS, NUM_TOKENS, RECIPES
from minimti.io.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Callable

    from minimti import Clip, Motion, Progress
    from minimti.config import SVDConfig
    from minimti.svd import SVD

STRIP_HEIGHT = 160  # of a frame in the picture of --dry-run, at most, in pixels


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = cli.Parser(prog="train.py", description=__doc__)
    clip = parser.add_argument_group("clip").add_argument
    what = "the clip whose motion is learned: a video file, a pipe, a folder of pictures, or a pattern ('walk/*.png')"
    clip("video", metavar="CLIP", help=what)
    start = "when the clip begins, as 3.5, 0:03.5 or 1:02:03.5 (default: 0)"
    clip("--start", type=cli.seconds, default=0.0, metavar="TIME", help=start)
    clip("--end", type=cli.seconds, metavar="TIME", help="spread the frames evenly from --start to here")
    rate = "frames that are taken per second (default: the model's rate, 7: 14 frames of svd are 2 seconds)"
    clip("--sample-fps", type=cli.number(0.001, 1000), metavar="FPS", help=rate)
    clip("--stride", type=cli.integer(1, 10**6), metavar="K", help="take every K-th frame, whatever its time")
    clip("--frames", type=cli.integer(1, 1000), metavar="F", help="frames to learn from (default: the model's)")
    size = "size to learn at (default: the model's, 1024x576 for svd; upright for a portrait clip)"
    cli.add_fit_arguments(clip, size)
    clip("--no-flip", action="store_true", help="never mirror the clip: for motions with a left and a right")
    dry = "read and check the clip, draw the frames that would be learned beside --out, and stop there"
    clip("--dry-run", action="store_true", help=dry)

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
    resume = "go on with the unfinished run of --out, or with a finished one for more --steps; settings as before"
    output("--resume", action="store_true", help=resume)
    preview = "every K steps, write a video of the clip beside what the tokens make of its first frame"
    output("--preview", type=cli.integer(1, 10**6), metavar="K", help=preview)
    save = "steps between two saves of what --resume needs (default: %(default)s)"
    output("--save-every", type=cli.integer(1, 10**6), default=25, metavar="K", help=save)

    advanced = cli.add_advanced_arguments(parser).add_argument
    advanced("--lr", type=cli.number(0, 100), help="learning rate (default: the recipe's)")
    advanced("--p-mean", type=cli.number(-10, 10), help="mean of ln(sigma) (default: the model's, 2.8 for svd)")
    advanced("--p-std", type=cli.number(0, 10), help="deviation of ln(sigma) (default: the model's, 1.6 for svd)")
    cache = "augmented views to encode once and use in turn; 0: a fresh one every step (default: paper 100, muon 25)"
    advanced("--cache", type=cli.integer(0, 10**5), metavar="K", help=cache)
    return parser.parse_args()


def read(args: argparse.Namespace, config: "SVDConfig") -> "Clip":
    """The clip that the arguments describe, for a model; prints what was taken. Raises InputError."""
    from minimti import read_clip

    clip = read_clip(
        args.video,
        config,
        num_frames=args.frames,
        start=args.start,
        end=args.end,
        sample_fps=args.sample_fps,
        stride=args.stride,
        size=args.size,
        how=args.fit,
        center=tuple(args.crop_center),
    )
    height, width = clip.frames.shape[-2:]
    sizes = f"{clip.source_size[0]}x{clip.source_size[1]} fitted to {width}x{height}"
    print(f"reference  {clip.source}: {len(clip.times)} frames, {sizes}")
    print(f"           {clip.about()}")
    for note in clip.notes:
        print(f"note       {note}")
    return clip


def dry_run(args: argparse.Namespace) -> None:
    """Reads and checks the clip, draws it as it is and in three augmented views, and prints what a step will need."""
    import torch
    from torchvision.transforms.v2.functional import resize

    from minimti.augment import augment
    from minimti.config import MODELS
    from minimti.io.write import write_strip
    from minimti.pipeline import automatic, check_device, default_device, describe_step, find

    path = Path(args.out).with_name(f"{Path(args.out).stem}-strip.png")
    check_writable(path, args.video)
    device = check_device(args.device or default_device())
    model = automatic(device) if args.model in (None, "auto") else args.model
    config = MODELS[model] if model in MODELS else find(model, device).config
    clip = read(args, config)
    generator = torch.Generator().manual_seed(args.seed)
    views = [clip.frames, *(augment(clip.frames, generator, not args.no_flip) for _ in range(3))]
    height, width = clip.frames.shape[-2:]
    scale = min(1, STRIP_HEIGHT / height)
    write_strip(path, torch.stack([resize(view, [round(scale * height), round(scale * width)]) for view in views]))
    dtype = args.dtype and getattr(torch, args.dtype)
    print(f"memory     {describe_step(config, clip, device, dtype, args.memory)}")
    print(f"strip      {path}: the frames, and below them three views as they are augmented; nothing was learned")


def main() -> None:
    """Parse, learn, report."""
    args = parse()
    import torch

    from minimti import learn, make_recipe
    from minimti.checkpoint.fingerprint import fingerprint
    from minimti.io.video import check_source
    from minimti.pipeline import make_budget
    from minimti.run import Run, digest
    from minimti.score import describe

    check_source(args.video)
    check_writable(args.out, args.video, args.model or "")
    if args.dry_run:
        dry_run(args)
        return
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
    clip = read(args, config)
    # What the tokens depend on, besides weights and steps.
    settings = {"model": config.name, "clip": digest(clip.frames), "tokens": args.tokens, "sets": args.sets}
    settings |= {"flip": not args.no_flip, "seed": args.seed, "dtype": args.dtype, "vae-dtype": args.vae_dtype}
    settings |= {name: value for name, value in vars(recipe).items() if name != "steps"}

    with Run(args.out, args.save_every) as run:
        state = run.find(settings, args.steps, device) if args.resume else None
        recipe = replace(recipe, steps=max(run.steps, args.steps or 0)) if args.resume else recipe
        began = time.perf_counter()
        svd = cli.load_model(args, checkpoint, device)
        seconds = time.perf_counter() - began
        print(f"model      {config.name} from {checkpoint.path}, {svd.dtype} on {device}, {seconds:.1f} s")
        size = clip.frames.shape[-1], clip.frames.shape[-2]
        budget = make_budget(svd, len(clip.frames), size, args.memory, training=True)
        print(f"memory     {budget.describe()}")
        facts = {"command": command(), "clip": clip.source, "times": clip.about(), "memory": budget.memory}
        facts |= {"weights": str(checkpoint.path), "revision": checkpoint.revision or "", "torch": torch.__version__}

        with signals.held() as check:  # it waits for the end of a step, and for files to be whole
            weights = fingerprint(svd.unet)
            if args.resume:
                notes = run.resume(state, weights, args.steps)
            else:
                notes = run.begin(settings, weights, recipe.steps, command())
            print(*notes, sep="\n", end="\n" * bool(notes))
            run.show_clip(clip.frames)

            bars, shown = cli.Bars(), state.steps if state else 0

            def watch(progress: "Progress") -> None:
                nonlocal shown
                bars(progress)
                run(progress)
                if progress.motion is not None:
                    if progress.step < progress.motion.steps:
                        return  # on a GPU losses arrive late, and the tokens are ahead of them
                    if args.preview and progress.step // args.preview > shown // args.preview:
                        path = run.path(f"preview-{progress.step:05}.mp4")
                        preview(path, svd, progress.motion, clip, lambda _: check())
                        shown = progress.step
                check()

            options = {"num_tokens": args.tokens, "shared": args.sets == "shared", "flip": not args.no_flip}
            options |= {"seed": args.seed, "memory": budget}
            try:
                learned = learn(svd, clip, recipe=recipe, progress=watch, resume=state, **options)
            finally:  # an interrupt at step 900 keeps the 900
                bars.close()
                motion = run.last and run.last.motion
                if motion is not None and (motion.steps > 0 or recipe.steps == 0):
                    motion.settings = facts | {"steps": run.text(motion.steps)}
                    run.finish(motion)
                    shape = "x".join(map(str, motion.tokens.shape))
                    print(f"embedding  {run.out}: {shape} tokens after {run.text(motion.steps)} steps")
                    print(f"next       {following(args, finished=motion.steps == run.steps)}")
        print(describe(svd, learned, clip.frames, args.memory))


def preview(path: Path, svd: "SVD", motion: "Motion", clip: "Clip", progress: "Callable[[Progress], None]") -> None:
    """Writes a video of the clip and, beside it, of what the motion makes of the clip's first frame."""
    import torch

    from minimti import animate, write_clip
    from minimti.io.pixels import to_uint8

    motion = replace(motion, tokens=motion.tokens.clone())
    memory = "low" if svd.budget.memory == "low" else "balanced"  # what the step itself needs stays allocated
    video = animate(svd, motion, clip.frames[:1], seed=motion.seed, memory=memory, progress=progress)
    write_clip(path, torch.cat([to_uint8(clip.frames), video], dim=-1), clip.fps)  # [F, 3, H, 2 W]


def command() -> str:
    """The command line of this program, without --resume."""
    return shlex.join(["python", *(argument for argument in sys.argv if argument != "--resume")])


def following(args: argparse.Namespace, finished: bool) -> str:
    """The command line to type next."""
    if not finished:
        return f"{command()} --resume"
    named = args.model is None or args.model in MODELS  # else the embedding's model cannot be found by its name
    model = [] if named else ["--model", args.model]
    return shlex.join(["python", "sample.py", "--emb", args.out, "img.png", *model])


if __name__ == "__main__":
    cli.run(main)
