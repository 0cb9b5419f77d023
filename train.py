"""Learn the motion of one reference video as an embedding:  python train.py ref.mp4 --out m.pt"""

import time
from collections import deque
from functools import partial

import torch
from tqdm import tqdm

from minimti import cli, motion, pipeline
from minimti.invert import LR, PAPER_LR, VIEWS, View, invert, recipe, view
from minimti.io import video
from minimti.io.files import check_writable, require_file
from minimti.networks.recompute import MODES, set_mode


def parse():
    parser = cli.Parser(prog="train.py", description=__doc__)
    add = parser.add_argument
    add("video", metavar="VIDEO", help="the reference")
    add("--out", default="m.pt", metavar="FILE", help="the embedding (default: %(default)s)")
    cli.add_shared_arguments(parser, default_model="", default_size="the model's, 1024x576 for svd")
    paper = "optimise exactly as the paper: its first tokens, Adam, independent sigmas, twice the steps, fresh views"
    add("--paper", action="store_true", help=paper)
    add("--steps", type=cli.integer(0, 10**6), help="optimisation steps (default: the model's, 500 for svd)")
    add("--lr", type=cli.number(0, 100), help=f"learning rate (default: {LR}, falling to 0; with --paper {PAPER_LR})")
    add(
        "--tokens",
        type=cli.integer(1, 1000),
        default=motion.NUM_TOKENS,
        metavar="N",
        help="tokens per set (default: %(default)s)",
    )
    add("--frames", type=cli.integer(1, 1000), metavar="F", help="frames to learn from (default: the model's)")
    add("--start", type=cli.number(0, 1e6), default=0.0, metavar="SECONDS", help="of the first frame (default: 0)")
    add("--stride", type=cli.integer(1, 10**6), default=1, metavar="K", help="take every K-th frame (default: 1)")
    add("--no-flip", action="store_true", help="never mirror the clip: for motions that have a left and a right")
    add("--p-mean", type=cli.number(-10, 10), help="mean of ln(sigma) (default: the model's, 2.8 for svd)")
    add("--p-std", type=cli.number(0, 10), help="deviation of ln(sigma) (default: the model's, 1.6 for svd)")
    cache = f"augmented views to encode once and reuse; 0: a fresh one every step (default: {VIEWS}, with --paper 0)"
    add("--cache", type=cli.integer(0, 10**5), metavar="K", help=cache)
    memory = "how much of the forward pass to keep; the rest is computed again (default: balanced, for tiny everything)"
    add("--memory", choices=MODES, help=memory)
    return parser.parse_args()


def main() -> None:
    args = parse()
    require_file(args.video)
    check_writable(args.out, args.video, args.model or "")
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    checkpoint = cli.find_model("auto" if args.model is None else args.model, device)
    config = checkpoint.config
    size = cli.checked_size(args.size or config.size, config)
    num_frames = args.frames or config.num_frames
    asked = {"steps": args.steps, "lr": args.lr, "p_mean": args.p_mean, "p_std": args.p_std}
    settings = recipe(config, args.paper) | {name: value for name, value in asked.items() if value is not None}
    steps = settings["steps"]
    cache = args.cache if args.cache is not None else 0 if args.paper else VIEWS
    frames = video.read_clip(args.video, num_frames, args.start, args.stride)
    print(
        f"reference  {args.video}: {num_frames} frames from {args.start:g} s, stride {args.stride},"
        f" {frames.shape[-1]}x{frames.shape[-2]} fitted to {size[0]}x{size[1]}"
    )

    began = time.perf_counter()
    svd = pipeline.load(checkpoint, device, dtype, cli.DTYPES[args.vae_dtype])
    print(f"model      {config.name} from {checkpoint.path}, {dtype} on {device}, {time.perf_counter() - began:.1f} s")

    clip = video.fit(frames, size).to(device)
    with torch.no_grad():
        embeddings = svd.embed(clip)
    tokens = motion.initialise(embeddings, args.tokens, torch.Generator().manual_seed(args.seed), args.paper)
    learned = motion.Motion(tokens, config.name, config.micro, size, steps=0, seed=args.seed)
    del svd.image_encoder  # it has said all it will be asked

    views = fresh = partial(view, svd, clip, learned, not args.no_flip)
    if cache:
        cached = [fresh(k) for k in tqdm(range(min(cache, steps)), desc="encoding")]
        del svd.vae

        def views(step: int) -> View:
            return cached[step % len(cached)]

    set_mode(svd.unet, args.memory or (None if config.name == "tiny" else "balanced"))
    cli.compile_if_asked(svd.unet, args.compile, device)
    losses = invert(svd, views, learned, **settings)
    recent = deque(maxlen=50)
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"
    try:
        with tqdm(losses, total=steps, desc="inversion", bar_format=layout) as progress:
            for loss in progress:
                recent.append(loss)
                progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
    finally:  # an interrupt at step 900 keeps the 900
        if learned.steps == steps or (learned.steps > 0 and learned.tokens.isfinite().all()):
            motion.save(learned, args.out)
            shape = "x".join(map(str, learned.tokens.shape))
            print(f"embedding  {args.out}: {shape} tokens after {learned.steps} steps")


if __name__ == "__main__":
    cli.run(main)
