"""Estimates of memory are never below exact counts of live tensors, and the fastest choice that fits is taken."""

import re
from dataclasses import replace

import pytest
import torch

from minimti.bench import cases
from minimti.bench.cost import estimate_cost
from minimti.budget import GIB, RESERVE, Budget, plan
from minimti.config import MEMORY_MODES, MODELS, SVDConfig
from minimti.io.files import InputError
from minimti.networks import fused
from minimti.svd import SVD

SVD_CONFIG = MODELS["svd"]
SMALL_VIDEO = replace(SVD_CONFIG, size=(256, 192), num_frames=6)  # counted in seconds; counts grow in proportion


def on_meta(config: SVDConfig, dtype: torch.dtype = torch.bfloat16) -> SVD:
    with torch.device("meta"):
        svd = SVD(config)
    svd.unet.to(dtype), svd.image_encoder.to(dtype)
    return svd


FULL = on_meta(SVD_CONFIG)


def choose(available: float | None, training: bool = True, memory: str = "auto", **options) -> Budget:
    where = {"num_frames": 14, "size": (1024, 576), "device": "cuda"} | options
    free = None if available is None else int(available * GIB)
    return plan(FULL, SVD_CONFIG, training=training, memory=memory, available=free, **where)


def counted(step: cases.Step, config: SVDConfig, budget: Budget, dtype: torch.dtype) -> float:
    """Bytes of live tensors at the peak of a step on top of its weights, the fused operators used."""

    def build():
        svd = cases.build(SVD, cases.Case(step, config, dtype, compared=False), "cpu")
        svd.use(budget)
        return svd, *cases.inputs(cases.Case(step, config, dtype), "cpu")

    with fused.forced(True):
        cost = estimate_cost(build, step.run)
    return (cost.peak_gib - cost.weights_gib) * GIB


STEPS = {"train": (cases.TRAIN, True), "denoise": (cases.DENOISE, False), "decode": (cases.DECODE, False)}


@pytest.mark.full
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("step, training", STEPS.values(), ids=STEPS)
def test_estimates_are_not_below_the_counts(step, training, memory):
    svd = on_meta(SMALL_VIDEO)
    free = 2**45
    budget = plan(
        svd, SMALL_VIDEO, SMALL_VIDEO.num_frames, SMALL_VIDEO.size,
        training=training, memory=memory, available=free, device="cuda",
    )  # fmt: skip
    network = svd.vae if step is cases.DECODE else svd.unet
    peak = counted(step, SMALL_VIDEO, budget, torch.bfloat16) + sum(p.nbytes for p in network.parameters())
    assert peak <= budget.needed - RESERVE / 2


@pytest.mark.full
def test_the_embedded_model_fits_its_estimate():
    tiny = MODELS["tiny"]
    svd = on_meta(tiny, torch.float32)
    budget = plan(svd, tiny, 14, tiny.size, training=True, memory="max", available=None, device="cpu")
    assert counted(cases.TRAIN, tiny, budget, torch.float32) <= budget.needed
    assert budget.needed < 2 * GIB


def test_the_fastest_mode_that_fits_is_taken():
    assert [choose(gib).memory for gib in (79, 40, 20, 7.2)] == ["max", "fast", "balanced", "low"]
    assert [choose(gib, training=False).memory for gib in (79, 20, 7)] == ["max", "fast", "balanced"]
    assert choose(None).memory == "balanced"
    needs = [choose(1000, memory=memory).needed for memory in MEMORY_MODES]
    assert needs == sorted(needs, reverse=True) and choose(needs[1] / GIB + 0.01).memory == "fast"


def test_the_modes_need_at_least_what_an_h100_reserved():
    """GiB of a training step, recorded as a graph (bench/results/); "low" has changed since it was measured."""
    for memory, reserved in {"max": 39.90, "fast": 27.03, "balanced": 13.64}.items():
        assert reserved * GIB < choose(1000, memory=memory).needed < 1.15 * reserved * GIB


def test_too_little_memory_is_an_error_before_any_work():
    need = r"1024x576 and 14 frames need about \d+\.\d GiB .* \d\.0 are free; choose "
    with pytest.raises(InputError, match=need + "a smaller model, or --memory low to try it"):
        choose(4)
    with pytest.raises(InputError, match=need + r"--size \d+x\d+, or --memory low to try it") as refused:
        choose(6)
    width, height = map(int, re.findall(r"--size (\d+)x(\d+)", str(refused.value))[0])
    assert choose(6, size=(width, height)).memory == "low" and abs(width / height - 16 / 9) < 0.3
    with pytest.raises(InputError):
        choose(6, size=(width + 64, round((width + 64) * 9 / 16 / 64) * 64))
    assert choose(5, size=(256, 192)).memory != "max"
    assert choose(5, memory="low").memory == "low"  # an order is followed
    with pytest.raises(ValueError, match="unknown memory mode 'all': auto, max, fast, balanced, low"):
        choose(5, memory="all")


def test_what_a_budget_sets():
    most, least = choose(79, training=False), choose(79, training=False, memory="low")
    assert (most.decoder, most.in_turn, most.park, most.images_per_call) == ("whole", False, False, 7)
    assert (least.decoder, least.in_turn, least.park) == ("twice", True, True)
    assert choose(79, memory="fast").decoder == "keep" and most.slice_bytes > least.slice_bytes
    on_cpu = choose(79, device="cpu")
    assert (on_cpu.slice_bytes, on_cpu.images_per_call, on_cpu.park) == (Budget().slice_bytes, 1, False)
    assert most.describe() == f"max, about {most.needed / GIB:.1f} of 79.0 GiB"
    assert choose(None).describe() == f"balanced, about {choose(None).needed / GIB:.1f} GiB"
