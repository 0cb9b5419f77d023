"""An evaluation in which videos move exactly as their embeddings say."""

from dataclasses import replace

import numpy as np
import torch

from minimti.evaluate.evaluation import Evaluation
from minimti.motion import Motion
from minimti.world.scene import Scene, Wave, habit, render

Movement = tuple[tuple[str, ...], Wave | None]  # a program and a gait


class IdealEvaluation(Evaluation):
    """Evaluation of an ideal model: a sprite moves exactly as its embedding says, and without one by its shape's habit.

    Embeddings stand for what a perfect inversion or encoder would find; those of the reference's frames make sprites
    stand still. With `obedient` false, embeddings change nothing.
    """

    obedient = True

    def __init__(self, *args):
        super().__init__(*args)
        self.movements: dict[int, Movement] = {}  # by the motion's id
        self.kept: list[Motion] = []  # so that ids stay unique

    def meaning(self, movement: Movement) -> Motion:
        motion = Motion(torch.zeros(1, 1, 64), self.config.num_frames, "tiny", self.config.micro, (48, 48), 0, 0, {})
        self.kept.append(motion)
        self.movements[id(motion)] = movement
        return motion

    def caption(self, scene: Scene) -> Motion:
        return self.meaning((scene.program, scene.sprites[0].wave))

    def image_embedding(self, scene: Scene) -> Motion:
        return self.meaning(habit_of(scene))

    def frame_embeddings(self, scene: Scene) -> Motion:
        assert scene in [case.reference for case in self.cases.values()]
        return self.meaning((("still",) * 7, None))

    def snapshots(self, case, inversion, steps) -> list[Motion]:
        return [self.caption(case.reference) for _ in steps]

    def animate(self, scene, motion, index, unconditional=False) -> np.ndarray:
        plain = motion is None or not self.obedient
        return render(moved(scene, *(habit_of(scene) if plain else self.movements[id(motion)])))

    def losses(self, case, motion) -> list[float]:
        return [0.0 for _ in case.targets]


def habit_of(scene: Scene) -> Movement:
    own = habit(scene.sprites[0].shape)
    return own.program, own.wave


def moved(scene: Scene, program: tuple[str, ...], wave: Wave | None) -> Scene:
    """The same picture, another motion."""
    return replace(scene, program=program, sprites=tuple(replace(sprite, wave=wave) for sprite in scene.sprites))
