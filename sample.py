"""Make an image move as an embedding describes:  python sample.py --emb m.pt img.png

Without --emb it is plain Stable Video Diffusion: the image's own CLIP embedding sets the motion.
"""

if __name__ == "__main__":  # before anything else is imported: from here on a signal ends the program with one line
    import os

    from minimti import signals

    signals.begin()
    # Threads that spin while they wait take the time of those they wait for, once a core has other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import os
import warnings
from collections import Counter
from pathlib import Path

from minimti import cli
from minimti.config import MODELS, SOLVERS
from minimti.io.files import InputError, check_folder, check_target, check_writable, make_folder


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = cli.Parser(prog="sample.py", description=__doc__)
    motion = parser.add_argument_group("motion and images").add_argument
    motion("images", nargs="*", metavar="IMAGE", help="images to animate, one video each")
    motion("--emb", metavar="FILE", help="the embedding that train.py wrote")
    size = "size of the videos (default: the embedding's, else the model's; upright for a portrait image)"
    cli.add_fit_arguments(motion, size)
    alone = "the motion alone, without the image (guidance 1 to 10 unless given)"
    motion("--unconditional", action="store_true", help=alone)

    group = parser.add_argument_group("sampling")
    sampling = group.add_argument
    sampling("--steps", type=cli.integer(1, 10**4), help="steps of the solver (default: the model's, 25 for svd)")
    solvers = "heun evaluates the network twice a step, the others once (default: %(default)s)"
    sampling("--solver", choices=SOLVERS, default="euler", help=solvers)
    scale = cli.number(-1000, 1000)
    sampling(
        "--guidance", type=scale, nargs=2, metavar=("MIN", "MAX"), help="scale for first and last frame (default: 1 3)"
    )
    cli.add_seed(group)

    cli.add_model_arguments(parser, default_model="the embedding's, else auto")

    output = parser.add_argument_group("output").add_argument
    output("--out", default=".", metavar="PATH", help="an .mp4 file for one video, or a folder (default: this one)")

    advanced = cli.add_advanced_arguments(parser).add_argument
    advanced(
        "--fps",
        type=cli.integer(1, 1000),
        help="frames per second, of the file and as a condition (default: the embedding's, 7)",
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
    return parser.parse_args()


def outputs(args: argparse.Namespace, label: str) -> list[Path]:
    """Where each video goes.

    Raises InputError where one would replace another or an input, or none can be written.
    """
    names = [f"{Path(image).stem}_{label}.mp4" for image in args.images] or [f"{label}_unconditional.mp4"]
    inputs = [*args.images, args.emb or "", args.model if args.model and args.model not in MODELS else ""]
    out = Path(args.out)
    if out.suffix.lower() == ".mp4":
        if len(names) > 1:
            raise InputError(f"--out {out}: one file cannot hold {len(names)} videos; name a folder")
        return [check_writable(out, *inputs)]
    if os.path.isfile(out) or out.suffix.lower() in (".gif", ".mov", ".webm", ".mkv", ".avi"):
        raise InputError(f"--out {out}: name a folder, or a file that ends in .mp4")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} images of the same name would all become {name}; sample them apart")
    check_folder(out)
    return [check_target(out / name, *inputs) for name in names]


def main() -> None:
    """Parse, animate, report."""
    args = parse()
    import torch

    from minimti import Motion, animate, write_clip
    from minimti.io.image import decode_image
    from minimti.io.pixels import check_size, cut, fit, oriented, place

    motion = None if args.emb is None else Motion.load(args.emb)
    if not args.images and not (args.unconditional and motion):
        raise InputError("name an IMAGE to move (only --unconditional with --emb does without)")
    if args.unconditional and motion and len(args.images) > 1:
        raise InputError("--unconditional: an embedding makes the same video without any of the images; name one")
    decoded = [decode_image(path) for path in args.images]  # before a model is looked for, which may mean a download
    if motion and args.model is None and motion.model not in MODELS:
        raise InputError(f"{args.emb}: made with a model called {motion.model!r}; pass its file or folder as --model")
    model = args.model if args.model is not None else motion.model if motion else "auto"
    checkpoint, device = cli.find_model(args, model)
    config = checkpoint.config
    if motion:
        motion.check_fits(config)
    default = motion.size if motion else config.size
    placements, images = [], []
    for path, pixels in zip(args.images, decoded):
        have = (pixels.shape[-1], pixels.shape[-2])
        size = check_size(args.size or oriented(default, *have), config)  # an image decides whether it is upright
        placements.append(place(have, size, args.fit, tuple(args.crop_center)))
        images.append(fit(pixels, size, placements[-1]))
        if note := placements[-1].note():
            warnings.warn(f"{path}: {note}", stacklevel=1)
    if not images:
        size = check_size(args.size or default, config)
        placements, images = [place(size, size)], [torch.zeros(1, 3, *size[::-1])]
    paths = outputs(args, Path(args.emb).stem if motion else config.name)

    micro = cli.overridden(
        motion.micro if motion else config.micro,
        fps_id=None if args.fps is None else args.fps - 1,
        motion_bucket_id=args.motion_bucket,
        cond_aug=args.noise_aug,
    )

    # It plays as fast as the clip was taken; what the model is conditioned on stays as it was trained.
    fps = args.fps or (motion.fps if motion else None) or micro.fps_id + 1

    svd = cli.load_model(args, checkpoint, device)
    if motion:
        svd.release("image_encoder")  # the tokens take the place of its embedding
    make_folder(paths[0].parent)
    options = {"steps": args.steps, "guidance": args.guidance and tuple(args.guidance), "solver": args.solver}
    options |= {"seed": args.seed, "micro": micro, "unconditional": args.unconditional, "memory": args.memory}
    for image, placement, path in zip(images, placements, paths):
        bars = cli.Bars(path.stem)
        video = cut(animate(svd, motion, image, progress=bars, **options), placement)
        bars.close()
        write_clip(path, video, fps)
        height, width = video.shape[-2:]
        print(f"video  {cli.printable(path)}: {len(video)} frames, {width}x{height}, {fps:.4g} fps, seed {args.seed}")


if __name__ == "__main__":
    cli.run(main)
