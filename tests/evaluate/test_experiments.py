"""The experiments measure what they say: on a model that is ideal, on one that is disobedient, and on a random one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ideal import habit_of, moved

from minimti.attention_maps import AttentionMaps
from minimti.evaluate import experiments
from minimti.evaluate.evaluation import Evaluation, Settings, body_colour, clip_error
from minimti.evaluate.experiments import EXPERIMENTS
from minimti.evaluate.results import summary
from minimti.networks.attention import attention
from minimti.score import Figures, Score
from minimti.world.scene import flip, habit, render
from minimti.world.shapes import SHAPES

WORDLESS = ("gaits", "true caption")  # captions have no words for gaits
PICTURES = ("transfer", "flip", "swap", "unconditional", "attention", "iterations")


def mean(values: dict) -> float:
    return summary([values])["mean"]


@pytest.mark.parametrize("name, label", [("caption", "true caption"), ("transfer", "learned motion")])
def test_an_ideal_model_transfers_without_error(ideal, name, label):
    found = EXPERIMENTS[name](ideal)[label]["error"]
    assert list(found) == list(ideal.cases) and all(len(errors) == 3 for errors in found.values())
    assert max(error for errors in found.values() for error in errors) < 0.2


def test_a_model_that_ignores_embeddings_has_the_error_of_the_habits(ideal):
    ideal.obedient = False
    found = EXPERIMENTS["transfer"](ideal)["learned motion"]["error"]
    assert found == habitual_errors(ideal)


def test_baselines_are_the_habits_of_the_targets_and_the_frames_of_the_reference(ideal):
    found = EXPERIMENTS["baselines"](ideal)
    assert found["target's image"]["error"] == habitual_errors(ideal)
    standing_still = found["reference's frames"]["error"]
    assert all(error == pytest.approx(1, abs=0.1) for errors in standing_still.values() for error in errors)


def test_edits_of_sets_are_those_of_their_names():
    a, b = torch.arange(5.0)[:, None, None], 10 + torch.arange(5.0)[:, None, None]  # the last is the temporal set
    edited = {edit: tokens.flatten().tolist() for edit, tokens in experiments.edited_tokens(a, b).items()}
    assert edited == {
        "reversed": [3, 2, 1, 0, 4],
        "stretched": [0, 0, 1, 1, 4],
        "cut together": [0, 1, 12, 13, 9],
        "mixed": [5, 6, 7, 8, 9],
    }
    programs = experiments.edited_programs(tuple("abcdefg"), tuple("ABCDEFG"))
    assert {edit: "".join(program) for edit, program in programs.items()} == {
        "reversed": "gfedcba",
        "stretched": "aabbccd",
        "cut together": "abcDEFG",
    }


@pytest.mark.parametrize("edited", [True, False])
def test_editing_counts_the_clips_that_move_as_edited(ideal, monkeypatch, edited):
    tokens = torch.zeros(ideal.config.num_frames + 1, 5, 64)
    monkeypatch.setattr(ideal, "learn", lambda case: replace(ideal.caption(case.reference), tokens=tokens))
    paths, path = [], experiments.moved

    def recorded(scene, program):
        paths.append((scene, program))
        return path(scene, program)

    def animate(scene, motion, index):
        """By the program before the edit, or by the one that was asked for last: that after it, or the other's."""
        program = paths[-1][1] if edited else paths[-2][1]
        return render(replace(scene, program=program))

    monkeypatch.setattr(experiments, "moved", recorded)
    monkeypatch.setattr(ideal, "animate", animate)
    rates = {label: found["rate"] for label, found in EXPERIMENTS["editing"](ideal).items()}
    assert list(rates) == ["sets reversed", "sets stretched", "sets cut together", "sets mixed"]
    if edited:
        del rates["sets mixed"]  # the clips show the other motion, not that between the two
    assert all(mean(rate) == edited for rate in rates.values())


def test_the_mean_of_two_paths_lies_between_them(ideal):
    scene = next(iter(ideal.cases.values())).targets[0]
    up, down = (experiments.moved(scene, (word,) * 7) for word in ("up", "down"))
    between = experiments.mean_path(up, down)
    assert np.allclose(between.y, up.y[0]) and np.allclose(between.x, up.x) and between.facing == up.facing


def habitual_errors(evaluation: Evaluation) -> dict[str, list[float]]:
    """What plain image-to-video has if it is ideal: each target moves by the habit of its own shape."""
    return {
        name: [clip_error(render(moved(target, *habit_of(target))), target) for target in case.targets]
        for name, case in evaluation.cases.items()
    }


def test_mirrored_targets_of_an_ideal_model_move_the_mirrored_way(ideal):
    answers = EXPERIMENTS["flip"](ideal)["mirrored targets"]["rate"]
    assert mean(answers) == 1 and summary([answers])["clips"] >= 6


def test_flip_finds_a_motion_that_does_not_turn_with_the_target(ideal, monkeypatch):
    """A model that repeats the path of the unmirrored target in the picture, whichever way the sprite faces."""
    scene = next(iter(ideal.cases.values())).targets[0]
    scene = moved(scene, ("forward",) * 7, None)
    backward = render(moved(flip(scene), ("backward",) * 7, None))
    assert experiments.follows_mirrored(backward, flip(scene)) is False
    assert experiments.follows_mirrored(render(flip(scene)), flip(scene)) is True


@pytest.mark.parametrize("obedient", [True, False])
def test_exchanged_embeddings_exchange_motions_where_the_model_obeys(ideal, obedient):
    ideal.obedient = obedient
    answers = EXPERIMENTS["swap"](ideal)["exchanged images"]["rate"]
    assert list(answers) == list(SHAPES) and sum(map(len, answers.values())) == 12
    assert mean(answers) == obedient


def test_the_rate_of_swaps_is_that_of_the_shape_whose_habit_is_taken_over(ideal, monkeypatch):
    """A model that does not move by the habit of one shape: the rate of this shape is 0."""
    animate, ignored = ideal.animate, "airship"

    def animate_but(scene, motion, index):
        program, _ = ideal.movements[id(motion)]
        return animate(scene, None if program == habit(ignored).program else motion, index)

    ideal.settings = replace(ideal.settings, motions=8)
    monkeypatch.setattr(ideal, "animate", animate_but)
    rates = summary([EXPERIMENTS["swap"](ideal)["exchanged images"]["rate"]])["motions"]
    assert rates.pop(ignored) == 0 and set(rates.values()) == {1}


def test_appearance_is_kept_where_only_the_motion_is_transferred(ideal):
    found = EXPERIMENTS["appearance"](ideal)
    assert mean(found["learned motion"]["colour error"]) < 0.02 and mean(found["target's image"]["colour error"]) < 0.02
    assert mean(found["learned motion"]["colour kept"]) == mean(found["learned motion"]["shape kept"]) == 1


def test_the_colour_of_plain_image_to_video_is_measured_on_its_own_clips(ideal, monkeypatch):
    animate = ideal.animate

    def animate_grey(scene, motion, index):
        clip = animate(scene, motion, index)
        return clip // 2 if motion is None else clip

    monkeypatch.setattr(ideal, "animate", animate_grey)
    found = EXPERIMENTS["appearance"](ideal)
    assert mean(found["learned motion"]["colour error"]) < 0.02 and mean(found["target's image"]["colour error"]) > 0.3


def test_appearance_finds_the_reference_in_a_clip(ideal):
    case = next(iter(ideal.cases.values()))
    target, reference = case.targets[0], case.reference
    sprite = target.sprites[0]
    theirs = reference.sprites[0]
    other_shape = replace(target, sprites=(replace(sprite, shape=theirs.shape),))
    assert not experiments.keeps_shape(render(other_shape), target, reference)
    other_colour = replace(target, sprites=(replace(sprite, colour=theirs.colour),))
    colour = body_colour(render(other_colour), target)
    assert not experiments.keeps_colour(colour, target, reference)


def test_token_layouts_are_learned_as_they_are_called(ideal, monkeypatch):
    inversions = []

    def learn(case, inversion):
        inversions.append(inversion)
        return ideal.caption(case.reference)

    monkeypatch.setattr(ideal, "learn", learn)
    found = EXPERIMENTS["ablation"](ideal)
    assert list(found) == ["1 x 1", "1 x 15", "9 x 1", "9 x 5", "9 x 15"]
    layouts = [f"{1 if inversion.shared else 9} x {inversion.num_tokens}" for inversion in inversions]
    assert list(dict.fromkeys(layouts)) == list(found) and {inversion.seed for inversion in inversions} == {0, 1}
    assert all(mean(row["error"]) < 0.2 for row in found.values())


def test_every_kind_of_motion_is_learned_from_one_clip_and_from_two(ideal, monkeypatch):
    learned = []

    def learn(case, inversion=None):
        assert len(case.references) == 2 and case.references[0] != case.references[1]
        learned.append((case, inversion.num_clips if inversion else 1))
        return ideal.caption(case.reference)

    monkeypatch.setattr(ideal, "learn", learn)
    found = EXPERIMENTS["kinds"](ideal)
    kinds = ("pans", "zooms", "two sprites", "gaits")
    sources = ("true caption", "learned motion", "learned from 2 clips")
    assert list(found) == [f"{kind}, {source}" for kind in kinds for source in sources if (kind, source) != WORDLESS]
    assert len({case for case, _ in learned}) == 8 and [n for _, n in learned].count(2) == 8 == len(learned) // 2
    assert all(len(row["error"]) == 2 and mean(row["error"]) < 0.2 for row in found.values())


@pytest.mark.parametrize("obedient", [True, False])
def test_the_score_is_right_where_its_figure_follows_the_error(ideal, monkeypatch, obedient):
    """Sprites that obey move as they should; others by their habits, which are wrong."""
    ideal.obedient = obedient
    figures = iter([0.9, 0.65, 0.1] * 6)
    drawn: list[float] = []

    def measure(svd, motion, clip):
        assert svd is ideal.svd and clip.shape == (8, 3, 48, 48) and -1 <= clip.min() < clip.max() <= 1
        drawn.append(next(figures))
        return Score("tiny", *3 * [Figures(drawn[-1], 0.0)])

    monkeypatch.setattr(experiments, "measure", measure)
    found = EXPERIMENTS["score"](ideal)
    by_step = [row for label, row in found.items() if label.endswith(" steps")]
    names = [*ideal.cases]
    assert len(by_step) == 6 and len(drawn) == 18
    for k, row in enumerate(by_step):
        for m, name in enumerate(names):
            figure, error = drawn[6 * m + k], np.mean(row["error"][name])
            works, fails = error <= 0.35, error > 0.7
            deserved = 0 if works else 2 if fails else 1
            said = 0 if figure >= 0.7 else 1 if figure >= 0.6 else 2
            assert row["motion"][name] == [figure] and row["right"][name] == [said == deserved]
            assert row["opposite"][name] == [abs(said - deserved) == 2]
    assert mean(by_step[0]["error"]) < 0.2 if obedient else mean(by_step[0]["error"]) > 0.7


def test_the_scores_rank_correlation_is_one_for_a_figure_that_falls_with_the_error(ideal, monkeypatch):
    rng, drawn = np.random.default_rng(0), []

    def errors(case, motion):
        drawn.append(rng.random())
        return [drawn[-1]]

    monkeypatch.setattr(ideal, "errors", errors)
    for sign in (1, -1):
        monkeypatch.setattr(
            experiments, "measure", lambda *_, sign=sign: Score("tiny", *3 * [Figures(-sign * np.exp(drawn[-1]), 0.0)])
        )
        found = EXPERIMENTS["score"](ideal)["motion and error"]["rank correlation"]
        assert found["all"] == pytest.approx([sign])


@torch.no_grad()
def test_attention_maps_are_the_weights_of_the_conditional_branch(random_svd):
    """With unit vectors as V, attention returns its weights."""
    with AttentionMaps(random_svd, random_svd.config.num_frames) as maps:
        layer = maps.layers[-1]
        x, tokens = torch.randn(16, 9, 16), 3 * torch.randn(16, 5, 64)  # both branches of 8 frames, 9 positions
        k, v = layer.keys_values(tokens)
        layer(x, k, v)
    weights = attention(layer.split_heads(layer.to_q(x)), k, torch.eye(5).expand(16, 1, 5, 5), few_scores=2**21)
    assert torch.allclose(maps.mean(), weights[8:].mean(1), atol=1e-6) and weights.std() > 0.05


def test_attention_is_recorded_in_every_step_and_not_afterwards(random_svd, words, tmp_path):
    evaluation = Evaluation(random_svd, words, 0, Settings(motions=1, targets=1), tmp_path)
    case = next(iter(evaluation.cases.values()))
    motion = evaluation.caption(case.reference)
    with AttentionMaps(random_svd, random_svd.config.num_frames) as maps:
        evaluation.animate(case.targets[0], motion, 0)
    evaluation.animate(case.targets[0], motion, 0)
    assert len(maps.layers) == 2 and maps.count == 2 * random_svd.config.num_steps
    assert maps.mean().shape == (8, 12 * 12, 7)


@pytest.mark.full
def test_every_experiment_runs_on_a_model_with_random_weights(random_svd, words, tmp_path):
    settings = Settings(
        motions=1, targets=1, steps=3, ablation_motions=1, inversion_seeds=1, kind_targets=1, noise_levels=1,
    )  # fmt: skip
    evaluation = Evaluation(random_svd, words, 0, settings, tmp_path)
    for name, experiment in EXPERIMENTS.items():
        found = experiment(evaluation)
        json.dumps(found)
        for label, quantities in found.items():
            for quantity, values in quantities.items():
                statistics = summary([values])
                assert statistics["mean"] is None or np.isfinite(statistics["mean"]), (name, label, quantity)
    assert {path.name for path in tmp_path.iterdir()} == {"embeddings", *(f"{name}.png" for name in PICTURES)}
