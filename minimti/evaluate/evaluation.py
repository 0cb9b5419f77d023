"""The laboratory of the experiments: motions of the procedural world, their embeddings, and how clips are judged.

An error is 0 where a clip moves as it should and 1 where it is as wrong as one that stands still
(`tracker.motion_error`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minimti import edm, motion
from minimti.config import SVDConfig
from minimti.invert import SAVING, VIEWS, invert, recipe, view
from minimti.io import video
from minimti.motion import NUM_TOKENS
from minimti.svd import GUIDANCE, SVD, Conditioning
from minimti.world import captions
from minimti.world.clips import first_frame, pixels
from minimti.world.scene import Scene, Trajectory, flip, paint, random_scene, render, trajectory
from minimti.world.shapes import SHAPES
from minimti.world.tracker import motion_error, track

Tokens = tuple[Tensor, Tensor]  # spatial [1, F, N, d], temporal [1, N, d]; the first axis may also be that of clips

ALONE = (1.0, 3.0)  # guidance without an image
DIFFERENT = 0.5  # the motion error of one motion against another, from which a clip can tell which it follows
LEVELS = 8
FORM = (15, NUM_TOKENS)  # (F', N) of the paper, for 14 frames


# ---------------------------------------------------------------------------------------------- what is transferred


@dataclass(frozen=True)
class Case:
    """A motion: a reference, and targets that shall move as it does."""

    reference: Scene
    targets: tuple[Scene, ...]


def random_case(rng: np.random.Generator, config: SVDConfig, num_targets: int, **properties) -> Case:
    """Targets of other shapes, colours and places; every other one faces the other way than the reference.

    properties: of `random_scene`.
    """
    size = config.size[::-1]
    reference = random_scene(rng, size, config.num_frames, **properties)
    properties["program"] = reference.program
    properties["shapes"] = tuple(shape for shape in SHAPES if shape not in [s.shape for s in reference.sprites])
    targets = []
    for i in range(num_targets):
        scene = random_scene(rng, size, config.num_frames, **properties)
        opposite = scene.sprites[0].facing != reference.sprites[0].facing
        targets.append(flip(scene) if opposite == bool(i % 2) else scene)
    return Case(reference, tuple(targets))


@dataclass
class OneSet(motion.Motion):
    """F' = 1: tokens [1, N, d], the same for every frame and over time."""

    frames: int = 0

    @property
    def sets(self) -> Tokens:
        return self.tokens[None].expand(-1, self.frames, -1, -1), self.tokens


# ---------------------------------------------------------------------------------------------- what is measured


def motion_errors(clips: np.ndarray, scenes: list[Scene]) -> list[float]:
    """Of each clip uint8 [F, 3, H, W] against its scene; of two sprites the mean."""
    return [
        float(np.mean([motion_error(track(clip, scene, i), path) for i, path in enumerate(trajectory(scene))]))
        for clip, scene in zip(clips, scenes)
    ]


def follows(clip: np.ndarray, scene: Scene, wanted: Trajectory, other: Trajectory) -> bool | None:
    """Whether the sprite of a clip moves rather as wanted than otherwise; None where the two are too much alike."""
    if motion_error(other, wanted) < DIFFERENT:
        return None
    tracked = track(clip, scene)
    return motion_error(tracked, wanted) < motion_error(tracked, other)


def mirrored_motion(path: Trajectory, scene: Scene) -> Trajectory:
    """Where the scene's sprite would go if it moved as the path of its mirror image does in the picture."""
    own = trajectory(scene)[0]
    return replace(own, x=own.x[0] + path.x - path.x[0], angle=own.angle[0] - (path.angle - path.angle[0]))


def colour(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """RGB in [0,1] of the sprite's body in a clip, mean over its frames."""
    sprite = replace(scene.sprites[0], colour=(1.0, 1.0, 1.0))  # whatever is painted white is body, not detail
    canvas = np.zeros(clip.shape, np.float32)
    paint(canvas, sprite, track(clip, scene))
    body = canvas.min(axis=1) > 0.99  # [F, H, W]
    return np.array([clip[:, channel][body].mean() for channel in range(3)]) / 255 if body.any() else np.zeros(3)


def summary(errors: list[list[float]]) -> dict:
    """Of errors by motion and target: their mean, and the deviation of the motions' means."""
    means = [float(np.mean(of_motion)) for of_motion in errors]
    return {"error": float(np.mean(means)), "deviation": float(np.std(means)), "motions": means}


def rate(answers: list[bool | None]) -> dict:
    told = [answer for answer in answers if answer is not None]
    return {"rate": float(np.mean(told)) if told else None, "pairs": len(told)}


# ---------------------------------------------------------------------------------------------- the laboratory


def first_frames(scenes: Sequence[Scene]) -> Tensor:
    """[B, 3, H, W] in [-1,1]."""
    return pixels(np.stack([first_frame(scene) for scene in scenes]))


class Evaluation:
    """The model and the motions, and what several experiments ask of them."""

    def __init__(
        self, svd: SVD, table: captions.Words, seed: int, motions: int, targets: int, steps: int, folder: Path
    ):
        self.svd, self.table, self.config = svd, table, svd.config
        self.seed, self.num_targets, self.steps, self.folder = seed, targets, steps, folder
        self.cases = [random_case(self.rng(0, i), self.config, targets) for i in range(motions)]
        self._learned, self.moved = cache(self._invert), cache(self._moved)

    def rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *numbers))

    def caption(self, scene: Scene) -> Tokens:
        return captions.caption_tokens(self.table, [scene.program], self.config.num_frames)

    @torch.no_grad()
    def own(self, scenes: Sequence[Scene]) -> Tokens:
        """The tokens of plain image-to-video, of as many clips as scenes."""
        return self.svd.tokens_of(first_frames(scenes), self.config.num_frames)

    @torch.no_grad()
    def embeddings(self, reference: Scene) -> Tensor:
        """CLIP embeddings of all its frames, [F, d]."""
        return self.svd.embed(pixels(render(reference)))

    def num_steps(self, paper: bool) -> int:
        """Of an inversion; the paper's recipe takes SAVING times ours."""
        return self.steps * SAVING if paper else self.steps

    def inversion(
        self,
        reference: Scene,
        form: tuple[int, int] = FORM,
        seed: int = 0,
        p_mean: float | None = None,
        paper: bool = False,
    ) -> Iterator[Tokens]:
        """The tokens of the form (F', N) before the first step and after every one; by the paper's recipe if asked."""
        config, svd = self.config, self.svd
        clip, noise = pixels(render(reference)), torch.Generator().manual_seed(seed)
        tokens = motion.initialise(self.embeddings(reference), form[1], noise, paper)
        about = {"model": config.name, "micro": config.micro, "size": config.size, "steps": 0, "seed": seed}
        if form[0] == 1:
            learned = OneSet(tokens[-1:].clone(), frames=config.num_frames, **about)
        else:
            learned = motion.Motion(tokens, **about)
        cached = [view(svd, clip, learned, True, k) for k in range(VIEWS)]
        settings = recipe(config, paper) | {"steps": self.num_steps(paper)}
        if p_mean is not None:
            settings["p_mean"] = p_mean
        yield tuple(t.detach().clone() for t in learned.sets)
        for _ in invert(svd, lambda step: cached[step % len(cached)], learned, **settings):
            yield tuple(t.detach().clone() for t in learned.sets)

    def learned(self, case: Case, form: tuple[int, int] = FORM, seed: int = 0, paper: bool = False) -> Tokens:
        """The motion of a case as an embedding; remembered."""
        return self._learned(case, form, seed, paper)

    def _invert(self, case: Case, form: tuple[int, int], seed: int, paper: bool) -> Tokens:
        *_, last = self.inversion(case.reference, form, seed, paper=paper)
        return last

    @torch.no_grad()
    def generate(self, scenes: Sequence[Scene], tokens: Tokens, image: bool = True) -> np.ndarray:
        """uint8 [B, F, 3, H, W]: the first frames of scenes under the tokens of one clip or of as many.

        Without `image`, the motion alone.
        """
        noise = torch.Generator().manual_seed(self.seed)
        cond = self._conditioning(first_frames(scenes), tokens, noise)
        n = torch.randn(cond.concat.shape, generator=noise)
        cond, guidance = (cond, GUIDANCE) if image else (cond.without_image(), ALONE)
        *_, x = self.svd.sample(cond, n, self.config.num_steps, guidance)
        return video.to_bytes(self.svd.decode(x)).numpy()

    @torch.no_grad()
    def loss(self, scenes: Sequence[Scene], tokens: Tokens) -> float:
        """The model's loss on the clips that scenes truly are, mean over LEVELS noise levels; tokens as of `generate`.

        It tells embeddings apart before a model draws well: the better they know the motion, the lower it is.
        """
        noise, clips = torch.Generator().manual_seed(self.seed), pixels(np.stack([render(scene) for scene in scenes]))
        x0, losses = self.svd.encode(clips), []
        network = self.svd.network(self._conditioning(clips[:, 0], tokens, noise))
        for quantile in (torch.arange(LEVELS) + 0.5) / LEVELS:
            config = self.config
            sigma = edm.training_sigma(quantile, config.p_mean, config.p_std, config.sigma_max).expand(len(x0))
            losses.append(edm.loss(network, x0, sigma, torch.randn(x0.shape, generator=noise)))
        return torch.stack(losses).mean().item()

    def _conditioning(self, images: Tensor, tokens: Tokens, noise: torch.Generator) -> Conditioning:
        spatial, temporal = (t.expand(len(images), *t.shape[1:]) for t in tokens)
        return self.svd.prepare(images, (spatial, temporal), self.config.micro, noise)

    def _moved(self, case: Case) -> np.ndarray:
        """The targets of a case under its embedding; remembered."""
        return self.generate(case.targets, self.learned(case))

    def transferred(self, case: Case, tokens: Tokens) -> list[float]:
        """The errors of a case's targets under tokens."""
        return motion_errors(self.generate(case.targets, tokens), list(case.targets))
