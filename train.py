"""Learn the motion of one reference video as an embedding:  python train.py ref.mp4 --out m.pt"""

import time
from collections import deque

import torch
from tqdm import tqdm

from minimti import cli, motion, video, weights
from minimti.files import check_writable, existing
from minimti.invert import invert


def parse():
    parser = cli.Parser(prog="train.py", description=__doc__)
    add = parser.add_argument
    add("video", metavar="VIDEO", help="the reference")
    add("--out", default="m.pt", metavar="FILE", help="the embedding (default: %(default)s)")
    cli.add_shared_arguments(parser, default_model="svd", default_size="the model's, 1024x576 for svd")
    add("--steps", type=cli.integer(0), default=1000, help="optimisation steps (default: %(default)s)")
    add("--lr", type=cli.number, default=1e-2, help="Adam's learning rate (default: %(default)s)")
    add("--tokens", type=cli.integer(1), default=5, metavar="N", help="tokens per set (default: %(default)s)")
    add("--frames", type=cli.integer(1), metavar="F", help="frames to learn from (default: as many as the model makes)")
    add("--start", type=cli.number, default=0.0, metavar="SECONDS", help="time of the first frame (default: 0)")
    add("--stride", type=cli.integer(1), default=1, metavar="K", help="take every K-th frame (default: %(default)s)")
    add("--no-flip", action="store_true", help="never mirror the clip: for motions that have a left and a right")
    add("--p-mean", type=float, help="mean of ln(sigma) (default: the model's, 2.8 for svd)")
    add("--p-std", type=cli.number, help="deviation of ln(sigma) (default: the model's, 1.6 for svd)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    check_writable(args.out)
    existing(args.video)
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    checkpoint = weights.find(args.model or "svd")
    config = checkpoint.config
    size = cli.checked_size(args.size or config.size, config)
    num_frames = args.frames or config.num_frames
    frames = video.read_clip(args.video, num_frames, args.start, args.stride)
    print(
        f"reference  {args.video}: {num_frames} frames from {args.start:g} s, stride {args.stride},"
        f" {frames.shape[-1]}x{frames.shape[-2]} fitted to {size[0]}x{size[1]}"
    )

    began = time.perf_counter()
    svd = weights.load(checkpoint, device, dtype)
    print(f"model      {config.name} from {checkpoint.path}, {dtype} on {device}, {time.perf_counter() - began:.1f} s")

    clip = video.fit(frames, size).to(device)
    with torch.no_grad():
        embeddings = svd.embed(clip)
    tokens = motion.initialise(embeddings, args.tokens, torch.Generator().manual_seed(args.seed))
    learned = motion.Motion(tokens, config.name, config.micro, size, steps=0, seed=args.seed)
    losses = invert(
        svd,
        clip,
        learned,
        steps=args.steps,
        lr=args.lr,
        flip=not args.no_flip,
        p_mean=config.p_mean if args.p_mean is None else args.p_mean,
        p_std=config.p_std if args.p_std is None else args.p_std,
    )
    recent = deque(maxlen=50)
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"
    try:
        with tqdm(losses, total=args.steps, desc="inversion", bar_format=layout) as progress:
            for loss in progress:
                recent.append(loss)
                progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
    finally:  # an interrupt at step 900 keeps the 900
        if learned.steps > 0 or args.steps == 0:
            motion.save(learned, args.out)
            shape = "x".join(map(str, learned.tokens.shape))
            print(f"embedding  {args.out}: {shape} tokens after {learned.steps} steps")


if __name__ == "__main__":
    cli.run(main)
