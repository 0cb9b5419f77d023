"""The experiments: what measures is right on clips whose motion is known, and all of them run."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_pretrain import FEW, SMALLER

from minimti import cli, pipeline
from minimti.checkpoint.find import WEIGHTS
from minimti.checkpoint.load import open_checkpoint
from minimti.config import MODELS
from minimti.evaluate import __main__, evaluation, experiments
from minimti.invert import recipe
from minimti.io import video
from minimti.pretrain import run
from minimti.pretrain.stages import STAGES, mapped, pixels
from minimti.world import captions
from minimti.world.clips import check_sizes
from minimti.world.scene import flip, random_scene, render, trajectory
from minimti.world.tracker import facing

TINY = MODELS["tiny"]
EXPERIMENTS = list(experiments.EXPERIMENTS)


def case(seed: int, **properties) -> evaluation.Case:
    return evaluation.random_case(np.random.default_rng(seed), TINY, 4, **properties)


def test_targets_share_nothing_but_the_motion():
    for seed in range(4):
        drawn = case(seed)
        reference = drawn.reference.sprites[0]
        for i, target in enumerate(drawn.targets):
            (sprite,) = target.sprites
            assert target.program == drawn.reference.program and sprite.shape != reference.shape
            assert (sprite.facing == reference.facing) == bool(i % 2)
            assert evaluation.motion_errors(render(target)[None], [target])[0] < 0.1


def test_a_clip_follows_the_motion_it_shows():
    scene = case(0, program=("forward",) * 7).targets[0]
    mirrored = flip(scene)
    wanted, other = trajectory(mirrored)[0], evaluation.mirrored_motion(trajectory(scene)[0], mirrored)
    assert evaluation.follows(render(mirrored), mirrored, wanted, other) is True
    backwards = replace(mirrored, program=("backward",) * 7)
    assert evaluation.follows(render(backwards), mirrored, wanted, other) is False
    lift = case(0, program=("up",) * 7).targets[0]
    same = evaluation.mirrored_motion(trajectory(lift)[0], flip(lift))
    assert evaluation.follows(render(flip(lift)), flip(lift), trajectory(flip(lift))[0], same) is None


def test_the_colour_is_that_of_the_body():
    for seed in range(4):
        scene = case(seed).reference
        assert np.allclose(evaluation.colour(render(scene), scene), scene.sprites[0].colour, atol=0.01)


def test_one_set_serves_all_frames():
    learned = evaluation.OneSet(torch.randn(1, 3, 4), "tiny", TINY.micro, (64, 64), 0, 0, frames=5)
    spatial, temporal = learned.sets
    assert spatial.shape == (1, 5, 3, 4) and temporal.shape == (1, 3, 4)
    assert all(torch.equal(spatial[0, i], learned.tokens[0]) for i in range(5))


def test_snapshots_come_after_their_steps():
    assert experiments.snapshots(iter(range(10)), [0, 3, 4, 9]) == [0, 3, 4, 9]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of reduced size, hardly trained."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CHUNK", 1)
        for name in ("MEASURED", "NORMALISED", "SHOWN"):
            patch.setattr(run, name, 1)
        patch.setattr(run, "STAGES", tuple(replace(s, batch=min(s.batch, 2)) for s in STAGES))
        run.pretrain(SMALLER, folder / "run", folder, 0, FEW)
    return folder


@pytest.fixture
def call(small, monkeypatch, capfd):
    """Runs the program on it -> exit code, stdout, stderr."""
    monkeypatch.chdir(small)
    monkeypatch.setattr(evaluation, "VIEWS", 2)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "tiny.safetensors", *args])
        with pytest.raises(SystemExit) as stop:
            cli.run(__main__.main)
        return stop.value.code, *capfd.readouterr()

    return call


def test_every_experiment_runs_and_says_what_it_found(call, small):
    few = ("--motions", "2", "--targets", "2", "--steps", "4")
    code, out, error = call(*few, "--out", "found", "--json", "found.json")
    assert code == 0, error
    found = json.loads((small / "found.json").read_text())
    assert list(found) == EXPERIMENTS
    for name in ("caption", "transfer", "baselines", "appearance", "kinds", "ablation", "optimiser", "iterations"):
        assert found[name]["error"] >= 0 and f"| {name} | error | {found[name]['error']:.2f} |" in out
    for name in ("flip", "swap"):
        assert found[name]["rate"] is None or 0 <= found[name]["rate"] <= 1
    assert len(found["ablation"]["15x5"]["seeds"]) == experiments.SEEDS
    assert {path.name for path in (small / "found").iterdir()} == {
        *(f"{name}.png" for name in ("transfer", "flip", "swap", "unconditional", "attention", "iterations"))
    }
    again = call(*few, "--only", "caption", "--json", "again.json")
    assert again[0] == 0 and json.loads((small / "again.json").read_text())["caption"]["error"] == pytest.approx(
        found["caption"]["error"]
    )


@pytest.mark.parametrize(
    "args, said",
    [
        (("--only", "everything"), "invalid choice: 'everything'"),
        (("--model", "nothing"), "nothing: no such file"),
        (("--targets", "1"), "1 is not in 2..1000"),
        (("--json", "no/where.json"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line(call, args, said):
    code, _, error = call(*args)
    assert code == 2 and said in error and error.count("\n") == 1


def test_impossible_models_are_refused(call, small, monkeypatch):
    monkeypatch.setattr(__main__, "check_sizes", lambda config: check_sizes(replace(config, size=(32, 32))))
    code, _, error = call()
    assert code == 2 and "32x32 is lower than 48" in error


@pytest.fixture(scope="module")
def svd():
    """Of the weights in this repository."""
    return pipeline.load(open_checkpoint("tiny"), torch.device("cpu"), torch.float32).requires_grad_(False)


@pytest.mark.full
def test_a_motion_is_transferred_by_the_embedded_weights(svd, tmp_path):
    """A long way up, one of the motions that these weights transfer well."""
    table = captions.load(WEIGHTS / "tiny" / "captions.safetensors")
    bench = evaluation.Evaluation(svd, table, 0, 6, 4, recipe(TINY)["steps"], tmp_path)
    upwards = bench.cases[5]
    errors = bench.transferred(upwards, bench.learned(upwards))
    print(*(f"{error:.2f}" for error in errors))
    assert np.mean(errors) < 0.5


@torch.no_grad()
def test_the_embedded_autoencoder_keeps_motion_and_heading(svd):
    """What is tracked in a clip that went through it is what was drawn."""
    for seed in range(4):
        scene = random_scene(np.random.default_rng(seed))
        clip = pixels(render(scene))[None]
        out = svd.decode(svd.encode(clip)).clamp(-1, 1)
        again = video.to_bytes(out[0]).numpy()
        assert evaluation.motion_errors(again[None], [scene])[0] < 0.1
        assert facing(again, scene) > 0.9
        assert -10 * ((out - clip) / 2).square().mean().log10() > 26  # dB


@torch.no_grad()
def test_the_embedded_latents_move_as_pictures_do(svd):
    """By half a cell: of what changes, all but a small part is a shift."""
    frames = evaluation.first_frames([random_scene(np.random.default_rng(seed)) for seed in range(16)])
    half = torch.tensor([[1, 0, 2 / 32], [0, 1, 0.0]]).expand(len(frames), -1, -1)
    before, after = (svd.encode(x[:, None])[:, 0] for x in (frames, mapped(frames, half).clamp(-1, 1)))
    inside = slice(2, -2)
    other, all_of_it = ((after - x)[..., inside, inside].square().mean() for x in (mapped(before, half), before))
    assert other < 0.15 * all_of_it
