"""Make images move as embeddings describe:  python sample.py --emb m.pt img.png

Every embedding moves every image. A result that is there already, made from the same, is kept.
Without --emb it is plain Stable Video Diffusion: the image's own CLIP embedding sets the motion.
"""

if __name__ == "__main__":  # before anything else is imported: from here on a signal ends the program with one line
    from minimti import signals, threads

    signals.install(signals.end)
    threads.wait_briefly()

import argparse
import json
import os
import shlex
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimti import cli
from minimti.config import FORMATS, MODELS, SCHEDULES, SOLVERS
from minimti.io.files import InputError, check_target, make_folder

if TYPE_CHECKING:
    from torch import Tensor

    from minimti import Motion
    from minimti.config import SVDConfig
    from minimti.io.pixels import Placement
    from minimti.results import Job
    from minimti.svd import SVD


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = cli.Parser(prog="sample.py", description=__doc__)
    motion = parser.add_argument_group("motions and images").add_argument
    images = "images to animate, one video each: files, folders of pictures, or patterns ('photos/*.jpg')"
    motion("images", nargs="*", type=cli.name, metavar="IMAGE", help=images)
    emb = "an embedding that train.py wrote; may be given several times"
    motion("--emb", metavar="FILE", action="append", default=[], help=emb)
    size = "size of the videos (default: the embedding's, else the model's; its sides exchanged for a portrait image)"
    cli.add_fit_arguments(motion, size)

    group = parser.add_argument_group("sampling")
    sampling = group.add_argument
    sampling("--steps", type=cli.integer(1, 10**4), help="steps of the solver (default: the model's, 25 for svd)")
    solvers = "heun evaluates the network twice a step, the others once (default: %(default)s)"
    sampling("--solver", choices=SOLVERS, default="euler", help=solvers)
    schedule = (
        "noise levels. ays: Align Your Steps, made for SVD in 10 steps (give --steps 10), other numbers interpolated;"
        " its effect on real weights is unmeasured here (default: karras, the model's own)"
    )
    sampling("--schedule", choices=SCHEDULES, default="karras", help=schedule)
    scale = cli.number(-1000, 1000)
    sampling(
        "--guidance", type=scale, nargs=2, metavar=("MIN", "MAX"), help="scale for first and last frame (default: 1 3)"
    )
    cli.add_seed(group)
    seeds = "as many results of each image, with --seed and those that follow; names then carry the seed (default: 1)"
    sampling("--seeds", type=cli.integer(1, 10**4), default=1, metavar="K", help=seeds)

    cli.add_model_arguments(parser, default_model="the embedding's, else auto")

    output = parser.add_argument_group("output").add_argument
    out = "a folder, or for one video a file that ends in .mp4 or .gif (default: this folder)"
    output("--out", default=".", metavar="PATH", help=out)
    form = (
        "mp4: near-lossless H.264; gif: 256 colours a frame; png: a folder of lossless frames for each result"
        " (default: mp4). In smaller videos each pixel is repeated until the longer side has 256 pixels or more"
    )
    output("--format", choices=FORMATS, help=form)
    compare = "also all results beside their clips: one video called grid, and index.html, which plays them in step"
    output("--compare", action="store_true", help=compare)

    figures = parser.add_argument_group("figures of the paper").add_argument
    alone = "the motion alone, without the image (figure 6; guidance 1 to 10 unless given)"
    figures("--unconditional", action="store_true", help=alone)
    maps = "also a picture of where each token of each frame is attended to (figure 5)"
    figures("--attention", action="store_true", help=maps)
    swap = "instead of --emb: the motion that the model sees in another image, by its CLIP embedding (figure 3)"
    figures("--swap", metavar="OTHER", help=swap)

    advanced = cli.add_advanced_arguments(parser).add_argument
    advanced(
        "--fps",
        type=cli.integer(1, 1000),
        help="frames per second, of the file and as a condition (default: as the clip was taken; the embedding's, 7)",
    )
    advanced(
        "--motion-bucket",
        type=cli.integer(0, 10**4),
        help="how much moves, 0..255 in training (default: the embedding's, 127)",
    )
    advanced(
        "--noise-aug",
        type=cli.number(0, 100),
        help="noise on the image before it is encoded (default: the embedding's, 0.02)",
    )
    return parser.parse_intermixed_args(cli.arguments())


def find_images(names: list[str], out: str) -> list[str]:
    """The files that the names stand for, each once: files, and the pictures of folders and patterns.

    Pictures of --attention are left out of these. Raises InputError where a folder or pattern has no pictures, or the
    results would go among those of a folder.
    """
    from minimti.io.pictures import find_pictures
    from minimti.results import is_attention

    found: list[str] = []
    for name in names:
        if os.path.isdir(name) and os.path.isdir(out) and os.path.samefile(name, out):
            raise InputError(f"{name}: the results would go among the images; name another folder as --out")
        pictures = find_pictures(Path(name))
        found += [name] if pictures is None else (str(path) for path in pictures if not is_attention(path))
    return list(dict.fromkeys(found))


def check(args: argparse.Namespace, motions: "list[Motion]") -> None:
    """Raises InputError for arguments that do not go together."""
    if not args.images and not (args.unconditional and motions):
        raise InputError("name an IMAGE to move (only --unconditional with --emb does without)")
    if args.unconditional and motions and len(args.images) > 1:
        raise InputError("--unconditional: an embedding makes the same video without any of the images; name one")
    if args.swap and args.emb:
        raise InputError("--swap and --emb: each of them sets the motion; give one")
    if args.attention and not args.emb:
        raise InputError("--attention: needs --emb; the image's own embedding is one token, which gets all attention")
    if args.attention and args.compile:
        raise InputError("--attention and --compile: compiled layers do not show their attention; leave one out")
    for emb, motion in zip(args.emb, motions):
        if motion.model != motions[0].model:
            first = f"{args.emb[0]} is for {motions[0].model!r}"
            raise InputError(f"{emb}: is for the model {motion.model!r}, but {first}; sample them apart")


def outputs(args: argparse.Namespace, model: str) -> "list[Job]":
    """All results that the arguments ask for.

    Raises InputError where one would replace another, an input or what another program made, or cannot be written.
    """
    from minimti.results import distinct, plan

    learned = [*args.emb, *([args.swap] if args.swap else [])]
    form = args.format or {".gif": "gif"}.get(Path(args.out).suffix.lower(), "mp4")
    inputs = [*learned, *([args.model] if args.model and args.model not in MODELS else [])]
    seeds = [(args.seed + k) % 2**32 for k in range(args.seeds)]
    names = distinct(learned) or [model]
    kinds = {"learned": bool(learned), "unconditional": args.unconditional}
    jobs = plan(names, args.images, seeds, args.out, form, inputs=inputs, **kinds)
    for job in jobs if args.attention else []:
        check_target(job.attention, *args.images, *inputs)
    if args.compare:
        from minimti.compare import check_comparison

        check_comparison(jobs, *args.images, *inputs)
    return jobs


def placed(
    args: argparse.Namespace, config: "SVDConfig", motion: "Motion | None", have: tuple[int, int]
) -> "Placement":
    """Where an image of `have` = (width, height) pixels goes. Raises InputError for a size that the model has not."""
    from minimti.io.pixels import check_size, oriented, place

    default = motion.size if motion else config.size
    size = check_size(args.size or oriented(default, *have), config)  # an image decides which side is longer
    return place(have, size, args.fit, tuple(args.crop_center))


def swapped(args: argparse.Namespace, svd: "SVD", other: "Tensor") -> "Motion":
    """The motion of --swap: the CLIP embedding of an image uint8 [1, 3, H, W], one token for all frames."""
    from minimti import Motion
    from minimti.io.pixels import fit

    config = svd.config
    placement = placed(args, config, None, (other.shape[-1], other.shape[-2]))
    token = svd.embed(fit(other, placement.size, placement).to(svd.device))[:, None].cpu()  # [1, 1, d]
    return Motion(token, config.num_frames, config.name, config.micro, config.size, steps=0, seed=0)


def make(args: argparse.Namespace, svd: "SVD", job: "Job", motion: "Motion | None", known: dict[str, Any]) -> str:
    """Makes a result and all that belongs to it, unless it is there already. Returns a line about it.

    `known` is what its record says already: the parts "made from" and "about".
    """
    import torch

    from minimti import animate
    from minimti.attention_maps import AttentionMaps, write_attention
    from minimti.io.image import decode_image
    from minimti.io.pixels import cut, fit, place
    from minimti.io.write import enlarged, write_video
    from minimti.results import has_attention, is_made, remove_attention, write_record

    config = svd.config
    micro = cli.overridden(
        motion.micro if motion else config.micro,
        fps_id=None if args.fps is None else args.fps - 1,
        motion_bucket_id=args.motion_bucket,
        cond_aug=args.noise_aug,
    )
    # It plays as fast as the clip was taken; what the model is conditioned on stays as it was trained.
    fps = args.fps or (motion.playback_fps if motion else micro.fps_id + 1)
    if job.image is None:
        size = placed(args, config, motion, motion.size if motion else config.size).size
        placement = place(size, size)
        image = torch.zeros(1, 3, *size[::-1])
    else:
        pixels = decode_image(args.images[job.image])
        placement = placed(args, config, motion, (pixels.shape[-1], pixels.shape[-2]))
        image = fit(pixels, placement.size, placement)

    num_frames = motion.num_frames if motion else config.num_frames
    made_from = known["made from"] | vars(micro) | {"seed": job.seed, "frames": num_frames, "fps": fps}
    made_from |= {"size": placement.size, "part of image": placement.source}
    same = is_made(job, made_from)
    if same and (not args.attention or has_attention(job)):
        return f"{cli.printable(job.path)}: is there, made from the same, and kept"
    options = {name: made_from[name] for name in ("steps", "guidance", "solver", "schedule", "unconditional", "seed")}
    replaced = job.path.exists() and not same
    bars = cli.Bars(job.path.stem)
    with AttentionMaps(svd, num_frames) if args.attention else nullcontext() as maps:
        video = animate(svd, motion, image, micro=micro, memory=args.memory, progress=bars, **options)
    bars.close()
    frames = enlarged(cut(video, placement))
    remove_attention(job)
    write_video(job.path, frames, fps, json.dumps({**known, "made from": made_from}))
    if maps is not None:
        write_attention(job.attention, video, maps.mean())
    write_record(job, made_from, known["about"], args.attention)
    height, width = frames.shape[-2:]
    line = f"{cli.printable(job.path)}: {len(frames)} frames, {width}x{height}, {fps:.4g} fps, seed {job.seed}"
    return line + ", in place of one that was made otherwise" * replaced


def compare(args: argparse.Namespace, jobs: "list[Job]", motions: "list[Motion]", config: "SVDConfig") -> None:
    """Puts all results beside the clips of their motions."""
    from minimti.compare import clip_cell, result_cell, write_comparison
    from minimti.results import distinct

    rows, names = [], distinct(args.emb)
    for index in dict.fromkeys(job.motion for job in jobs):
        row = []
        if args.emb:
            try:
                row.append(clip_cell(args.emb[index], motions[index], config, names[index]))
            except InputError as error:
                print(f"note       {error}; the comparison goes without its clip")
        row += [result_cell(job) for job in jobs if job.motion == index]
        rows.append(row)
    grid, page = write_comparison(jobs[0].path.parent, jobs[0].suffix, rows)
    print(f"comparison {cli.printable(grid)}, and to be opened in a browser: {cli.printable(page)}")


def main() -> None:
    """Parse, animate, report."""
    args = parse()
    import torch

    import minimti
    from minimti.checkpoint.fingerprint import fingerprint
    from minimti.edm import AYS_SIGMAS
    from minimti.io.image import decode_image
    from minimti.pipeline import UNCONDITIONAL_GUIDANCE
    from minimti.ranks import of_torchrun
    from minimti.results import digest, short
    from minimti.svd import GUIDANCE

    ranks = of_torchrun(os.environ)
    motions = [minimti.Motion.load(path) for path in args.emb]
    args.images = find_images(args.images, args.out)
    check(args, motions)
    sizes = []
    for path in args.images:
        pixels = decode_image(path)  # read again when its turn comes: twenty photographs take gigabytes
        sizes.append((pixels.shape[-1], pixels.shape[-2]))
    other = decode_image(args.swap) if args.swap else None
    model = cli.model_of(args, args.emb[0], motions[0]) if motions else args.model

    args.device = ranks.device(args.device)
    with ranks.quiet():  # one process prints these for all
        model, config, device = cli.choose_model(args, model)
        if args.schedule == "ays" and config.sigma_max != AYS_SIGMAS[0]:
            raise InputError(f"--schedule ays: is for SVD, whose noise begins at 700; leave it out for {config.name}")
        for motion in motions:
            motion.check_fits(config)
        notes: dict[str, str] = {}
        for motion in motions or [None]:
            placed(args, config, motion, motion.size if motion else config.size)
            notes |= {path: placed(args, config, motion, have).note() for path, have in zip(args.images, sizes)}
        jobs = outputs(args, config.name)
        for emb, motion in zip(args.emb, motions):
            cli.note_unfinished(emb, motion)
        for path, note in notes.items():
            if note:
                warnings.warn(f"{path}: {note}", stacklevel=1)
        checkpoint = cli.find_model(args, model)

        svd = cli.load_model(args, checkpoint, device, image_encoder=not args.emb)  # tokens take its embedding's place
        used = ("unet", "vae") if args.emb else ("unet", "vae", "image_encoder")
        weights = {name: short(fingerprint(getattr(svd, name))) for name in used}
        if other is not None:
            motions = [swapped(args, svd, other)]
            svd.release("image_encoder")
        guidance = tuple(args.guidance or (UNCONDITIONAL_GUIDANCE if args.unconditional else GUIDANCE))
        steps = args.steps or config.num_steps
        print(f"settings   {steps} steps of {args.solver}, guidance {guidance[0]:g} to {guidance[1]:g}")

    same = {"model": config.name, "weights": weights, "steps": steps, "solver": args.solver, "schedule": args.schedule}
    same |= {"guidance": guidance, "unconditional": args.unconditional, "fit": args.fit}
    same |= {"dtype": str(svd.dtype).removeprefix("torch."), "vae_dtype": args.vae_dtype}
    about = {"command": shlex.join(["python", *sys.argv]), "model file": str(checkpoint.path), "device": str(device)}
    about |= {"revision": checkpoint.revision, "minimti": minimti.__version__, "torch": torch.__version__}
    make_folder(jobs[0].path.parent)
    for number, job in enumerate(jobs, start=1):
        if number % ranks.count != ranks.rank:
            continue
        motion = None if job.motion is None else motions[job.motion]
        emb = None if job.motion is None else args.swap or args.emb[job.motion]
        image = None if job.image is None else args.images[job.image]
        files = {"embedding": emb, "image": image}
        made_from = {name: digest(file) for name, file in files.items() if file} | same
        known = {"made from": made_from, "about": {**files, **about, "motion": motion.settings if motion else {}}}
        print(f"video      {number} of {len(jobs)}  {make(args, svd, job, motion, known)}", flush=True)
    if args.compare:
        with ranks.joined():
            ranks.wait()
        if ranks.is_first:
            compare(args, jobs, motions, config)


if __name__ == "__main__":
    cli.run(main)
