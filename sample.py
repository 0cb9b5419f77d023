"""Make an image move as an embedding says:  python sample.py --emb m.pt img.png

Without --emb it is plain Stable Video Diffusion, and the image itself says how it moves.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minimti import cli, motion, video, weights
from minimti.config import MODELS
from minimti.files import InputError, check_writable


def parse():
    parser = cli.Parser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="what shall move; one video each")
    add("--emb", metavar="FILE", help="the embedding that train.py wrote")
    add("--out", metavar="PATH", help="an .mp4 file for a single video, or a folder (default: the current one)")
    cli.add_shared_arguments(
        parser, default_model="the embedding's, or svd", default_size="the embedding's, or the model's"
    )
    add("--steps", type=cli.integer(1), help="Euler steps (default: the model's, 25 for svd)")
    add("--guidance", type=float, nargs=2, metavar=("MIN", "MAX"), help="of first and last frame (default: 1 3)")
    add("--fps", type=cli.integer(1), help="frames per second, told to the model and of the file (default: 7)")
    add("--motion-bucket", type=cli.integer(0), help="how much moves, 0..255 in training (default: 127)")
    add("--noise-aug", type=cli.number, help="noise on the image before it is encoded (default: 0.02)")
    add(
        "--unconditional",
        action="store_true",
        help="zero the image to see the motion alone; --guidance 1 10 by default",
    )
    return parser.parse_args()


def outputs(args, label: str) -> list[Path]:
    """Where each video goes. Raises InputError where one could not be written or would replace another."""
    names = [f"{Path(image).stem}_{label}.mp4" for image in args.images] or [f"{label}_unconditional.mp4"]
    out = Path(args.out or ".")
    if out.suffix == ".mp4":
        if len(names) > 1:
            raise InputError(f"--out {out}: one file cannot hold {len(names)} videos; name a folder")
        return [check_writable(out)]
    if out.is_file():
        raise InputError(f"--out {out}: is a file; name a folder, or a file that ends in .mp4")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} images of the same name would all become {name}; sample them apart")
    out.mkdir(parents=True, exist_ok=True)
    return [check_writable(out / name) for name in names]


def main() -> None:
    args = parse()
    learned = motion.load(args.emb) if args.emb else None
    if not args.images and not (args.unconditional and learned):
        raise InputError("name an IMAGE to move (only --unconditional with --emb does without)")
    images = [video.read_image(path) for path in args.images]
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    if learned and not args.model and learned.model not in MODELS:
        raise InputError(f"{args.emb}: made with a model called {learned.model!r}; pass its file or folder as --model")
    checkpoint = weights.find(args.model or (learned.model if learned else "svd"))
    config = checkpoint.config
    if learned:
        learned.check_fits(config)
        learned.tokens = learned.tokens.to(device)
    size = cli.checked_size(args.size or (learned.size if learned else config.size), config)
    paths = outputs(args, Path(args.emb).stem if learned else config.name)

    asked = {"fps_id": args.fps and args.fps - 1, "motion_bucket_id": args.motion_bucket, "cond_aug": args.noise_aug}
    micro = learned.micro if learned else config.micro
    micro = replace(micro, **{name: value for name, value in asked.items() if value is not None})
    guidance = args.guidance or ((1.0, 10.0) if args.unconditional else (1.0, 3.0))
    num_frames = learned.num_frames if learned else config.num_frames
    num_steps = args.steps or config.num_steps

    svd = weights.load(checkpoint, device, dtype)
    nothing = torch.zeros(1, 3, size[1], size[0])
    with torch.inference_mode():
        for image, path in zip([video.fit(image, size) for image in images] or [nothing], paths):
            generator = torch.Generator().manual_seed(args.seed)
            image = image.to(device)
            tokens = (learned.spatial(1), learned.temporal(1)) if learned else svd.tokens_of(image, num_frames)
            cond = svd.prepare(image, tokens, micro, generator)
            if args.unconditional:
                cond = cond.without_image()
            n = torch.randn(cond.concat.shape, generator=generator).to(device)
            for x in tqdm(svd.sample(cond, n, num_steps, guidance), total=num_steps, desc=path.stem):
                latents = x
            video.write_clip(path, svd.vae.decode(latents)[0], micro.fps_id + 1)
            print(f"video  {path}: {num_frames} frames, {size[0]}x{size[1]}, {micro.fps_id + 1} fps, seed {args.seed}")


if __name__ == "__main__":
    cli.run(main)
