"""The paper's experiments, a function each. Section, figure and equation numbers are the paper's.

An experiment takes an `Evaluation`, writes its pictures into `Evaluation.folder`, and returns what it measured: by the
label of a table row and by quantity, a value for every target of every motion.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import correlation
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimti.attention_maps import AttentionMaps, heat_maps
from minimti.config import NUM_TOKENS
from minimti.evaluate import figures
from minimti.evaluate.evaluation import (
    Case,
    Evaluation,
    Inversion,
    body_colour,
    follows,
    mirrored_motion,
    random_case,
)
from minimti.evaluate.results import Result, Values
from minimti.motion import Motion
from minimti.score import EXPECTED, NOT_EXPECTED, THRESHOLDS, expectation, measure
from minimti.world.clips import habitual_scene
from minimti.world.scene import CAMERA_WORDS, NUM_SLOTS, Program, Scene, Trajectory, Wave, flip, render, trajectory
from minimti.world.shapes import SHAPES
from minimti.world.tracker import search

TOKEN_LAYOUTS = ((True, 1), (True, 15), (False, 1), (False, NUM_TOKENS), (False, 15))  # (shared, N) of figure 9
CURVE = (0, 0.05, 0.15, 0.4, 1)  # shares of an inversion's steps after which `iterations` measures the error
MILESTONES = (0, 0.25, 0.5, 1)  # the same, for the pictures of `unconditional`
P_MEANS = (1.0, 2.8)  # mean of ln(sigma) in SVD's training and in the paper's inversion; the model's own is added
SCORED = (0, 0.05, 0.13, 0.25, 0.5, 1)  # the same, for `score`: embeddings that transfer not at all, hardly, and well
WORKS, FAILS = 0.35, 0.7  # mean error of a motion's targets below which it transfers, and above which it does not
GAITS = (Wave(0.2, 4), Wave(0.2, 8))  # two rhythms of the same movement


def caption(evaluation: Evaluation) -> Result:
    """The reference's program in words: what the model does with a perfect description of the motion."""
    return {"true caption": judge(evaluation, lambda case: evaluation.caption(case.reference))}


def transfer(evaluation: Evaluation) -> Result:
    """Figures 1, 7, 8: motion transfer by motion-textual inversion, F + 1 sets of NUM_TOKENS tokens."""
    rows = []
    for case in evaluation.cases.values():
        rows += [render(case.reference), *evaluation.clips(case, evaluation.learn(case))[:2]]
    figures.write_rows(evaluation.folder / "transfer.png", rows[: 3 * figures.MOTIONS])
    return {"learned motion": judge(evaluation, evaluation.learn)}


def together(evaluation: Evaluation, number: int) -> Result:
    """One motion learned from several clips, of different sprites, in as many steps as `transfer` takes for one."""
    inversion = replace(evaluation.inversion(), num_clips=number)
    return {f"learned from {number} clips": judge(evaluation, partial(evaluation.learn, inversion=inversion))}


def baselines(evaluation: Evaluation) -> Result:
    """Section 4.3: conditioning without any optimisation.

    "target's image": plain image-to-video, conditioned on the target's own embedding. "reference's frames": the
    embeddings of the reference's frames, with which an inversion begins.
    """
    return {
        "target's image": judge(evaluation, lambda case: None),
        "reference's frames": judge(evaluation, lambda case: evaluation.frame_embeddings(case.reference)),
    }


def flipped(evaluation: Evaluation) -> Result:
    """Figure 13: a mirrored target moves in the mirrored direction.

    The rate of mirrored targets that move by their new heading, rather than by the one before. Targets are left out
    for which both are the same motion.
    """
    answers: Values = {}
    rows = []
    for name, case in evaluation.cases.items():
        scenes = [flip(scene) for scene in case.targets]
        motion = evaluation.learn(case)
        clips = evaluation.animate_all(scenes, motion)
        answers[name] = [follows_mirrored(clip, scene) for clip, scene in zip(clips, scenes)]
        rows += [evaluation.clips(case, motion)[0], clips[0]]
    figures.write_rows(evaluation.folder / "flip.png", rows[: 2 * figures.MOTIONS])
    return {"mirrored targets": {"rate": answers}}


def follows_mirrored(clip: np.ndarray, mirrored: Scene) -> bool | None:
    """Whether a clip of a mirrored target moves in the mirrored direction; None where there is no difference."""
    unmirrored = trajectory(flip(mirrored))[0]
    return follows(clip, mirrored, trajectory(mirrored)[0], mirrored_motion(unmirrored, mirrored))


def swap(evaluation: Evaluation) -> Result:
    """Figure 3: with the image embeddings of two images exchanged, each moves as the other would.

    The rate of images that move by the other's habit rather than by their own, by the shape whose habit it is. Pairs
    whose habits are too similar are left out.
    """
    rng, rows = evaluation.rng(1), []
    answers: Values = {shape: [] for shape in SHAPES}
    for i in range(2 * evaluation.settings.motions):
        pair = [habitual_scene(rng, evaluation.config) for _ in range(2)]
        for k, (scene, other) in enumerate((pair, pair[::-1])):
            clip = evaluation.animate(scene, evaluation.image_embedding(other), 2 * i + k)
            exchanged = trajectory(with_habit_of(scene, other))[0]
            answers[other.sprites[0].shape].append(follows(clip, scene, exchanged, trajectory(scene)[0]))
            rows.append(clip)
    figures.write_rows(evaluation.folder / "swap.png", rows[: 2 * figures.MOTIONS])
    return {"exchanged images": {"rate": answers}}


def with_habit_of(scene: Scene, other: Scene) -> Scene:
    """A scene of one sprite, with the program and the gait of another."""
    sprite = replace(scene.sprites[0], wave=other.sprites[0].wave)
    return replace(scene, program=other.program, sprites=(sprite,))


def appearance(evaluation: Evaluation) -> Result:
    """Section 3.2.1: colour and shape stay the target's; nothing of the reference's appearance is transferred.

    "colour error": distance of the body's RGB from the target's, at most sqrt(3), under the learned motion and in plain
    image-to-video. "colour kept", "shape kept": the rate of clips more similar to the target than to the reference.
    """
    errors, plain_errors, colour_kept, shape_kept = {}, {}, {}, {}
    for name, case in evaluation.cases.items():
        clips, plain = evaluation.clips(case, evaluation.learn(case)), evaluation.clips(case, None)
        colours = [body_colour(clip, scene) for clip, scene in zip(clips, case.targets)]
        errors[name] = [colour_error(colour, scene) for colour, scene in zip(colours, case.targets)]
        plain_errors[name] = [colour_error(body_colour(clip, scene), scene) for clip, scene in zip(plain, case.targets)]
        colour_kept[name] = [keeps_colour(c, scene, case.reference) for c, scene in zip(colours, case.targets)]
        shape_kept[name] = [keeps_shape(clip, scene, case.reference) for clip, scene in zip(clips, case.targets)]
    return {
        "learned motion": {"colour error": errors, "colour kept": colour_kept, "shape kept": shape_kept},
        "target's image": {"colour error": plain_errors},
    }


def colour_error(colour: np.ndarray, scene: Scene) -> float:
    """Distance between a colour, RGB [3] in [0,1], and that of the scene's sprite."""
    return float(np.linalg.norm(colour - scene.sprites[0].colour))


def keeps_colour(colour: np.ndarray, scene: Scene, reference: Scene) -> bool:
    """Whether a colour, RGB [3] in [0,1], is nearer to that of the scene's sprite than to the reference's."""
    return colour_error(colour, scene) < colour_error(colour, reference)


def keeps_shape(clip: np.ndarray, scene: Scene, reference: Scene) -> bool:
    """Whether the sprite in a clip of `scene` is better explained by its own shape than by the reference's."""
    disguised = replace(scene.sprites[0], shape=reference.sprites[0].shape)
    pixels = clip.astype(np.float32) / 255
    own, other = (search(pixels, s)[1].mean() for s in (scene, replace(scene, sprites=(disguised,))))
    return bool(own < other)


def editing(evaluation: Evaluation) -> Result:
    """Whether the sets of an embedding can be edited like the frames of a film, which the paper leaves open.

    The rate of targets that move as the edit's name says, rather than as before; for "mixed", rather than as the first
    of the two. Targets are left out for which both are the same motion.
    """
    names, cases = [*evaluation.cases], [*evaluation.cases.values()]
    rates: dict[str, Values] = {}
    for name, case, other in zip(names, cases, cases[1:] + cases[:1]):
        motion = evaluation.learn(case)
        program, others = case.reference.program, other.reference.program
        programs = edited_programs(program, others)
        for edit, tokens in edited_tokens(motion.tokens, evaluation.learn(other).tokens).items():
            answers = rates.setdefault(edit, {}).setdefault(name, [])
            for i, scene in enumerate(case.targets):
                own = moved(scene, program)
                wanted = moved(scene, programs[edit]) if edit in programs else mean_path(own, moved(scene, others))
                clip = evaluation.animate(scene, replace(motion, tokens=tokens), i)
                answers.append(follows(clip, scene, wanted, own))
    return {f"sets {edit}": {"rate": answers} for edit, answers in rates.items()}


def edited_tokens(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Edits of the sets of two motions, tokens [F + 1, N, d] each. With sets of both, temporal sets are averaged."""
    num_frames, mean = len(a) - 1, (a + b) / 2
    half = num_frames // 2
    return {
        "reversed": torch.cat([a[:-1].flip(0), a[-1:]]),
        "stretched": torch.cat([a[torch.arange(num_frames) // 2], a[-1:]]),
        "cut together": torch.cat([a[:half], b[half:-1], mean[-1:]]),
        "mixed": mean,
    }


def edited_programs(a: Program, b: Program) -> dict[str, Program]:
    """What the same edits make of two programs, where that is a program."""
    half = NUM_SLOTS // 2
    return {
        "reversed": a[::-1],
        "stretched": tuple(a[k // 2] for k in range(NUM_SLOTS)),
        "cut together": a[:half] + b[half:],
    }


def moved(scene: Scene, program: Program) -> Trajectory:
    """Where the sprite of a scene would go by another program."""
    return trajectory(replace(scene, program=program))[0]


def mean_path(a: Trajectory, b: Trajectory) -> Trajectory:
    """Halfway between two paths of the same sprite."""
    x, y, length, angle = ((getattr(a, name) + getattr(b, name)) / 2 for name in ("x", "y", "length", "angle"))
    return Trajectory(x, y, length, angle, a.facing)


def kinds(evaluation: Evaluation) -> Result:
    """Figures 8 and 12: two sprites, camera motion, and gaits that differ only in rhythm.

    Learned from one clip and from two, beside the true caption, the best that the model can do; captions have no words
    for gaits.
    """
    cases: dict[str, dict[str, Case]] = {"pans": {}, "zooms": {}}
    for k, word in enumerate(CAMERA_WORDS):
        case = kind_case(evaluation, 1, k, program=(word,) * NUM_SLOTS)
        cases["zooms" if "zoom" in word else "pans"][word] = case
    cases["two sprites"] = {str(k): kind_case(evaluation, 0, k, num_sprites=2) for k in range(2)}
    cases["gaits"] = {
        f"period {wave.period:g}": kind_case(evaluation, 2, k, program=("forward",) * NUM_SLOTS, wave=wave)
        for k, wave in enumerate(GAITS)
    }
    sources = {"true caption": lambda case: evaluation.caption(case.reference), "learned motion": evaluation.learn}
    sources["learned from 2 clips"] = partial(evaluation.learn, inversion=replace(evaluation.inversion(), num_clips=2))
    result: Result = {}
    for kind, drawn in cases.items():
        for source, motion_of in sources.items():
            if (kind, source) != ("gaits", "true caption"):
                errors = {name: evaluation.errors(case, motion_of(case)) for name, case in drawn.items()}
                result[f"{kind}, {source}"] = {"error": errors}
    return result


def kind_case(evaluation: Evaluation, kind: int, number: int, **options: Any) -> Case:
    """A motion of `kinds` with two references; `options` are those of `random_case`."""
    rng, num_targets = evaluation.rng(2, kind, number), evaluation.settings.kind_targets
    return random_case(rng, evaluation.config, num_targets, num_references=2, **options)


def ablation(evaluation: Evaluation) -> Result:
    """Figure 9: the number of sets F' (one for all, or F + 1) and of tokens N in each."""
    num_sets, default = evaluation.config.num_frames + 1, evaluation.inversion()
    return {
        f"{1 if shared else num_sets} x {n}": over_seeds(evaluation, replace(default, shared=shared, num_tokens=n))
        for shared, n in TOKEN_LAYOUTS
    }


def optimiser(evaluation: Evaluation) -> Result:
    """The recipe "muon" beside that of the paper (B.2), which takes twice the steps."""
    return {recipe: over_seeds(evaluation, evaluation.inversion(recipe)) for recipe in ("muon", "paper")}


def iterations(evaluation: Evaluation) -> Result:
    """B.2: the error after some of the steps of the paper's recipe, for three means of ln(sigma).

    At its constant rate a long inversion passes through the shorter ones.
    """
    inversion, cases = evaluation.inversion("paper"), first_cases(evaluation)
    steps = shares_of(inversion, CURVE)
    result: Result = {}
    curves = {}
    for p_mean in sorted({*P_MEANS, evaluation.config.p_mean}):
        changed = replace(inversion, recipe=replace(inversion.recipe, p_mean=p_mean))
        motions = {name: evaluation.snapshots(case, changed, steps) for name, case in cases.items()}
        curve = []
        for i, step in enumerate(steps):
            errors = {name: evaluation.errors(case, motions[name][i]) for name, case in cases.items()}
            result[f"P_mean {p_mean:.1f}, {step} steps"] = {"error": errors}
            curve.append(float(np.mean([*errors.values()])))
        curves[f"P_mean {p_mean:.1f}"] = curve
    figures.write_curves(evaluation.folder / "iterations.png", steps, curves)
    return result


def unconditional(evaluation: Evaluation) -> Result:
    """Figure 6: the first motion without an image, as the inversion goes on. A picture only."""
    case, inversion = [*evaluation.cases.values()][0], evaluation.inversion()
    motions = evaluation.snapshots(case, inversion, shares_of(inversion, MILESTONES))
    clips = [evaluation.animate(case.targets[0], motion, 0, unconditional=True) for motion in motions]
    figures.write_rows(evaluation.folder / "unconditional.png", [render(case.reference), *clips])
    return {}


def score(evaluation: Evaluation) -> Result:
    """How much the score of an embedding says of its transfers (minimti.score), as an inversion goes on.

    A motion works where the mean error of its targets is at most WORKS, fails above FAILS, and is doubtful in between.
    "right": how often the score says the same. "opposite": how often it says "can be expected" of one that fails, or
    "not to be expected" of one that works. The rank correlation is that of the score's figure of motion with this
    error, negated, over all motions and steps.
    """
    inversion = evaluation.inversion()
    steps = shares_of(inversion, SCORED)
    rows: Result = {}
    scores, errors = [], []
    for name, case in evaluation.cases.items():
        clip = evaluation.pixels(render(case.reference))
        for step, motion in zip(steps, evaluation.snapshots(case, inversion, steps)):
            row = rows.setdefault(f"{step} steps", {})
            row.setdefault("error", {})[name] = evaluation.errors(case, motion)
            scores.append(measure(evaluation.svd, motion, clip).learned.motion)
            errors.append(float(np.mean(row["error"][name])))
            said = expectation(scores[-1], *THRESHOLDS["tiny"])
            deserved = expectation(-errors[-1], -WORKS, -FAILS)
            row.setdefault("motion", {})[name] = [scores[-1]]
            row.setdefault("right", {})[name] = [said == deserved]
            row.setdefault("opposite", {})[name] = [{said, deserved} == {EXPECTED, NOT_EXPECTED}]
    ranks = [np.argsort(np.argsort(values)).tolist() for values in (scores, -np.array(errors))]
    return rows | {"motion and error": {"rank correlation": {"all": [correlation(*ranks)]}}}


def attention(evaluation: Evaluation) -> Result:
    """Figure 5: how the positions of each frame distribute their attention over the tokens, with one token and five.

    "deviation over positions": of a token's share of the attention; 0 where all positions attend alike.
    """
    name, case = [*evaluation.cases.items()][0]
    result: Result = {}
    rows = []
    for n in (1, NUM_TOKENS):
        motion = evaluation.learn(case, replace(evaluation.inversion(), num_tokens=n))
        with AttentionMaps(evaluation.svd, evaluation.config.num_frames) as maps:
            clip = evaluation.animate(case.targets[0], motion, 0)
        mean = maps.mean()  # [F, L, N]
        result[f"{n} token{'s' * (n > 1)}"] = {"deviation over positions": {name: [mean.std(1).mean().item()]}}
        grey = (255 * heat_maps(mean, evaluation.config.size)).byte().numpy()  # [N, F, H, W], white for 1
        rows += [clip, *grey[:, :, None].repeat(3, axis=2)]
    figures.write_rows(evaluation.folder / "attention.png", rows)
    return result


# ---------------------------------------------------------------------------------------------- shared parts


def judge(evaluation: Evaluation, motion_of: Callable[[Case], Motion | None]) -> dict[str, Values]:
    """The motion error and the model's loss on all targets, each under the embedding of its case."""
    motions = {name: motion_of(case) for name, case in evaluation.cases.items()}
    return {
        "error": {name: evaluation.errors(case, motions[name]) for name, case in evaluation.cases.items()},
        "loss": {name: evaluation.losses(case, motions[name]) for name, case in evaluation.cases.items()},
    }


def over_seeds(evaluation: Evaluation, inversion: Inversion) -> dict[str, Values]:
    """Error and loss of the first motions' targets, by several seeds of an inversion one after the other."""
    errors: Values = {}
    losses: Values = {}
    for name, case in first_cases(evaluation).items():
        errors[name], losses[name] = [], []
        for seed in range(evaluation.settings.inversion_seeds):
            motion = evaluation.learn(case, replace(inversion, seed=evaluation.seed + seed))
            errors[name] += evaluation.errors(case, motion)
            losses[name] += evaluation.losses(case, motion)
    return {"error": errors, "loss": losses}


def first_cases(evaluation: Evaluation) -> dict[str, Case]:
    """The motions of the experiments that invert each of them many times."""
    return dict([*evaluation.cases.items()][: evaluation.settings.ablation_motions])


def shares_of(inversion: Inversion, shares: tuple[float, ...]) -> list[int]:
    """Shares of an inversion's steps, as numbers of steps without repetition."""
    return sorted({round(share * inversion.recipe.steps) for share in shares})


EXPERIMENTS: dict[str, Callable[[Evaluation], Result]] = {
    "caption": caption,
    "transfer": transfer,
    "two-clips": partial(together, number=2),
    "three-clips": partial(together, number=3),
    "baselines": baselines,
    "flip": flipped,
    "swap": swap,
    "appearance": appearance,
    "editing": editing,
    "kinds": kinds,
    "ablation": ablation,
    "optimiser": optimiser,
    "iterations": iterations,
    "unconditional": unconditional,
    "score": score,
    "attention": attention,
}
