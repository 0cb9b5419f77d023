"""Learn the motion of a reference video as an embedding:  python train.py ref.mp4 --out m.pt

Beside it, m.run/ holds the loss curve and all that --resume needs to go on.
Several clips give an embedding each, called after them, or with --together one.
On several GPUs, each of which adds other noise in every step:  torchrun --nproc-per-node 2 train.py ref.mp4
"""

if __name__ == "__main__":  # before anything else is imported: from here on a signal ends the program with one line
    from minimti import signals, threads

    signals.install(signals.end)
    threads.wait_briefly()

import argparse
import os
import shlex
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimti import __version__, cli, signals
from minimti.config import MODELS, NUM_TOKENS, RECIPES
from minimti.io.files import InputError, check_folder, check_target, check_writable, make_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from minimti import Clip, Motion, Progress, Recipe
    from minimti.config import SVDConfig
    from minimti.invert import State
    from minimti.ranks import Ranks
    from minimti.run import Run
    from minimti.svd import SVD

OTHER_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".png", ".jpg", ".json")  # no embeddings' names
STRIP_HEIGHT = 160  # pixels: the height of a frame in the picture of --dry-run, at most


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = cli.Parser(prog="train.py", description=__doc__)
    add_clip_arguments(parser)
    add_learning_arguments(parser)
    cli.add_model_arguments(parser, default_model="auto")
    add_output_arguments(parser)
    advanced = cli.add_advanced_arguments(parser).add_argument
    advanced("--lr", type=cli.number(0, 100), help="learning rate (default: the recipe's)")
    advanced("--p-mean", type=cli.number(-10, 10), help="mean of ln(sigma) (default: the model's, 2.8 for svd)")
    advanced("--p-std", type=cli.number(0, 10), help="deviation of ln(sigma) (default: the model's, 1.6 for svd)")
    cache = "augmented views to encode once and use in turn; 0: a fresh one every step (default: paper 100, muon 25)"
    advanced("--cache", type=cli.integer(0, 10**5), metavar="K", help=cache)
    return parser.parse_intermixed_args(cli.arguments())


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "clip"."""
    clip = parser.add_argument_group("clip").add_argument
    what = (
        "the clip whose motion is learned: a video file, a pipe, a folder of pictures, or a pattern ('walk/*.png');"
        " several give an embedding each"
    )
    clip("clips", nargs="+", type=cli.name, metavar="CLIP", help=what)
    together = "learn one motion from all clips, such as one action by different subjects, which take turns"
    clip("--together", action="store_true", help=together)
    start = "when a clip begins, as 3.5, 0:03.5 or 1:02:03.5 (default: 0)"
    clip("--start", type=cli.seconds, default=0.0, metavar="TIME", help=start)
    clip("--end", type=cli.seconds, metavar="TIME", help="spread the frames evenly from --start to here")
    rate = "frames that are taken per second (default: the model's rate, 7: 14 frames of svd are 2 seconds)"
    clip("--sample-fps", type=cli.number(0.001, 1000), metavar="FPS", help=rate)
    clip("--stride", type=cli.integer(1, 10**6), metavar="K", help="take every K-th frame, whatever its time")
    clip("--frames", type=cli.integer(2, 1000), metavar="F", help="frames to learn from (default: the model's)")
    size = "size to learn at (default: the model's, 1024x576 for svd; its sides exchanged for a portrait clip)"
    cli.add_fit_arguments(clip, size)
    clip("--no-flip", action="store_true", help="never mirror the clip: for motions with a left and a right")
    dry = "read and check the clips, draw the frames that would be learned beside --out, and stop there"
    clip("--dry-run", action="store_true", help=dry)


def add_learning_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "learning"."""
    group = parser.add_argument_group("learning")
    learning = group.add_argument
    recipe = (
        "paper: Adam, 1000 steps for svd, as published for SVD (B.2). muon: half the steps, uncropped views and 0.6"
        " times the error on tiny (3 motions), never tried on SVD (default: paper for svd, muon for tiny)"
    )
    learning("--recipe", choices=RECIPES, help=recipe)
    learning("--steps", type=cli.integer(0, 10**6), help="optimisation steps (default: the recipe's)")
    tokens = "tokens per set (default: %(default)s)"
    learning("--tokens", type=cli.integer(1, 1000), default=NUM_TOKENS, metavar="N", help=tokens)
    sets = "frames: a token set for each frame and one for the layers over time; shared: one for all (default: frames)"
    learning("--sets", choices=("frames", "shared"), default="frames", help=sets)
    cli.add_seed(group)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "output"."""
    output = parser.add_argument_group("output").add_argument
    out = (
        "the embedding; a name that ends in .safetensors gives that format (default: m.pt). For several clips, or where"
        " it is a folder: the folder of embeddings that are called after their clips (default: this folder)"
    )
    output("--out", metavar="PATH", help=out)
    resume = (
        "go on with the unfinished run of --out, or with a finished one for more --steps; settings as before. For"
        " several clips, finished embeddings are kept, and missing ones begun"
    )
    output("--resume", action="store_true", help=resume)
    preview = "every K steps, write a video of the clip beside what the tokens make of its first frame"
    output("--preview", type=cli.integer(1, 10**6), metavar="K", help=preview)
    save = "steps between two saves of what --resume needs (default: %(default)s)"
    output("--save-every", type=cli.integer(1, 10**6), default=25, metavar="K", help=save)


def plan(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """The embeddings to be made, and the clips of each.

    Raises InputError where a clip is missing, or an embedding cannot be written, would replace another or an input.
    """
    from minimti.io.video import check_source

    for clip in args.clips:
        check_source(clip)
    inputs = [*args.clips, args.model or ""]
    several = len(args.clips) > 1 and not args.together
    out = args.out if args.out is not None else "." if several else "m.pt"
    is_folder = out.endswith(("/", os.sep))  # one that need not be there yet
    if not several and (args.together or not (os.path.isdir(out) or is_folder)):
        path = check_writable(out, *inputs)
        if path.suffix.lower() in OTHER_SUFFIXES or is_folder:
            raise InputError(f"--out {out}: name the embedding, a file that ends in .pt or .safetensors")
        return [(path, args.clips)]
    if several and (Path(out).suffix.lower() in (".pt", ".safetensors", *OTHER_SUFFIXES) or os.path.isfile(out)):
        advice = "name a folder, or learn one from all with --together"
        raise InputError(f"--out {out}: one file cannot hold {len(args.clips)} embeddings; {advice}")
    check_folder(out)
    named = [(check_target(Path(out) / f"{name_of(clip)}.pt", *inputs), [clip]) for clip in args.clips]
    path, count = Counter(path for path, _ in named).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} clips would all become {path.name}; learn them apart, with an --out each")
    return named


def name_of(clip: str) -> str:
    """The name of a clip, without its folder and its suffix; of a pattern, that of the folder."""
    path = Path(os.path.abspath(clip))
    if os.path.exists(clip):
        return path.name if path.is_dir() else path.stem
    return path.parent.name


def read(args: argparse.Namespace, config: "SVDConfig", sources: list[str]) -> "list[Clip]":
    """The clips of an embedding, all at the size of the first; prints what was taken. Raises InputError."""
    from minimti import read_clip

    clips: list[Clip] = []
    for source in sources:
        clip = read_clip(
            source,
            config,
            num_frames=args.frames,
            start=args.start,
            end=args.end,
            sample_fps=args.sample_fps,
            stride=args.stride,
            size=(clips[0].frames.shape[-1], clips[0].frames.shape[-2]) if clips else args.size,
            how=args.fit,
            center=tuple(args.crop_center),
        )
        clips.append(clip)
        height, width = clip.frames.shape[-2:]
        sizes = f"{clip.source_size[0]}x{clip.source_size[1]} fitted to {width}x{height}"
        print(f"reference  {cli.printable(clip.source)}: {len(clip.times)} frames, {sizes}")
        print(f"           {clip.about()}")
        for note in clip.notes:
            print(f"note       {cli.printable(note)}")
        portrait, first_portrait = (size[0] < size[1] for size in (clip.source_size, clips[0].source_size))
        if portrait != first_portrait and not args.size:
            shape = "portrait" if portrait else "landscape"
            note = f"{clip.source} is {shape}, unlike {clips[0].source}, at whose size it is read"
            print(f"note       {cli.printable(note)}")
    return clips


def dry_run(args: argparse.Namespace, named: list[tuple[Path, list[str]]]) -> None:
    """Reads and checks the clips of all embeddings, draws them as they would be learned, prints what that will need."""
    import torch

    from minimti.pipeline import describe_learning

    _, config, device = cli.choose_model(args, args.model)
    dtypes = args.dtype and getattr(torch, args.dtype), getattr(torch, args.vae_dtype)
    for out, _ in named:
        if source := next((clip for clip in args.clips if is_among_pictures(out, clip)), None):
            raise InputError(f"--out {out}: the strip would become a picture of {source}; name another folder")
    for out, sources in named:
        make_folder(out.parent)
        path = check_writable(out.with_name(f"{out.stem}-strip.png"), *args.clips)
        clips = read(args, config, sources)
        recipe = recipe_of(args, config, clips)
        draw(args, path, clips, recipe.crop)
        what = "the frames" if len(clips) == 1 else "the frames of each clip"
        strip = cli.printable(path)
        print(f"strip      {strip}: {what}, and below them three views as they are augmented; nothing was learned")
        for name, text in describe_learning(config, clips[0], recipe.steps, device, *dtypes, args.memory):
            print(f"{name:10} {text}")


def is_among_pictures(path: Path, source: str) -> bool:
    """Whether a file goes into the folder of pictures that a clip is read from."""
    from minimti.io.pictures import find_pictures

    pictures = find_pictures(Path(source))
    return pictures is not None and path.parent.resolve() == pictures[0].parent.resolve()


def draw(args: argparse.Namespace, path: Path, clips: "list[Clip]", crop: bool) -> None:
    """Draws each clip as it is, and below it three augmented views. `crop` allows crops."""
    import torch

    from minimti.augment import augment
    from minimti.io.write import write_strip
    from minimti.run import strip_of

    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for clip in clips:
        rows += [clip.frames, *(augment(clip.frames, generator, not args.no_flip, crop) for _ in range(3))]
    write_strip(path, strip_of(rows, STRIP_HEIGHT))


def recipe_of(args: argparse.Namespace, config: "SVDConfig", clips: "list[Clip]") -> "Recipe":
    """How tokens are optimised, as the arguments say, on a model. Raises InputError where not every clip has a turn."""
    from minimti import make_recipe

    recipe = cli.overridden(
        make_recipe(config, args.recipe),
        steps=args.steps,
        lr=args.lr,
        p_mean=args.p_mean,
        p_std=args.p_std,
        num_cached_views=args.cache,
    )
    if 0 < recipe.num_views < len(clips):
        raise InputError(
            f"{len(clips)} clips cannot take turns in {recipe.num_views} views; give a larger --cache or --steps"
        )
    return recipe


@dataclass
class Job:
    """An embedding to be learned."""

    clips: "list[Clip]"
    run: "Run"
    settings: dict[str, Any]  # what the tokens depend on, besides weights and steps


def job_of(args: argparse.Namespace, config: "SVDConfig", ranks: "Ranks", out: Path, sources: list[str]) -> Job:
    """Reads the clips of an embedding. Raises InputError."""
    from minimti.run import Run, digest

    clips = read(args, config, sources)
    recipe = recipe_of(args, config, clips)
    settings = {"model": config.name, "clip": digest(clips), "tokens": args.tokens, "sets": args.sets}
    settings |= {"flip": not args.no_flip, "seed": args.seed, "dtype": args.dtype, "vae-dtype": args.vae_dtype}
    settings |= {name: value for name, value in vars(recipe).items() if name != "steps"}
    return Job(clips, Run(out, args.save_every), settings | {"ranks": ranks.count})


def unfinished(args: argparse.Namespace, jobs: list[Job], device: "torch.device") -> list[Job]:
    """The jobs still to be done under --resume. Raises InputError; NothingLeft where all are finished."""
    from minimti.run import NothingLeft

    left, finished = [], []
    for job in jobs:
        try:
            if len(jobs) > 1:
                job.run.keep()
            if job.run.is_begun or len(jobs) == 1:
                job.run.find(job.settings, args.steps, device)  # again when its turn comes: a state is large
            left.append(job)
        except NothingLeft as error:
            finished.append(error)
    if not left:
        raise finished[0]
    for error in finished:
        print(f"kept       {cli.printable(error)}")
    return left


def begin(args: argparse.Namespace, svd: "SVD", job: Job, ranks: "Ranks") -> "tuple[Recipe, State | None]":
    """Begins or resumes the run of a job. Returns its recipe with all steps, and the state to go on from, if any."""
    from minimti.checkpoint.fingerprint import fingerprint

    run, recipe, state = job.run, recipe_of(args, svd.config, job.clips), None
    resumed = args.resume and run.is_begun
    if resumed:
        state = run.find(job.settings, args.steps, svd.device)
        recipe = replace(recipe, steps=run.steps, crop=run.crop)
    ranks.wait()  # until all have read what is there
    if ranks.is_first:
        weights = fingerprint(svd.unet)
        if resumed:
            for note in run.resume(state, weights):
                print(cli.printable(note))
        else:
            run.begin(job.settings, weights, recipe.steps, command(ranks))
        run.show_clips(job.clips)
    return recipe, state


def watching(
    args: argparse.Namespace, svd: "SVD", job: Job, ranks: "Ranks", check: "Callable[[], None]", bars: cli.Bars
) -> "Callable[[Progress], None]":
    """The `progress` of `learn`: it shows, logs, saves and previews, and then stops after a signal."""
    from minimti.run import Previews

    watchers: list[Callable[[Progress], None]] = [bars, job.run] if ranks.is_first else []
    if args.preview:
        watchers.append(Previews(job.run, svd, job.clips[0], args.preview, check, ranks))

    def watch(progress: "Progress") -> None:
        for watcher in watchers:
            watcher(progress)
        if progress.is_settled:
            check()

    return watch


def learn_job(
    args: argparse.Namespace, svd: "SVD", job: Job, ranks: "Ranks", check: "Callable[[], None]", facts: dict[str, str]
) -> None:
    """Learns an embedding and writes it, also where that is interrupted: `check` raises Interrupted after a signal.

    `facts` are the entries of Motion.settings that all jobs share.
    """
    from minimti import learn
    from minimti.motion import how_read
    from minimti.pipeline import budget_of_learning
    from minimti.run import frames_digest

    clips, bars = job.clips, cli.Bars()
    budget = budget_of_learning(svd, clips[0], args.memory)
    print(f"memory     {budget.describe()}")
    recipe, state = begin(args, svd, job, ranks)
    watch = watching(args, svd, job, ranks, check, bars)
    options = {"num_tokens": args.tokens, "shared": args.sets == "shared", "flip": not args.no_flip}
    options |= {"seed": args.seed, "memory": budget}
    try:
        learned = learn(svd, clips, recipe=recipe, progress=watch, resume=state, ranks=ranks, **options)
    finally:  # an interrupt at step 900 keeps the 900
        bars.close()
        about = {"clip": clips[0].source, "times": "; ".join(clip.about() for clip in clips)}
        about |= how_read(args.start, args.end, args.sample_fps, args.stride, args.fit, args.crop_center)
        if len(clips) > 1:
            about["together with"] = ", ".join(clip.source for clip in clips[1:])
        finish(job.run, facts | about | {"frames": frames_digest(clips[0]), "memory": budget.memory})
    if ranks.is_first:  # where there are others, it cannot check for their signals while they wait
        print(judged(args, svd, learned, clips[0], check if ranks.count == 1 else lambda: None))
    if ranks.count > 1:
        check()


def judged(args: argparse.Namespace, svd: "SVD", motion: "Motion", clip: "Clip", check: "Callable[[], None]") -> str:
    """Whether the motion of a clip was learned, in lines to print. `check` is called after every step of sampling."""
    import torch

    from minimti.score import describe

    bars = cli.Bars("score")

    def watch(progress: "Progress") -> None:
        bars(progress)
        check()

    try:
        return describe(svd, motion, clip.frames, args.memory, watch)
    except (FloatingPointError, InputError, torch.OutOfMemoryError) as error:
        # The embedding is there, and the next one waits.
        return f"note       without a score: {str(error).splitlines()[0]}"
    finally:
        bars.close()


def finish(run: "Run", facts: dict[str, str]) -> None:
    """Writes the embedding of a run, where it has taken a step or needs none."""
    import torch

    motion = run.last and run.last.motion
    if motion is not None and (motion.steps > 0 or run.steps == 0):
        versions = {"minimti": __version__, "torch": torch.__version__}
        motion.settings = facts | {"steps": run.text(motion.steps)} | versions
        if len(run.legs) > 1:
            motion.settings["command"] += " --resume"
        run.finish(motion)
        shape = "x".join(map(str, motion.tokens.shape))
        print(f"embedding  {cli.printable(run.out)}: {shape} tokens after {run.text(motion.steps)} steps")


def command(ranks: "Ranks") -> str:
    """The command line of this program, without --resume."""
    start = ["python"] if ranks.count == 1 else ["torchrun", "--nproc-per-node", str(ranks.count)]
    return shlex.join([*start, sys.argv[0], *(argument for argument in cli.arguments() if argument != "--resume")])


def following(args: argparse.Namespace, jobs: list[Job], ranks: "Ranks") -> str:
    """The command line to type next."""
    if not all(job.run.is_done for job in jobs):
        return f"{command(ranks)} --resume"
    named = args.model in (None, "auto", *MODELS)  # else the embedding's model cannot be found by its name
    model = [] if named else ["--model", args.model]
    model += ["--revision", args.revision] if args.revision else []
    embeddings = [word for job in jobs for word in ("--emb", cli.as_file(str(job.run.out)))]
    return shlex.join(["python", str(Path(sys.argv[0]).with_name("sample.py")), *embeddings, "img.png", *model])


def main() -> None:
    """Parse, learn, report."""
    args = parse()
    from minimti.ranks import of_torchrun

    ranks = of_torchrun(os.environ)
    with ranks.quiet(), ExitStack() as stack:
        named = plan(args)
        if args.dry_run:
            return dry_run(args, named) if ranks.is_first else None
        args.device = ranks.device(args.device)
        model, config, device = cli.choose_model(args, args.model)
        jobs = [job_of(args, config, ranks, out, sources) for out, sources in named]
        if ranks.is_first:  # the only one that writes
            for job in jobs:
                stack.enter_context(job.run)
        left = unfinished(args, jobs, device) if args.resume else jobs
        checkpoint = cli.find_model(args, model)
        stack.enter_context(ranks.joined())
        svd = cli.load_model(args, checkpoint, device)
        facts = {"command": command(ranks), "weights": str(checkpoint.path), "revision": checkpoint.revision or ""}
        check = stack.enter_context(signals.held(ranks.any))  # it waits for a step's end, and for files to be whole
        for job in left if ranks.is_first else []:  # all at once: --resume must not find the runs of an earlier command
            if not (args.resume and job.run.is_begun):
                for note in job.run.make_way():
                    print(cli.printable(note))
        failed = []
        try:
            for number, job in enumerate(left, start=1):
                if len(left) > 1:
                    print(f"learning   {number} of {len(left)}  {cli.printable(job.run.out)}")
                try:
                    learn_job(args, svd, job, ranks, check, facts)
                except FloatingPointError as error:  # in all processes alike; the next clips can still be learned
                    failed.append(f"{job.run.out}: {error}" if len(jobs) > 1 else str(error))
            if failed:
                raise FloatingPointError("; ".join(failed))
        finally:
            if any(job.run.done is not None for job in jobs):
                print(f"next       {following(args, jobs, ranks)}")


if __name__ == "__main__":
    cli.run(main)
