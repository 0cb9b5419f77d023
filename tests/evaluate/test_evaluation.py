"""The measures are right on clips whose motion is known; embeddings and losses belong to the target they are for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from official import SMALLER as SMALL
from official import TINY

from minimti import pipeline
from minimti.checkpoint.find import WEIGHTS
from minimti.evaluate import evaluation
from minimti.evaluate.evaluation import Case, Evaluation, Settings
from minimti.invert import make_recipe
from minimti.motion import zero_start
from minimti.world import captions
from minimti.world.clips import first_frame, pixels
from minimti.world.scene import Scene, flip, random_scene, render, trajectory


def case(seed: int, **properties) -> Case:
    return evaluation.random_case(np.random.default_rng(seed), TINY, 4, **properties)


# ---------------------------------------------------------------------------------------------- measures of a clip


def test_targets_share_nothing_but_the_motion():
    for seed in range(4):
        drawn = case(seed)
        reference = drawn.reference.sprites[0]
        for i, target in enumerate(drawn.targets):
            (sprite,) = target.sprites
            assert target.program == drawn.reference.program and sprite.shape != reference.shape
            assert (sprite.facing == reference.facing) == bool(i % 2)


def test_no_reference_shares_its_shape_with_another_scene():
    for seed in range(4):
        drawn = case(seed, num_references=3)
        shapes = [scene.sprites[0].shape for scene in drawn.references]
        assert len(set(shapes)) == 3 and not {scene.sprites[0].shape for scene in drawn.targets} & set(shapes)
        assert {scene.program for scene in (*drawn.references, *drawn.targets)} == {drawn.reference.program}


def test_the_error_is_0_for_the_true_clip_and_1_for_a_still_one():
    for seed in range(4):
        for target in case(seed).targets[:2]:
            still = np.repeat(first_frame(target)[None], target.num_frames, axis=0)
            assert evaluation.clip_error(render(target), target) < 0.1
            assert evaluation.clip_error(still, target) == pytest.approx(1, abs=0.1)


def test_a_clip_follows_the_motion_it_shows():
    scene = case(0, program=("forward",) * 7).targets[0]
    mirrored = flip(scene)
    wanted, other = trajectory(mirrored)[0], evaluation.mirrored_motion(trajectory(scene)[0], mirrored)
    assert evaluation.follows(render(mirrored), mirrored, wanted, other) is True
    backwards = replace(mirrored, program=("backward",) * 7)
    assert evaluation.follows(render(backwards), mirrored, wanted, other) is False


def test_motions_that_are_too_similar_give_no_answer():
    lift = flip(case(0, program=("up",) * 7).targets[0])
    same = evaluation.mirrored_motion(trajectory(flip(lift))[0], lift)
    assert evaluation.follows(render(lift), lift, trajectory(lift)[0], same) is None


def test_the_colour_is_that_of_the_body():
    for seed in range(4):
        scene = case(seed).reference
        assert np.allclose(evaluation.body_colour(render(scene), scene), scene.sprites[0].colour, atol=0.01)


# ---------------------------------------------------------------------------------------------- the evaluation


@pytest.fixture
def small(random_svd, words, tmp_path) -> Evaluation:
    return Evaluation(random_svd, words, 3, Settings(motions=2, targets=3, steps=2), tmp_path)


def test_a_video_is_made_of_its_own_first_frame_and_noise(small):
    (target, *_), motion = first_case(small).targets, small.caption(first_case(small).reference)
    for index in (0, 2):
        expected = pipeline.animate(small.svd, motion, pixels(first_frame(target))[None], seed=3 + index)
        assert np.array_equal(small.animate(target, motion, index), expected.numpy())
    assert not np.array_equal(small.animate(target, motion, 0), small.animate(target, motion, 1))
    assert not np.array_equal(small.animate(target, motion, 0), small.animate(target, motion, 0, unconditional=True))


def test_plain_image_to_video_is_the_motion_of_the_image_embedding(small):
    for index, target in enumerate(first_case(small).targets[:2]):
        embedding = small.image_embedding(target)
        assert np.array_equal(small.animate(target, None, index), small.animate(target, embedding, index))
        assert small.loss(target, None, index) == pytest.approx(small.loss(target, embedding, index), rel=1e-5)


def test_every_target_has_its_own_embedding_video_and_loss(small):
    case, small.settings = first_case(small), replace(small.settings, noise_levels=1)
    losses = small.losses(case, None)
    for index, target in enumerate(case.targets):
        assert losses[index] == small.loss(target, small.image_embedding(target), index)
        others = [small.loss(target, small.image_embedding(t), index) for t in case.targets if t is not target]
        assert losses[index] not in others
    target = case.targets[0]
    assert small.loss(target, small.image_embedding(target), 1) != losses[0]  # its own noise


def test_the_error_of_a_target_is_taken_against_this_target(small, monkeypatch):
    """Targets that move in three ways, shown as they should move; no clip fits another target or the reference."""
    rng = np.random.default_rng(0)
    programs = [("forward",) * 7, ("up",) * 7, ("turn",) * 7]
    targets = tuple(random_scene(rng, 48, SMALL.num_frames, program=program) for program in programs)
    monkeypatch.setattr(small, "animate", lambda scene, motion, index: render(targets[index]))
    assert max(small.errors(Case(first_case(small).references, targets), None)) < 0.2


def test_embeddings_are_remembered_for_each_motion_and_each_way_of_learning(small, monkeypatch):
    calls, learn = [], pipeline.learn
    monkeypatch.setattr(pipeline, "learn", lambda *args, **kwargs: calls.append(kwargs) or learn(*args, **kwargs))
    first, second = small.cases.values()
    default = small.inversion()
    ways = [None, replace(default, shared=True), replace(default, num_tokens=2), replace(default, seed=9)]
    motions = [small.learn(c, way) for c in (first, second) for way in ways]
    again = [small.learn(c, way) for c in (first, second) for way in ways]
    assert len(calls) == len(motions) == 8
    assert all(a is b for a, b in zip(motions, again))
    assert not any(torch.equal(a.tokens, b.tokens) for i, a in enumerate(motions) for b in motions[:i])
    assert motions[1].tokens.shape == (1, 5, 64) and motions[2].tokens.shape == (SMALL.num_frames + 1, 2, 64)


def test_embeddings_outlast_the_process(small, random_svd, words, monkeypatch):
    """They are read again, for the same model and precision."""
    learned = small.learn(first_case(small))
    again = Evaluation(random_svd, words, small.seed, small.settings, small.folder)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "learn", None)
        assert torch.equal(again.learn(first_case(again)).tokens, learned.tokens)
    files = {*(small.folder / "embeddings").iterdir()}
    other = Evaluation(random_svd, words, small.seed, small.settings, small.folder)
    other.weights = {}
    other.learn(first_case(other))
    assert len({*(small.folder / "embeddings").iterdir()} - files) == 1
    rounded = Evaluation(random_svd, words, small.seed, small.settings, small.folder)
    rounded.svd = SimpleNamespace(dtype=torch.bfloat16, device=random_svd.device)
    monkeypatch.setattr(rounded, "snapshots", lambda *_: [learned])
    rounded.learn(first_case(rounded))
    assert len({*(small.folder / "embeddings").iterdir()} - files) == 2


def test_an_inversion_learns_from_as_many_references_as_it_says(small, monkeypatch):
    clips, learn = [], pipeline.learn
    monkeypatch.setattr(pipeline, "learn", lambda svd, c, **kwargs: clips.append(c) or learn(svd, c, **kwargs))
    drawn, recipe = first_case(small), replace(small.inversion().recipe, steps=3, num_cached_views=3)
    for number in (1, 3):
        small.learn(drawn, replace(small.inversion(), recipe=recipe, num_clips=number))
    assert [len(c) for c in clips] == [1, 3]
    expected = [pixels(render(scene)) for scene in drawn.references]
    assert all(torch.equal(clip.frames, frames) for clip, frames in zip(clips[1], expected, strict=True))


def test_snapshots_are_the_embeddings_after_their_steps(small):
    case, inversion = first_case(small), small.inversion()
    start, one, two = small.snapshots(case, inversion, [0, 1, 2])
    assert [motion.steps for motion in (start, one, two)] == [0, 1, 2]
    assert not torch.equal(start.tokens, one.tokens) and not torch.equal(one.tokens, two.tokens)
    assert torch.equal(two.tokens, small.learn(case).tokens)
    generator = torch.Generator().manual_seed(small.seed)
    assert torch.equal(start.tokens, zero_start(*start.tokens.shape, generator))


def test_a_recipe_is_that_of_training_but_for_the_steps(small):
    """The paper's keeps its ratio to the model's own."""
    for name, steps in (("muon", 2), ("paper", 4)):
        assert small.inversion(name).recipe == replace(make_recipe(small.config, name), steps=steps)
    assert small.inversion() == small.inversion("muon")


def first_case(small: Evaluation) -> Case:
    return next(iter(small.cases.values()))


# ---------------------------------------------------------------------------------------------- on the embedded model


@torch.no_grad()
def test_the_loss_is_lowest_for_the_motion_that_a_clip_shows(tiny, tmp_path):
    """Two targets, two captions: each caption fits the clip of one target, and not that of the other."""
    words = captions.load(WEIGHTS / "tiny" / "words.safetensors")
    small = Evaluation(tiny, words, 0, Settings(motions=0, noise_levels=2), tmp_path)
    programs = [("forward",) * 7, ("up",) * 7]
    rng = np.random.default_rng(1)
    targets: list[Scene] = [random_scene(rng, program=program) for program in programs]
    case = Case(targets[0], tuple(targets))
    losses = np.array([small.losses(case, small.caption(target)) for target in targets])  # [caption, target]
    print(losses)
    assert losses[0, 0] < 0.5 * losses[1, 0] and losses[1, 1] < 0.5 * losses[0, 1]
