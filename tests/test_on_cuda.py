"""What only a GPU can show: `pytest tests/test_on_cuda.py` on one. Without a GPU all of it is skipped."""

import gc
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import MINI, SMALLER, fill_by_name

from minimti.bench.cases import build, inputs, official_cases, start
from minimti.budget import budget_of
from minimti.config import MODELS
from minimti.invert import invert, make_recipe
from minimti.motion import Motion, frames_start
from minimti.networks.graph import Graphed, record
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE
from minimti.pretrain.run import Gradients
from minimti.pretrain.run import generator as rng
from minimti.pretrain.stages import STAGES, draw_clips, encode_clips
from minimti.pretrain.state import begin
from minimti.ranks import Ranks
from minimti.svd import SVD, Conditioning

sys.path.append(str(Path(__file__).parent / "networks"))
from test_golden import files, read, svd_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PRECISIONS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in fp32 without TF32, which is PyTorch's default on a GPU and rounds to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.cpu().double() - reference.double()).norm() / reference.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("path", files("unet"))
def test_the_unet_is_the_official_one(exact, path, dtype):
    sizes, golden = read(path)
    config = svd_config(sizes, golden["output"].shape[2])
    with torch.device("meta"):
        unet = UNet(config.unet)
    fill_by_name(unet, config, "unet.").to("cuda", dtype)
    names = ("sample", "c_noise", "micro_conditioning", "context_spatial", "context_temporal")
    x, c_noise, micro, spatial, temporal = (golden[name].cuda() for name in names)
    out = unet(x, c_noise, micro, unet.project_tokens(spatial, temporal))
    error = difference(out, golden["output"])
    print(f"{path.stem} {dtype}: {error:.1e}")
    assert error < PRECISIONS[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("path", files("vae"))
def test_the_vae_is_the_official_one(exact, path, dtype):
    sizes, golden = read(path)
    names = ("ch", "num_res_blocks", "z_channels")
    config = replace(MINI.vae, ch_mult=tuple(sizes["ch_mult"]), norm_groups=32, **{name: sizes[name] for name in names})
    with torch.device("meta"):
        vae = VAE(config)
    fill_by_name(vae, replace(MINI, vae=config), "vae.").to("cuda", dtype)
    moments = vae.moments(golden["pixels"].to("cuda", dtype))
    decoded = vae.decoder(golden["latents"].to("cuda", dtype), num_frames=len(golden["latents"]))
    errors = difference(moments, golden["moments"]), difference(decoded, golden["decoded"])
    print(f"{path.stem} {dtype}: encoder {errors[0]:.1e}, decoder {errors[1]:.1e}")
    assert max(errors) < PRECISIONS[dtype]


@pytest.fixture(scope="module")
def svd() -> SVD:
    with torch.device("meta"):
        svd = SVD(MINI)
    svd = fill_by_name(svd, MINI, "").requires_grad_(False).to("cuda")
    svd.device = torch.device("cuda")
    return svd


def learned(svd: SVD, steps: int = 4, name: str = "paper", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens after some steps on one view of random latents."""
    generator = torch.Generator().manual_seed(0)
    frames, (width, height) = MINI.num_frames, MINI.size
    cell = 2 ** (len(MINI.vae.ch_mult) - 1)
    shape = (1, frames, MINI.vae.z_channels, height // cell, width // cell)
    x0, concat = (torch.randn(shape, generator=generator).cuda() for _ in range(2))
    tokens = frames_start(torch.randn(frames, MINI.unet.context_dim, generator=generator).cuda(), 3, generator)
    motion = Motion(tokens, frames, "mini", MINI.micro, MINI.size, 0, 0, {})
    cond = Conditioning(concat, torch.tensor([[6.0, 127.0, 0.02]], device="cuda"), *motion.sets)
    svd.unet.to(dtype)
    list(invert(svd, lambda step: (x0, cond), motion, replace(make_recipe(MINI, name), steps=steps)))
    svd.unet.to(torch.float32)
    return motion.tokens.cpu()


@pytest.mark.parametrize("name", ["paper", "muon"])
def test_a_recorded_step_is_no_further_from_eager_than_eager_from_itself(exact, svd, monkeypatch, name):
    recorded = learned(svd, name=name)
    monkeypatch.setattr(Graphed, "__call__", lambda self, *inputs: self.function(*inputs))
    eager, again = learned(svd, name=name), learned(svd, name=name)
    assert difference(recorded, eager) <= max(2 * difference(again, eager), 1e-6)


def test_processes_average_their_gradients_outside_of_the_recording(svd, monkeypatch):
    """In every step, not only while it is recorded."""
    captured = []

    def mean(ranks, *tensors):
        captured.append(torch.cuda.is_current_stream_capturing())
        return tensors

    monkeypatch.setattr(Ranks, "mean", mean)
    learned(svd, steps=4)
    assert captured == [False] * 4


def test_what_cannot_be_recorded_runs_without_and_says_so():
    step = Graphed(lambda x: (x * x.sum().item(),))
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph and runs without"):
        (first,) = step(torch.ones(2, device="cuda"))
    (second,) = step(torch.full((2,), 3.0, device="cuda"))
    assert first.tolist() == [2, 2] and second.tolist() == [18, 18]


def test_a_recording_takes_little_more_memory_than_its_tensors():
    """One after the other is larger than all memory that those before it have left."""

    def step() -> torch.Tensor:
        return torch.stack([torch.ones(mib * 2**18, device="cuda").mean() for mib in range(20, 120, 10)])

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph, result = record(step)
    assert torch.cuda.memory_reserved() - before < 150 * 2**20
    graph.replay()
    assert result.tolist() == [1] * 10


def test_the_mode_low_fits_a_card_of_8_gb():
    """At the official size, with as much memory as such a card leaves to PyTorch."""
    case, limit = official_cases(MODELS["svd"])["train_low"], 7.4 * 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    try:
        step = start(build(SVD, case, "cuda"), case, "graph", inputs(case, "cuda"))
        assert step().isfinite().all() and torch.cuda.memory_reserved() <= limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", [stage.name for stage in STAGES])
def test_a_recorded_step_of_pretraining_has_the_gradients_of_an_eager_one(exact, tmp_path, monkeypatch, name):
    run = begin(SMALLER, tmp_path, tmp_path, 0, 1e-6, device=torch.device("cuda"))
    run.dtype = torch.float32
    run.stage = [stage.name for stage in STAGES].index(name)
    stage, params = STAGES[run.stage], [*run.trainable().values()]
    clips = {kind: encode_clips(run.model, draw_clips(SMALLER, kind, rng(0), 2)) for kind in stage.clips}
    batches = [stage.draw(SMALLER, clips, rng(seed), 4) for seed in range(4)]

    def found() -> list[torch.Tensor]:
        gradients, losses = Gradients(run, params), []
        for batch in batches:
            losses.append(gradients(batch))
        return [torch.stack(losses), *(p.grad.clone() for p in params if p.grad is not None)]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the step cannot be recorded")
        recorded = found()
    monkeypatch.setattr(Graphed, "__call__", lambda self, *inputs: self.function(*inputs))
    eager = found()
    assert len(recorded) == len(eager)
    for ours, expected in zip(recorded, eager):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_memory_modes_give_the_same(exact, svd):
    results = []
    for memory in ("max", "fast", "balanced", "low"):
        svd.use(budget_of(memory, MINI.num_frames))
        results.append(learned(svd))
    assert all(difference(other, results[0]) < 1e-4 for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_learns_nearly_the_same(svd, dtype):
    assert difference(learned(svd, dtype=dtype), learned(svd)) < 2e-2


def test_parked_networks_come_back(svd):
    svd.use(replace(svd.budget, park=True))
    images = torch.rand(1, 3, *MINI.size[::-1], device="cuda")
    before = svd.encode(images[:, None])
    svd.park("vae")
    assert not next(svd.vae.parameters()).is_cuda
    assert torch.equal(svd.encode(images[:, None]), before) and next(svd.vae.parameters()).is_cuda


@pytest.mark.parametrize("length", [14, 64, 128, 144, 576, 2304])
def test_attention_has_finite_gradients(length):
    """CuDNN's backward pass once gave NaN for masked lengths of 64 modulo 128. There are no masks here."""
    q, k, v = (torch.randn(2, 5, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    grads = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).float().square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
