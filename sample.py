"""Make an image move as an embedding says:  python sample.py --emb m.pt img.png

Without --emb it is plain Stable Video Diffusion, and the image itself says how it moves.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minimti import cli, edm, motion, pipeline
from minimti.config import MODELS
from minimti.io import video
from minimti.io.files import InputError, check_writable, make_folder
from minimti.svd import GUIDANCE


def parse():
    parser = cli.Parser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="what shall move; one video each")
    add("--emb", metavar="FILE", help="the embedding that train.py wrote")
    add("--out", default=".", metavar="PATH", help="an .mp4 file for a single video, or a folder (default: this one)")
    cli.add_shared_arguments(parser, default_model="the embedding's, else ", default_size="likewise")
    add("--steps", type=cli.integer(1, 10**4), help="of the solver (default: the model's, 25 for svd)")
    solvers = "heun evaluates the network twice a step, the others once (default: %(default)s)"
    add("--solver", choices=edm.SOLVERS, default="euler", help=solvers)
    guidance = cli.number(-1000, 1000)
    add("--guidance", type=guidance, nargs=2, metavar=("MIN", "MAX"), help="of first and last frame (default: 1 3)")
    add("--fps", type=cli.integer(1, 1000), help="frames per second, told to the model and of the file (default: 7)")
    add("--motion-bucket", type=cli.integer(0, 10**4), help="how much moves, 0..255 in training (default: 127)")
    add("--noise-aug", type=cli.number(0, 100), help="noise on the image before it is encoded (default: 0.02)")
    alone = "zero the image: the motion alone, with --guidance 1 10 by default"
    add("--unconditional", action="store_true", help=alone)
    memory = "low: the two branches of guidance in turn, not as one batch (default: %(default)s)"
    add("--memory", choices=("balanced", "low"), default="balanced", help=memory)
    return parser.parse_args()


def outputs(args, label: str) -> list[Path]:
    """Where each video goes. Raises InputError where one would replace another, or cannot be meant."""
    names = [f"{Path(image).stem}_{label}.mp4" for image in args.images] or [f"{label}_unconditional.mp4"]
    out = Path(args.out)
    if out.suffix.lower() == ".mp4":
        if len(names) > 1:
            raise InputError(f"--out {out}: one file cannot hold {len(names)} videos; name a folder")
        return [check_writable(out, *args.images)]
    if out.is_file() or out.suffix.lower() in (".gif", ".mov", ".webm", ".mkv", ".avi"):
        raise InputError(f"--out {out}: name a folder, or a file that ends in .mp4")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} images of the same name would all become {name}; sample them apart")
    return [out / name for name in names]


def main() -> None:
    args = parse()
    learned = None if args.emb is None else motion.load(args.emb)
    if not args.images and not (args.unconditional and learned):
        raise InputError("name an IMAGE to move (only --unconditional with --emb does without)")
    if args.unconditional and learned and len(args.images) > 1:
        raise InputError("--unconditional: an embedding makes the same video without any of the images; name one")
    images = [video.read_image(path) for path in args.images]
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    if learned and args.model is None and learned.model not in MODELS:
        raise InputError(f"{args.emb}: made with a model called {learned.model!r}; pass its file or folder as --model")
    model = args.model if args.model is not None else learned.model if learned else "auto"
    checkpoint = cli.find_model(model, device)
    config = checkpoint.config
    if learned:
        learned.check_fits(config)
        learned.tokens = learned.tokens.to(device)
    size = cli.checked_size(args.size or (learned.size if learned else config.size), config)
    paths = outputs(args, Path(args.emb).stem if learned else config.name)

    asked = {"fps_id": args.fps and args.fps - 1, "motion_bucket_id": args.motion_bucket, "cond_aug": args.noise_aug}
    micro = learned.micro if learned else config.micro
    micro = replace(micro, **{name: value for name, value in asked.items() if value is not None})
    guidance = args.guidance or ((1.0, 10.0) if args.unconditional else GUIDANCE)
    num_frames = learned.num_frames if learned else config.num_frames
    num_steps = args.steps or config.num_steps

    svd = pipeline.load(checkpoint, device, dtype, cli.DTYPES[args.vae_dtype])
    cli.compile_if_asked(svd.unet, args.compile, device)
    targets = [video.fit(image, size).to(device) for image in images] or [torch.zeros(1, 3, *size[::-1], device=device)]
    # One network after the other for all images: none is in memory that is not needed again.
    with torch.inference_mode():
        tokens = [learned.sets if learned else svd.tokens_of(image, num_frames) for image in targets]
        del svd.image_encoder

        jobs = []
        for image, sets in zip(targets, tokens):
            generator = torch.Generator().manual_seed(args.seed)
            cond = svd.prepare(image, sets, micro, generator)
            n = torch.randn(cond.concat.shape, generator=generator).to(device)
            jobs.append((cond.without_image() if args.unconditional else cond, n))

        latents = []
        for (cond, n), path in zip(jobs, paths):
            xs = svd.sample(cond, n, num_steps, guidance, edm.SOLVERS[args.solver], in_turn=args.memory == "low")
            for x in tqdm(xs, total=num_steps, desc=path.stem):
                last = x
            latents.append(last)
        del svd.unet

        make_folder(paths[0].parent)
        for x, path in zip(latents, paths):
            video.write_clip(path, svd.decode(x)[0], micro.fps_id + 1)
            print(f"video  {path}: {num_frames} frames, {size[0]}x{size[1]}, {micro.fps_id + 1} fps, seed {args.seed}")


if __name__ == "__main__":
    cli.run(main)
