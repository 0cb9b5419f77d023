"""What the experiments share: motions of the procedural world, their embeddings, and the measures of a generated clip.

A motion error is 0 where a clip moves as it should and 1 where it is as wrong as a clip that stands still
(`world.tracker.motion_error`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minimti import __version__, edm, pipeline
from minimti.checkpoint.fingerprint import fingerprint
from minimti.config import NUM_TOKENS, SVDConfig
from minimti.invert import Recipe, make_recipe
from minimti.io.files import make_folder
from minimti.io.video import Clip
from minimti.motion import Motion
from minimti.pipeline import Progress
from minimti.svd import GUIDANCE, SVD
from minimti.world import captions
from minimti.world.clips import first_frame, pixels
from minimti.world.scene import Scene, Trajectory, Wave, flip, paint, random_scene, render, trajectory
from minimti.world.shapes import SHAPES
from minimti.world.tracker import motion_error, track

NUM_REFERENCES = 3  # for each motion: the most clips from which an experiment learns one
DISTINCT = 0.5  # motion error between two motions, below which a clip cannot show which of them it follows


@dataclass(frozen=True)
class Settings:
    """How much the experiments measure."""

    motions: int = 8  # reference clips
    targets: int = 4  # clips to which each motion is transferred
    steps: int | None = None  # per inversion by the model's own recipe (None: the recipe's)
    ablation_motions: int = 3  # the first motions, in the experiments that invert each of them many times
    inversion_seeds: int = 2  # inversions of each motion in `ablation` and `optimiser`
    kind_targets: int = 2  # targets of each motion in `kinds`
    noise_levels: int = 8  # at which the model's loss is taken


@dataclass(frozen=True)
class Inversion:
    """How an embedding is learned."""

    recipe: Recipe
    seed: int
    num_tokens: int = NUM_TOKENS  # N, tokens per set
    shared: bool = False  # one set for all frames and for the layers over time: F' = 1 in the paper
    num_clips: int = 1  # references that it learns from


@dataclass(frozen=True)
class Case:
    """A motion: the references that show it, and the targets that should move in the same way.

    Their sprites are of different shapes, in random colours; an inversion learns from the first reference or more.
    """

    references: tuple[Scene, ...]
    targets: tuple[Scene, ...]

    @property
    def reference(self) -> Scene:
        """The first reference."""
        return self.references[0]


def random_case(
    rng: np.random.Generator,
    config: SVDConfig,
    num_targets: int,
    *,
    num_references: int = 1,
    num_sprites: int = 1,
    program: tuple[str, ...] | None = None,
    wave: Wave | None = None,
) -> Case:
    """References, and targets of other shapes in random colours and places, in the size and length of `config`'s clips.

    No two references share a shape. Targets face in the direction opposite to the first reference's and in the same
    direction by turns. `num_sprites`, `program` and `wave` are those of `random_scene`.
    """
    size = config.size[::-1]  # height, width
    references: list[Scene] = []
    others = SHAPES
    for _ in range(num_references):
        program = references[0].program if references else program
        references.append(random_scene(rng, size, config.num_frames, num_sprites, program, others, wave=wave))
        others = tuple(shape for shape in others if shape not in [sprite.shape for sprite in references[-1].sprites])
    targets = []
    for i in range(num_targets):
        scene = random_scene(rng, size, config.num_frames, num_sprites, references[0].program, others, wave=wave)
        opposite = scene.sprites[0].facing != references[0].sprites[0].facing
        targets.append(flip(scene) if opposite == bool(i % 2) else scene)
    return Case(tuple(references), tuple(targets))


def weights_of(svd: SVD) -> dict[str, list[float]]:
    """The fingerprints of all networks, under the names that their weights have in the model."""
    found = {name: fingerprint(network) for name, network in svd.named_children()}
    return {f"{name}.{weight}": numbers for name, part in found.items() for weight, numbers in part.items()}


# ---------------------------------------------------------------------------------------------- measures of a clip


def clip_error(clip: np.ndarray, scene: Scene) -> float:
    """The motion error of a clip uint8 [F, 3, H, W] that should show `scene`; with two sprites, their mean."""
    paths = trajectory(scene)
    return float(np.mean([motion_error(track(clip, scene, i), path) for i, path in enumerate(paths)]))


def follows(clip: np.ndarray, scene: Scene, wanted: Trajectory, other: Trajectory) -> bool | None:
    """Whether the sprite of a clip uint8 [F, 3, H, W] moves more like `wanted` than like `other`.

    `scene` gives the sprite's look and its place in the first frame. None where the two motions are too similar
    (a motion error below DISTINCT).
    """
    if motion_error(other, wanted) < DISTINCT:
        return None
    tracked = track(clip, scene)
    return motion_error(tracked, wanted) < motion_error(tracked, other)


def mirrored_motion(path: Trajectory, scene: Scene) -> Trajectory:
    """Where the sprite of `scene` would go if it repeated, in picture coordinates, the path of its mirror image."""
    own = trajectory(scene)[0]
    return replace(own, x=own.x[0] + path.x - path.x[0], angle=own.angle[0] - (path.angle - path.angle[0]))


def body_colour(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """Mean colour of the sprite's body in a clip uint8 [F, 3, H, W]: RGB [3] in [0,1], zeros where it has vanished."""
    sprite = replace(scene.sprites[0], colour=(1.0, 1.0, 1.0))  # details become dark, so white pixels are the body
    canvas = np.zeros(clip.shape, np.float32)
    paint(canvas, sprite, track(clip, scene))
    body = canvas.min(axis=1) > 0.99  # [F, H, W]
    return np.array([clip[:, channel][body].mean() for channel in range(3)]) / 255 if body.any() else np.zeros(3)


# ---------------------------------------------------------------------------------------------- the evaluation


class Evaluation:
    """A model, the motions of one seed, and what several experiments do with them, on the device of the model.

    All random numbers follow from `seed`: the motions, the inversions, and the noise of the i-th target (seed + i).
    """

    def __init__(self, svd: SVD, words: captions.CaptionEmbedding, seed: int, settings: Settings, folder: Path):
        """folder: where the experiments put their pictures, and what they have learned; it exists."""
        self.svd, self.words, self.config = svd, words, svd.config
        self.seed, self.settings, self.folder = seed, settings, folder
        drawn = [
            random_case(self.rng(0, i), self.config, settings.targets, num_references=NUM_REFERENCES)
            for i in range(settings.motions)
        ]
        self.cases = {f"{i}: {' '.join(case.reference.program)}": case for i, case in enumerate(drawn)}
        self.fingerprint, self.weights = fingerprint(svd.unet), weights_of(svd)
        self._motions: dict[tuple[Case, Inversion], Motion] = {}
        self._clips: dict[tuple[Case, int], tuple[Motion | None, list[np.ndarray]]] = {}

    def rng(self, *numbers: int) -> np.random.Generator:
        """A generator for the purpose that `numbers` stand for."""
        return np.random.default_rng((self.seed, *numbers))

    def pixels(self, frames: np.ndarray) -> Tensor:
        """uint8 [..., 3, H, W] -> fp32 in [-1,1], on the device of the model."""
        return pixels(frames).to(self.svd.device)

    # ------------------------------------------------------------------------------------------ embeddings

    def caption(self, scene: Scene) -> Motion:
        """The program of a scene as the embedding that pre-training gave to these words; one set, NUM_SLOTS tokens."""
        _, tokens = captions.caption_tokens(self.words, [scene.program], self.config.num_frames)
        return self._as_motion(tokens)

    @torch.no_grad()
    def image_embedding(self, scene: Scene) -> Motion:
        """The embedding of a scene's first frame, on which plain image-to-video conditions; one set, one token."""
        return self._as_motion(self.svd.embed(self.pixels(first_frame(scene))[None])[None])  # [1, 1, d]

    @torch.no_grad()
    def frame_embeddings(self, scene: Scene) -> Motion:
        """The image embedding of every frame of a scene, their mean as temporal token: an inversion's start in B.2."""
        embeddings = self.svd.embed(self.pixels(render(scene)))  # [F, d]
        return self._as_motion(torch.cat([embeddings, embeddings.mean(0, keepdim=True)])[:, None])  # [F + 1, 1, d]

    def _as_motion(self, tokens: Tensor) -> Motion:
        """Tokens [F + 1, N, d] or [1, N, d] that do not come from an inversion."""
        config = self.config
        return Motion(
            tokens=tokens,
            num_frames=config.num_frames,
            model=config.name,
            micro=config.micro,
            size=config.size,
            steps=0,
            seed=self.seed,
            fingerprint=self.fingerprint,
        )

    def inversion(self, recipe: str | None = None) -> Inversion:
        """The model's own way to learn an embedding, or that of the recipe "paper" or "muon".

        `Settings.steps` are those of the model's own recipe; other recipes keep their ratio to it.
        """
        own, chosen = make_recipe(self.config), make_recipe(self.config, recipe)
        steps = chosen.steps * (self.settings.steps or own.steps) // own.steps
        return Inversion(replace(chosen, steps=steps), self.seed)

    def learn(self, case: Case, inversion: Inversion | None = None) -> Motion:
        """The motion of a case's references as an embedding, by `inversion` or the model's own recipe.

        It is kept in the folder, under a name that stands for all it depends on but the code: a process or a run that
        comes to it later does not learn it again.
        """
        inversion = inversion or self.inversion()
        if (case, inversion) not in self._motions:
            facts = repr((case, inversion, self.weights, self.svd.dtype, __version__))
            path = self.folder / "embeddings" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.pt"
            if path.exists():
                motion = Motion.load(path)
                motion.tokens = motion.tokens.to(self.svd.device)
            else:
                *_, motion = self.snapshots(case, inversion, [inversion.recipe.steps])
                make_folder(path.parent)
                motion.save(path)
            self._motions[case, inversion] = motion
        return self._motions[case, inversion]

    def snapshots(self, case: Case, inversion: Inversion, steps: Sequence[int]) -> list[Motion]:
        """The embedding during one inversion, after each number of `steps`; 0 is its start."""
        kept: dict[int, Motion] = {}

        def keep(progress: Progress) -> None:
            if progress.stage == "learn" and progress.motion is not None and progress.step in steps:
                kept[progress.step] = replace(progress.motion, tokens=progress.motion.tokens.detach().clone())

        pipeline.learn(
            self.svd,
            [self._clip(scene) for scene in case.references[: inversion.num_clips]],
            recipe=inversion.recipe,
            num_tokens=inversion.num_tokens,
            shared=inversion.shared,
            seed=inversion.seed,
            progress=keep,
            fetch_every=1,  # the tokens of every step
        )
        return [kept[step] for step in steps]

    def _clip(self, scene: Scene) -> Clip:
        """A scene as if it had been read from a file."""
        fps = self.config.micro.fps_id + 1
        times = tuple(i / fps for i in range(scene.num_frames))
        return Clip(pixels(render(scene)), fps, times, source="procedural world", source_size=self.config.size)

    # ------------------------------------------------------------------------------------------ videos

    def animate(self, scene: Scene, motion: Motion | None, index: int, unconditional: bool = False) -> np.ndarray:
        """The first frame of a scene under an embedding: uint8 [F, 3, H, W]. None: plain image-to-video.

        `index` numbers the targets of a motion; each has its own noise. `unconditional` leaves out the image.
        """
        image = pixels(first_frame(scene))[None]
        # The default guidance without an image is the paper's, for SVD; the weaker one with an image serves here.
        video = pipeline.animate(
            self.svd, motion, image, guidance=GUIDANCE, seed=self.seed + index, unconditional=unconditional
        )
        return video.numpy()

    def animate_all(self, scenes: Sequence[Scene], motion: Motion | None) -> list[np.ndarray]:
        """`animate` for the targets of one motion."""
        return [self.animate(scene, motion, i) for i, scene in enumerate(scenes)]

    def clips(self, case: Case, motion: Motion | None) -> list[np.ndarray]:
        """`animate_all` for the targets of a case; remembered for each motion object."""
        key = case, id(motion)
        if key not in self._clips:
            # Holding the motion keeps its id from being reused.
            self._clips[key] = motion, self.animate_all(case.targets, motion)
        return self._clips[key][1]

    # ------------------------------------------------------------------------------------------ measures

    def errors(self, case: Case, motion: Motion | None) -> list[float]:
        """The motion error of each target of a case under an embedding."""
        return [clip_error(clip, scene) for clip, scene in zip(self.clips(case, motion), case.targets, strict=True)]

    def losses(self, case: Case, motion: Motion | None) -> list[float]:
        """The model's loss on the true clip of each target of a case, under an embedding."""
        return [self.loss(scene, motion, i) for i, scene in enumerate(case.targets)]

    @torch.no_grad()
    def loss(self, scene: Scene, motion: Motion | None, index: int) -> float:
        """The model's loss (equation 1) on the clip that `scene` describes, given its first frame and an embedding.

        A mean over noise levels, evenly spread over SVD's training distribution. The better an embedding describes
        the motion, the lower its loss, even where the model is too weak to draw it.
        """
        config, noise = self.config, torch.Generator().manual_seed(self.seed + index)
        clip = self.pixels(render(scene))[None]  # [1, F, 3, H, W]
        tokens = motion.sets if motion else self.svd.tokens_of(clip[:, 0], config.num_frames)
        network = self.svd.network(self.svd.prepare(clip[:, 0], tokens, config.micro, noise))
        x0, levels, losses = self.svd.encode(clip), self.settings.noise_levels, []
        for quantile in (torch.arange(levels) + 0.5) / levels:
            sigma = edm.training_sigma(quantile[None], config.p_mean, config.p_std, config.sigma_max)
            losses.append(edm.loss(network, x0, sigma.to(x0), torch.randn(x0.shape, generator=noise).to(x0)))
        return torch.stack(losses).mean().item()
