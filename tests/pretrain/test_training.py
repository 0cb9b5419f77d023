"""The training loop: learning rate, averaged weights, gradients, random numbers, and the clips it is given.

A stage with a linear loss takes the place of networks: under a constant gradient, every step of Adam is as long as the
learning rate.
"""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from official import SMALLER
from PIL import Image
from small_runs import FEW, SHORT

from minimti.io.files import InputError
from minimti.pretrain.card import Record, rows
from minimti.pretrain.run import encoded_clips, held_out, learning_rate, train
from minimti.pretrain.stages import STAGES, Stage
from minimti.pretrain.state import DEFAULT, Run, begin, restore
from minimti.world.clips import first_frame, pixels
from minimti.world.scene import WORDS, render

STEPS = 40
BARE = replace(SHORT, weight_decay=0.0, warm_up=1, ema=0.5)


def nothing(config, clips, rng, batch):
    return ()


def linear(model):
    return (1 * model.words.word.weight).sum()


def flat(model):
    return sum((0 * p).sum() for p in (*model.words.parameters(), *model.heads.parameters()))


def trained(folder, settings, loss=linear, steps=STEPS, decays=False) -> tuple[Run, dict, dict]:
    """A run after one stage; its weights before the stage, and its checkpoint (raw weights) after it."""
    folder.mkdir(exist_ok=True)
    stage = Stage("linear", "a line", nothing, loss, steps, 1, ("words", "heads"), (), decays)
    run = begin(SMALLER, folder, folder, 0, 1.0, settings=replace(settings, stages=(stage,)))
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    train(run, lambda: None)
    return run, before, torch.load(folder / "checkpoint.pt", weights_only=True)


def moved(before: dict, after: dict, key: str = "words.word.weight") -> float:
    """How far all elements of a tensor have moved down, in units of the learning rate 1e-3."""
    steps = (before[key] - after[key]) / 1e-3
    assert torch.allclose(steps, steps.mean(), atol=1e-2)
    return steps.mean().item()


@pytest.mark.parametrize(
    "warm_up, decays, rates",
    [(1, False, 40), (10, False, 35.5), (1, True, 30.5), (10, True, 26)],
)
def test_the_learning_rate_rises_and_falls(tmp_path, warm_up, decays, rates):
    """Sums of the rates of 40 steps: 10 rise by tenths, the last 20 fall by twentieths."""
    _, before, saved = trained(tmp_path, replace(BARE, warm_up=warm_up), decays=decays)
    assert moved(before, saved["model"]) == pytest.approx(rates, abs=0.02)


def test_the_learning_rate_of_the_program():
    rates = [learning_rate(DEFAULT, step, 1000, True) for step in (0, 49, 99, 500, 750, 999)]
    assert np.allclose(rates, [1e-5, 5e-4, 1e-3, 1e-3, 5e-4, 2e-6])
    assert learning_rate(DEFAULT, 999, 1000, False) == 1e-3
    assert learning_rate(DEFAULT, 0, 8, False) == pytest.approx(1e-3 / 3)  # a quarter of a short stage
    assert [stage.name for stage in STAGES if not stage.decays] == ["captions"]  # "images" trains the same modules


def test_the_average_of_the_weights_is_what_a_stage_leaves(tmp_path):
    """An average over half of itself and half of the newest weights trails constant steps by one step."""
    run, before, saved = trained(tmp_path, BARE)
    left = run.model.state_dict()
    assert moved(before, saved["model"]) - moved(before, left) == pytest.approx(1, abs=0.01)
    assert torch.equal(left["words.word.weight"], saved["ema"]["words.word.weight"])
    longer, _, _ = trained(tmp_path / "longer", replace(BARE, ema=0.999))
    assert 2 < 40 - moved(before, longer.model.state_dict()) < 20  # short averages at first: no trace of the start


def test_gradients_are_clipped_together(tmp_path):
    """A constant gradient of norm sqrt(12 * 64): Adam's average of it has almost its norm after clipping, 1."""
    _, _, saved = trained(tmp_path, BARE)
    _, adam = saved["optimisers"]
    norm = torch.cat([state["exp_avg"].flatten() for state in adam["state"].values()]).norm().item()
    assert norm == pytest.approx(1 - 0.9**40, abs=1e-3)


def test_weights_decay(tmp_path):
    """Matrices by Muon, and all else by AdamW: 40 times by a tenth of 1 %."""
    _, before, saved = trained(tmp_path, replace(BARE, lr=0.1, weight_decay=0.01), flat)
    for key in ("words.word.weight", "heads.0.bias", "heads.0.weight", "heads.2.weight"):
        assert torch.allclose(saved["model"][key], 0.999**40 * before[key], atol=1e-5), key


def test_only_the_modules_of_a_stage_are_trained(tmp_path):
    run = begin(SMALLER, tmp_path, tmp_path, 0, FEW)
    for i, stage in enumerate(run.stages):
        run.stage = i
        names = set(run.trainable())
        assert names and names == {name for name, _ in run.model.named_parameters() if name.startswith(stage.modules)}
        assert {name for name, p in run.model.named_parameters() if p.requires_grad} == names


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="stage linear: the loss of step 1 is not finite"):
        trained(tmp_path, BARE, lambda model: math.nan * linear(model))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Run, dict]:
    """A run that was stopped after two steps of its second stage, and the content of its checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    stages = tuple(Stage(name, "a line", nothing, linear, 5, 1, ("words", "heads")) for name in ("one", "two"))
    settings = replace(BARE, stages=stages)
    run = begin(SMALLER, folder, folder, 0, 1.0, settings=settings)
    train(run, lambda: None)
    run.stage, run.step = 1, 0
    with pytest.raises(KeyboardInterrupt):
        train(run, lambda: stop_at(run, 2))
    run.history = rows("make", stages, run.records, {})[:1]
    run.save()
    return run, torch.load(run.path, weights_only=True)


def stop_at(run: Run, step: int) -> None:
    if run.step == step:
        raise KeyboardInterrupt


NAN = float("nan")
DAMAGES = {
    "no model": lambda s: s.pop("model"),
    "another tensor in the model": lambda s: s["model"].update(x=torch.zeros(1)),
    "a model that is not finite": lambda s: s["model"]["heads.0.weight"].fill_(NAN),
    "a model on no device": lambda s: s["model"].update({"heads.0.bias": torch.zeros(1, device="meta")}),
    "stage -1": lambda s: s.update(stage=-1),
    "stage -1 without records": lambda s: s.update(stage=-1, records=[]),
    "stage 3": lambda s: s.update(stage=3),
    "stage 1.0": lambda s: s.update(stage=1.0),
    "an earlier stage": lambda s: s.update(stage=0),
    "step -10^9": lambda s: s.update(step=-(10**9)),
    "step 6": lambda s: s.update(step=6),
    "step 6 with six losses": lambda s: [s.update(step=6), s["records"][1]["losses"].extend([1.0] * 4)],
    "step 0 with two steps recorded": lambda s: s.update(step=0),
    "a step in words": lambda s: s.update(step="2"),
    "history of numbers": lambda s: s.update(history=[1]),
    "history without a column": lambda s: s["history"][0].pop("loss"),
    "history with minutes in words": lambda s: s["history"][0].update(minutes="two"),
    "no records": lambda s: s.update(records=[]),
    "three records": lambda s: s["records"].append(s["records"][0]),
    "a record of another kind": lambda s: s["records"][0].update(more=1),
    "a loss too many": lambda s: s["records"][1]["losses"].append(1.0),
    "a loss that is no number": lambda s: s["records"][0]["losses"].__setitem__(0, "low"),
    "a loss that is not finite": lambda s: s["records"][0]["losses"].__setitem__(0, NAN),
    "seconds in words": lambda s: s["records"][0].update(seconds="3"),
    "hardware as a number": lambda s: s["records"][0].update(hardware=[3]),
    "a quality in words": lambda s: s["records"][0].update(psnr="good"),
    "no averages": lambda s: s.update(ema={}),
    "an average of another shape": lambda s: s["ema"].update({"heads.0.bias": torch.zeros(1)}),
    "an average in half precision": lambda s: s["ema"].update({"heads.0.bias": s["ema"]["heads.0.bias"].half()}),
    "an average that is a number": lambda s: s["ema"].update({"heads.0.bias": 0.0}),
    "one optimiser": lambda s: s["optimisers"].pop(),
    "an optimiser without state": lambda s: s["optimisers"][0].pop("state"),
    "a moment of another shape": lambda s: s["optimisers"][1]["state"][0].update(exp_avg=torch.zeros(3)),
    "a parameter without a moment": lambda s: s["optimisers"][1]["state"][0].pop("exp_avg"),
    "state of an unknown parameter": lambda s: s["optimisers"][0]["state"].update({99: {}}),
    "steps that are not finite": lambda s: s["optimisers"][1]["state"][0].update(step=torch.tensor(NAN)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_no_damaged_state_is_restored(stopped, damage):
    run, saved = stopped
    saved = copy.deepcopy(saved)
    damage(saved)
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError)):
        restore(run, saved)


@pytest.mark.parametrize("name, value", [("step", -(10**9)), ("scale", "large"), ("model", None), ("records", 3)])
def test_a_damaged_checkpoint_is_refused(stopped, tmp_path, name, value):
    run, saved = stopped
    torch.save(saved | {name: value}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt: not a checkpoint of minimti.pretrain; name another --run"):
        begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=run.settings)


def test_a_state_that_is_whole_goes_on(stopped, tmp_path):
    """The constants of its optimisers are those of the settings, whatever the file says."""
    run, saved = stopped
    saved = copy.deepcopy(saved)
    for optimiser in saved["optimisers"]:
        optimiser["param_groups"][0].update(lr="high", betas=3, momentum=None)
    torch.save(saved, tmp_path / "checkpoint.pt")
    run = begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=run.settings)
    assert (run.stage, run.step) == (1, 2)
    train(run, lambda: None)
    assert len(run.records[1].losses) == 5


def test_the_precision_stays_on_a_device_of_the_same_type(stopped):
    run, saved = stopped
    run = copy.copy(run)
    for device, expected in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        run.dtype = torch.float32
        restore(run, copy.deepcopy(saved) | {"computed": (device, "bfloat16")})
        assert run.dtype == expected


def test_damaged_clips_are_named(tmp_path):
    settings = replace(SHORT, num_chunks={"captions": 1})
    run = begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=settings)
    whole = encoded_clips(run, "captions", lambda: None)
    path = tmp_path / "encoded" / "captions-0000.pt"
    for damage in (
        {"seconds": "two"},
        {"seconds": NAN},
        {"tensors": None},
        {"tensors": vars(whole) | {"more": torch.zeros(1)}},
        {"tensors": vars(whole) | {"image": whole.image.float()}},
        {"tensors": vars(whole) | {"image": whole.image[1:]}},
        {"tensors": vars(whole) | {"latents": whole.latents * NAN}},
        {"tensors": vars(whole) | {"words": whole.words + 99}},
        {"tensors": vars(whole) | {"words": torch.full_like(whole.words, len(WORDS))}},
    ):
        torch.save({"seconds": 1.0, "tensors": vars(whole)} | damage, path)
        with pytest.raises(
            InputError, match="captions-0000.pt: no encoded clips of this run; delete it, and it is made"
        ):
            encoded_clips(run, "captions", lambda: None)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="no encoded clips of this run"):
        encoded_clips(run, "captions", lambda: None)
    path.unlink()
    assert torch.equal(encoded_clips(run, "captions", lambda: None).latents, whole.latents)


def test_a_stopped_stage_is_saved_at_its_last_step(tmp_path):
    calls = []

    def check():
        calls.append(True)
        if len(calls) == 4:
            raise KeyboardInterrupt

    stage = Stage("linear", "a line", nothing, linear, STEPS, 1, ("words", "heads"))
    run = begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=replace(BARE, stages=(stage,)))
    with pytest.raises(KeyboardInterrupt):
        train(run, check)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3 and len(saved["records"][0]["losses"]) == 3 and saved["optimisers"][1]["state"]


def test_a_stage_is_saved_every_two_minutes_and_at_its_end(tmp_path, monkeypatch):
    """Steps take 50 s each, so that the third is the first after two minutes."""
    saved, seconds = [], itertools.count(0, 50)
    monkeypatch.setattr("minimti.pretrain.run.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(Run, "save", lambda run: saved.append(run.step))
    stage = Stage("linear", "a line", nothing, linear, 8, 1, ("words", "heads"))
    run = begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=replace(BARE, stages=(stage,)))
    train(run, lambda: None)
    assert saved == [3, 6, 8]


def test_every_step_stage_and_seed_has_its_own_random_numbers(tmp_path):
    drawn = []

    def draw(config, clips, rng, batch):
        drawn.append(rng.random())
        return ()

    stages = tuple(Stage(name, name, draw, linear, 3, 1, ("words", "heads")) for name in ("one", "two"))
    for seed in (0, 1):
        run = begin(SMALLER, tmp_path, tmp_path, seed, 1.0, settings=replace(BARE, stages=stages))
        for run.stage in (0, 1):
            run.step = 0
            train(run, lambda: None)
        run.path.unlink()
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 3
    run.stages, run.stage, run.step, run.records = stages[1:], 0, 0, []  # as with --stages two
    train(run, lambda: None)
    assert drawn[-3:] == drawn[9:12]


def test_all_encoded_and_held_out_clips_differ(tmp_path):
    """Between chunks, kinds, and those that are held out: the latents of first frames are far apart."""
    run = begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=replace(SHORT, num_chunks={"captions": 2, "habits": 2}))
    images = []
    for kind in ("captions", "habits"):
        images.append(encoded_clips(run, kind, lambda: None).image[::2].float())  # without mirror images
        frames = np.stack([first_frame(scene) for scene in held_out(run, kind, 3)])
        with torch.no_grad():
            images.append(run.model.svd.vae.encode(pixels(frames)))
    together = torch.cat(images)
    assert [len(part) for part in images] == [4, 3, 4, 3]
    gaps = (together[:, None] - together).flatten(2).abs().mean(2)[~torch.eye(14, dtype=bool)]
    assert gaps.min() > 0.3 * gaps.mean()


def test_psnr_is_that_of_the_pictures(finished):
    """The picture shows each measured clip above its reconstruction."""
    run, folder = finished
    for record, name in zip(run.records, ("frames", "clips")):
        picture = np.asarray(Image.open(folder / f"{name}.png")).astype(float) / 255
        true, out = picture.reshape(2, 2, 48, 8 * 48, 3).swapaxes(0, 1)  # each [2, H, (F W), 3]
        assert record.psnr == pytest.approx(-10 * np.log10(np.square(true - out).mean()), abs=0.05)


def test_scaled_latents_have_unit_variance(finished):
    """They are those of the held-out clips that are not measured, every fourth frame."""
    run, _ = finished
    clips = np.stack([render(scene)[::4] for scene in held_out(run, "captions", 4)[2:]])
    with torch.no_grad():
        latents = run.model.svd.encode(pixels(clips))  # [2, 2, z, h, w]
    assert torch.allclose(latents.std((0, 1, 3, 4)), torch.ones(latents.shape[2]), atol=0.05)
    assert torch.allclose(latents.mean((0, 1, 3, 4)), torch.zeros(latents.shape[2]), atol=0.05)


def test_the_card_counts_the_time_of_encoding_once():
    falling = [float(loss) for loss in range(40, 0, -1)]
    records = [Record([3.0, 2.0, 1.0], 60.0, ["one machine", "another"]), Record(falling, 120.0, psnr=31.25)]
    first, second = rows("make", STAGES[3:], records, {"captions": 90.0, "habits": 30.0})
    assert first == {
        "command": "make",
        "stage": "captions: text to video",
        "steps": 3,
        "batch": 4,
        "minutes": 2.5,
        "loss": "3.0000 to 1.0000",
        "held-out PSNR": "",
        "on": "one machine; another",
    }
    assert second["minutes"] == 2.5 and second["loss"] == "39.5000 to 1.5000" and second["held-out PSNR"] == "31.2 dB"
