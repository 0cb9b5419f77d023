"""Did it work?  python -m minimti.score m.pt

The embedding moves the first frame of its own clip, and the result is held against the clip. A motion that cannot be
replayed from its own first frame will not transfer. There are two figures, each at most 1, for three videos: this one;
plain image-to-video, whose tokens do not depend on the motion; and the clip after the autoencoder, the best that the
model could do:

motion      agreement of what moves: of the differences between frames, in the model's latents; 0: unrelated
appearance  similarity of each frame to that of the clip, by the model's image encoder

They tell a motion that was learned from one that was not. They hardly tell which of two learned motions is better.

A result of sample.py (RESULT) shows another subject, in another place, perhaps mirrored, so it cannot be held against
the clip place by place. Its figures are:

rhythm      correlation of how much changes from frame to frame with the clip's. It cannot tell forwards from backwards
            or up from down, and says little of a steady motion, which has no rhythm
appearance  similarity of its first frame to the others, beside the same of the clip: a subject that dissolves lowers
            it, and so does one that turns or leaves as it should
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minimti import cli, threads
from minimti.io.files import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from minimti import Motion, Progress
    from minimti.config import SVDConfig
    from minimti.svd import SVD

# Two thresholds of the figure "motion" for a model: from the first on a transfer is expected, below the second not.
# Measured by `python -m minimti.evaluate --seeds 0 1 2 --motions 4 --targets 2 --only score` (weights/tiny/README.md):
# other pairs between 0.6 and 0.8, where few embeddings lie, are right about as often.
THRESHOLDS = {"tiny": (0.7, 0.6)}
EXPECTED, DOUBTFUL, NOT_EXPECTED = "can be expected", "is doubtful", "is not to be expected"


@dataclass(frozen=True)
class Figures:
    """How alike a video is to the clip: 1 if it is the same, at least -1."""

    motion: float
    appearance: float


@dataclass(frozen=True)
class Score:
    """What an embedding makes of the first frame of its clip, and what the same figures are otherwise."""

    model: str
    learned: Figures
    plain: Figures  # plain image-to-video: the image's own embedding
    clip: Figures  # the clip itself, after the autoencoder

    @property
    def verdict(self) -> str:
        """Whether the motion will transfer, in words."""
        if self.model not in THRESHOLDS:
            return f"thresholds not verified for this model, {self.model}: compare the three"
        return f"transfer {expectation(self.learned.motion, *THRESHOLDS[self.model])}"

    def lines(self) -> list[str]:
        """The figures and the verdict, for people."""
        learned, plain, clip = self.learned, self.plain, self.clip
        return [
            f"score      motion {learned.motion:.2f} (plain image-to-video {plain.motion:.2f}, the clip"
            f" {clip.motion:.2f}), appearance {learned.appearance:.2f} ({plain.appearance:.2f}, {clip.appearance:.2f})",
            f"           {self.verdict}",
        ]


def expectation(motion: float, expected: float, doubtful: float) -> str:
    """What a figure of the motion promises of a transfer, by two thresholds."""
    if motion >= expected:
        return EXPECTED
    return DOUBTFUL if motion >= doubtful else NOT_EXPECTED


def measure(
    svd: "SVD",
    motion: "Motion",
    frames: "Tensor",
    *,
    memory: str = "auto",
    progress: "Callable[[Progress], None]" = lambda _: None,
) -> Score:
    """The score of an embedding for the clip that it was learned from, [F, 3, H, W] in [-1,1]. Takes two samples.

    Their noise is that of the embedding's seed. `memory` is as for `animate`, and `progress` is called as if the two
    samples were one. Raises as `animate` does.
    """
    import torch

    from minimti.io.pixels import from_uint8, to_uint8
    from minimti.pipeline import animate, make_budget

    frames = from_uint8(to_uint8(frames)).to(svd.device)  # as a file keeps them: the same score from there
    budget = make_budget(svd, len(frames), (frames.shape[-1], frames.shape[-2]), memory, training=False)
    with torch.no_grad(), svd.using(budget):
        wanted = svd.embed(frames)  # [F, d]
        plain = replace(motion, tokens=wanted[:1, None])  # [1, 1, d]: the first frame's own embedding, for all frames
        videos = []
        for done, tokens in enumerate((motion, plain)):

            def report(one: "Progress", done: int = done) -> None:
                progress(replace(one, step=one.step + done * one.steps, steps=2 * one.steps))

            videos.append(animate(svd, tokens, frames[:1], seed=motion.seed, memory=budget, progress=report))
        latents = svd.encode(frames[None])  # [1, F, z, h, w]
        videos.append(to_uint8(svd.decode(latents)[0]))
        figures = []
        for video in videos:
            pixels = from_uint8(video).to(frames)
            alike = torch.cosine_similarity(svd.embed(pixels), wanted).mean().item()
            figures.append(Figures(agreement(svd.encode(pixels[None])[0], latents[0]), alike))
    return Score(svd.config.name, *figures)


def describe(
    svd: "SVD", motion: "Motion", frames: "Tensor", memory: str, progress: "Callable[[Progress], None]"
) -> str:
    """The lines of `measure`, which takes the same arguments."""
    return "\n".join(measure(svd, motion, frames, memory=memory, progress=progress).lines())


def describe_result(svd: "SVD", video: "Tensor", clip: "Tensor") -> str:
    """The figures of a result [F, 3, H, W] in [-1,1], beside those of the clip, which may have another size."""
    import torch

    with torch.no_grad():
        latents, wanted = (svd.encode(frames[None].to(svd.device))[0] for frames in (video, clip))  # [F, z, h, w]
        constant = [constancy(svd.embed(frames.to(svd.device))) for frames in (video, clip)]
    return f"rhythm {rhythm(latents, wanted):.2f} (the clip 1), appearance {constant[0]:.2f} ({constant[1]:.2f})"


def read_result(path: str, config: "SVDConfig", motion: "Motion") -> "Tensor":
    """A result of sample.py, [F, 3, H, W] in [-1,1] at the size of `config`. Raises InputError where it is none."""
    from minimti import read_clip
    from minimti.io.write import gif_rate

    options: dict[str, Any] = {"stride": 1}
    if path.lower().endswith(".gif"):  # frames that are alike are one there, and times are rounded
        fps = gif_rate(motion.playback_fps)
        options = {"sample_fps": fps, "start": 0.5 / fps}
    return read_clip(path, config, num_frames=motion.num_frames, **options).frames


def agreement(video: "Tensor", clip: "Tensor") -> float:
    """The cosine between the differences of all pairs of frames in two videos, given as latents [F, z, h, w].

    0 where nothing changes in one of them.
    """
    # Over all pairs, products of differences sum up to F times those of the deviations from the mean frame.
    moved, wanted = (latents - latents.mean(0) for latents in (video, clip))  # [F, z, h, w]
    return cosine(moved, wanted)


def rhythm(video: "Tensor", clip: "Tensor") -> float:
    """The correlation, over time, of how much changes between successive frames of two videos, latents [F, z, h, w].

    Neither the place, the size and the look of what moves nor its direction matter. The two may have other heights and
    widths. 0 where one of them changes evenly.
    """
    amounts = [(latents[1:] - latents[:-1]).flatten(1).norm(dim=1) for latents in (video, clip)]  # [F - 1]
    return cosine(*(amount - amount.mean() for amount in amounts))


def constancy(embeddings: "Tensor") -> float:
    """The mean cosine between the embedding of the first frame and those of the others, of [F, d]; 1 for one frame."""
    cosines = [cosine(embeddings[0], other) for other in embeddings[1:]]
    return sum(cosines) / len(cosines) if cosines else 1.0


def cosine(x: "Tensor", y: "Tensor") -> float:
    """The cosine between two tensors as vectors; 0 where one of them is zero."""
    norms = x.norm() * y.norm()
    return ((x * y).sum() / norms).item() if norms > 0 else 0.0


def parse() -> argparse.Namespace:
    """The command line. Ends the program with exit code 2 where it is wrong."""
    parser = cli.Parser(prog="python -m minimti.score", description=__doc__)
    parser.add_argument("emb", metavar="FILE", help="the embedding, written by train.py")
    what = "videos that sample.py made of it"
    parser.add_argument("results", nargs="*", metavar="RESULT", help=what)
    clip = "the clip, where neither m.run/ nor the file itself is where it was; read as the embedding says, if it does"
    parser.add_argument("--clip", type=cli.name, metavar="CLIP", help=clip)
    cli.add_model_arguments(parser, default_model="the embedding's")
    cli.add_advanced_arguments(parser)
    return parser.parse_intermixed_args(cli.arguments())


def main() -> None:
    """Prints the score. Raises InputError where an input is unusable."""
    args = parse()

    from minimti import Motion
    from minimti.run import read_learned

    motion = Motion.load(args.emb)
    cli.note_unfinished(args.emb, motion)
    model = cli.model_of(args, args.emb, motion)
    model, config, device = cli.choose_model(args, model)
    motion.check_fits(config)
    try:
        clip = read_learned(args.emb, motion, config, args.clip)
    except InputError as error:
        raise error if args.clip else InputError(f"{error}; name the clip as --clip") from error
    like = replace(config, size=motion.size)  # or with its sides exchanged, where the image is portrait
    with warnings.catch_warnings():
        # A result of another shape is measured in its middle; there is no option for another part.
        warnings.filterwarnings("ignore", message=".* of the picture is used")
        results = [read_result(path, like, motion) for path in args.results]

    checkpoint = cli.find_model(args, model)
    svd = cli.load_model(args, checkpoint, device)
    bars = cli.Bars("score")
    found = describe(svd, motion, clip.frames, args.memory, bars)
    bars.close()
    print(found)
    for path, frames in zip(args.results, results):
        print(f"result     {cli.printable(path)}: {describe_result(svd, frames, clip.frames)}")
    if results:
        print("note       no figure tells whether a result moves the right way: see it beside the clip, with --compare")


if __name__ == "__main__":
    threads.wait_briefly()
    cli.run(main)
