"""Checkpoints of a pre-training with anything in them: the run goes on, or one line, in bounded time and memory."""

import io
import random
from dataclasses import replace

import pytest
import torch
from hostile import fuzz, mutated, with_odd_parts
from official import SMALLER
from small_runs import SHORT

from minimti.pretrain.run import train
from minimti.pretrain.stages import Stage
from minimti.pretrain.state import begin

pytestmark = pytest.mark.fuzz


def nothing(config, clips, rng, batch):
    """What a loss needs that takes no time."""
    return ()


def linear(model):
    """A loss that takes no time."""
    return (1 * model.words.word.weight).sum()


def odd_tensor(rng: random.Random) -> torch.Tensor:
    """Of another shape, kind or type, or with other numbers."""
    shape = rng.choice(((), (0,), (3,), (64,), (12, 64), (64, 64)))
    kinds = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)
    return rng.choice(
        (
            lambda: torch.zeros(shape),
            lambda: torch.zeros(shape, dtype=rng.choice(kinds)),
            lambda: torch.full(shape, rng.choice((float("nan"), float("inf"), 3e38, -1.0))),
            lambda: torch.zeros(shape, device="meta"),
            lambda: torch.zeros(12, 64).to_sparse(),
            lambda: torch.zeros(1, 1).expand(12, 64),
            lambda: torch.zeros(1).expand(10**12),
        )
    )()


def odd_part(rng: random.Random, whole: object) -> object:
    """What stands in the place of a part of a checkpoint."""
    return odd_tensor(rng) if isinstance(whole, torch.Tensor) and rng.random() < 0.8 else with_odd_parts(rng, 0)


def damaged(rng: random.Random, whole: object) -> object:
    """A copy in which one part, at any depth, is another."""
    if isinstance(whole, dict) and whole and rng.random() < 0.95:
        key = rng.choice(list(whole))
        if rng.random() < 0.05:
            return {k: v for k, v in whole.items() if k != key}
        return whole | {key: damaged(rng, whole[key])}
    if isinstance(whole, list) and whole and rng.random() < 0.9:
        index = rng.randrange(len(whole))
        return [*whole[:index], damaged(rng, whole[index]), *whole[index + 1 :]]
    return odd_part(rng, whole)


def test_a_checkpoint_goes_on_or_is_refused_in_one_line(tmp_path):
    stages = tuple(Stage(name, "a line", nothing, linear, 4, 1, ("words", "heads")) for name in ("one", "two"))
    settings = replace(SHORT, stages=stages)

    def stop(run):
        if run.step == 2:
            raise KeyboardInterrupt

    run = begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=settings)
    train(run, lambda: None)
    run.stage, run.step = 1, 0
    with pytest.raises(KeyboardInterrupt):
        train(run, lambda: stop(run))
    data, saved = run.path.read_bytes(), torch.load(run.path, weights_only=True)

    def case(rng: random.Random) -> None:
        if rng.random() < 0.2:
            run.path.write_bytes(mutated(rng, data))
        else:
            buffer = io.BytesIO()
            torch.save(damaged(rng, saved), buffer)
            run.path.write_bytes(buffer.getvalue())
        again = begin(SMALLER, tmp_path, tmp_path, 0, 1.0, settings=settings)
        try:
            while again.stage < len(stages):
                train(again, lambda: None)
                assert again.rows
                again.stage, again.step = again.stage + 1, 0
        except FloatingPointError:  # from numbers that are finite and huge: one line too
            pass

    fuzz(case)
