"""Motion-textual inversion: what a step draws, what the optimiser gets, and what a fault leaves."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from official import MINI

from minimti import edm
from minimti import invert as module
from minimti.config import MODELS
from minimti.invert import Recipe, draw, invert, loss_and_gradient, make_optimizer, make_recipe, view
from minimti.motion import Motion
from minimti.svd import SVD

F, N, D = MINI.num_frames, 5, MINI.unet.context_dim
ADAM = Recipe("adam", False, False, steps=1, lr=1e-2, p_mean=0.0, p_std=1.0, crop=True, num_cached_views=0)
MUON = replace(ADAM, optimizer="muon", shared_start=True, spread_sigmas=True, lr=0.2)


@pytest.fixture
def motion() -> Motion:
    return Motion(torch.randn(F + 1, N, D), F, MINI.name, MINI.micro, MINI.size, steps=0, seed=0)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(F, 3, MINI.size[1], MINI.size[0]) * 2 - 1


def run(svd, clip, motion, recipe=ADAM, flip=True, **options) -> list[float]:
    return list(invert(svd, partial(view, svd, clip[None], motion, flip, True), motion, recipe, **options))


# ------------------------------------------------------------------------------------------------------------ recipes


def test_the_papers_recipe_is_that_of_section_b_2():
    recipe = make_recipe(MODELS["svd"], "paper")
    assert recipe == Recipe("adam", False, False, 1000, 1e-2, p_mean=2.8, p_std=1.6, crop=True, num_cached_views=100)


def test_ours_takes_half_the_steps():
    recipe = make_recipe(MODELS["svd"], "muon")
    assert recipe == Recipe("muon", True, True, 500, 0.2, p_mean=2.8, p_std=1.6, crop=False, num_cached_views=25)
    assert make_recipe(replace(MODELS["svd"], num_iterations=301), "muon").steps == 150


def test_a_model_names_its_own_recipe():
    for name, recipe in (("svd", "paper"), ("svd-xt", "paper"), ("svd-xt-1-1", "paper"), ("tiny", "muon")):
        assert make_recipe(MODELS[name]) == make_recipe(MODELS[name], recipe)
    with pytest.raises(ValueError, match="unknown recipe 'other': paper or muon"):
        make_recipe(MODELS["svd"], "other")


# -------------------------------------------------------------------------------------------------------------- draws


def test_every_step_draws_other_noise():
    noises = [draw(ADAM, 700.0, seed, step, torch.Size([4, 8]))[1] for seed in (0, 1) for step in range(20)]
    for i, noise in enumerate(noises):
        assert all((noise - other).abs().max() > 0.1 for other in noises[:i])
    assert torch.cat(noises).std().item() == pytest.approx(1, abs=0.1)


def test_a_step_draws_the_same_again():
    for recipe in (ADAM, MUON):
        (sigma, n), (again, same) = (draw(recipe, 700.0, 3, 5, torch.Size([4])) for _ in range(2))
        assert torch.equal(sigma, again) and torch.equal(n, same)


def quantiles(recipe: Recipe, seed: int, steps: int, first: int = 0) -> torch.Tensor:
    """The sigmas of so many steps, as shares of their distribution, in order."""
    sigmas = [draw(recipe, 1e9, seed, first + step, torch.Size([1]))[0].item() for step in range(steps)]
    return torch.special.ndtr(torch.tensor(sigmas).log()).sort().values


def test_spread_sigmas_leave_no_gap_at_any_time():
    for seed in range(3):
        for steps, first in ((8, 0), (64, 0), (500, 0), (64, 10**6)):
            shares = quantiles(MUON, seed, steps, first)
            gaps = torch.cat([shares[:1], shares.diff(), 1 - shares[-1:]])
            assert gaps.max() < 2.7 / steps and shares.diff().min() > 0.3 / steps
    assert quantiles(MUON, 0, 1) != quantiles(MUON, 1, 1)


def test_independent_sigmas_follow_the_distribution_with_gaps():
    """Kolmogorov-Smirnov: for 2000 draws the largest distance from the diagonal passes 0.036 in 1 % of cases."""
    shares = quantiles(ADAM, 0, 2000)
    assert (shares - torch.linspace(0, 1, 2000)).abs().max() < 0.036
    assert 4 / 2000 < shares.diff().max() < 12 / 2000  # the largest of n random gaps is about ln(n) / n


def test_sigma_has_the_mean_and_deviation_of_the_recipe():
    sigmas = [draw(replace(MUON, p_mean=2.8, p_std=1.6), 1e9, 0, step, torch.Size([1]))[0] for step in range(500)]
    logs = torch.cat(sigmas).log()
    assert logs.mean().item() == pytest.approx(2.8, abs=0.02) and logs.std().item() == pytest.approx(1.6, abs=0.05)


def test_sigma_is_clamped_to_the_largest_of_the_model(mini_svd, motion, clip, monkeypatch):
    seen = []
    loss = edm.loss
    monkeypatch.setattr(edm, "loss", lambda network, x0, sigma, n: seen.append(sigma) or loss(network, x0, sigma, n))
    run(mini_svd, clip, motion, replace(ADAM, p_mean=9.0, p_std=0.0))
    assert seen[0].item() == MINI.sigma_max


# -------------------------------------------------------------------------------------------------------------- views


def test_views_differ_and_repeat(mini_svd, motion, clip):
    latents = [view(mini_svd, clip[None], motion, True, True, index)[0] for index in (0, 1, 2, 0)]
    for i in range(3):
        for j in range(i):
            assert (latents[i] - latents[j]).norm() > 0.1 * latents[i].norm()
    assert torch.equal(latents[0], latents[3])


def test_a_view_is_of_the_augmented_clip(mini_svd, motion, clip, monkeypatch):
    """Latents and conditioning come from the same augmentation, which mirrors and crops only where it may."""
    svd, changed, calls = mini_svd, clip.flip(-1) / 2, []
    monkeypatch.setattr(module, "augment", lambda c, generator, *may: calls.append((c, may)) or changed)
    motion.micro = replace(motion.micro, cond_aug=0.0)
    for flip in (True, False):
        x0, cond = view(svd, clip[None], motion, flip, not flip, index=3)
        assert torch.equal(x0, svd.encode(changed[None]))
        assert torch.equal(cond.concat[:, 0], svd.vae.encode(changed[:1]))
    assert [may for _, may in calls] == [(True, False), (False, True)] and torch.equal(calls[0][0], clip)


def test_no_two_draws_share_a_generator(mini_svd, motion, clip, monkeypatch):
    seeds = [module._generator(seed, draw).initial_seed() for seed in (0, 1, 2) for draw in range(2000)]
    assert len({0, *seeds}) == 6001  # 0 is the seed of the tokens' first noise
    used, generator = [], module._generator
    monkeypatch.setattr(module, "_generator", lambda *args: used.append(args) or generator(*args))
    for index in range(3):
        view(mini_svd, clip[None], motion, True, True, index)
    views = used.copy()
    for recipe in (ADAM, MUON):
        used.clear()
        for step in range(3):
            draw(recipe, 700.0, 0, step, torch.Size([4]))
        assert len(set(views)) == len(set(used)) == 3 and not set(views) & set(used)


# -------------------------------------------------------------------------------------------------------------- steps


def test_the_gradient_is_that_of_the_mean_loss(mini_svd, motion, clip):
    """Neither scaled by the number of elements, nor the temporal set's in place of a frame's."""
    x0, cond = view(mini_svd, clip[None], motion, False, True, 0)
    sigma, n = torch.tensor([1.5]), torch.randn(x0.shape)
    loss, grad = loss_and_gradient(mini_svd, motion, (x0, cond), sigma, n)
    tokens = motion.tokens.clone().requires_grad_()
    plain = edm.loss(mini_svd.network(replace(cond, spatial=tokens[None, :F], temporal=tokens[F:])), x0, sigma, n)
    (expected,) = torch.autograd.grad(plain, tokens)
    assert torch.allclose(loss, plain.detach()) and torch.allclose(grad, expected, rtol=1e-3, atol=1e-8)
    assert not loss.requires_grad and not grad.requires_grad


def test_the_optimiser_is_handed_the_gradient_of_each_step(mini_svd, motion, clip, monkeypatch):
    """Each is that of the step's own noise, sigma and view."""
    handed = []

    class Spy:
        def __init__(self, tokens, lr):
            self.torch_optimizer = torch.optim.SGD([tokens], 0.0)

        def step(self, grad):
            handed.append(grad.clone())

    monkeypatch.setattr(module, "Adam", Spy)
    losses = run(mini_svd, clip, motion, replace(ADAM, steps=3))
    for step in range(3):
        seen = view(mini_svd, clip[None], motion, True, True, step)
        sigma, n = draw(ADAM, MINI.sigma_max, 0, step, seen[0].shape)
        loss, grad = loss_and_gradient(mini_svd, motion, seen, sigma, n)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(handed[step], grad, rtol=1e-4, atol=1e-9)
    assert handed[0].norm() < 1  # the mean's gradient, for latents of 2048 numbers


@pytest.mark.parametrize("recipe", [ADAM, MUON])
def test_gradients_reach_every_token_and_no_weight(mini_svd, motion, clip, recipe):
    before = motion.tokens.clone()
    assert len(run(mini_svd, clip, motion, recipe)) == 1 and motion.steps == 1
    assert ((motion.tokens - before).abs().amax(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in mini_svd.parameters())
    assert not motion.tokens.requires_grad and motion.tokens.grad is None


def test_adam_moves_at_its_rate_in_every_step(mini_svd, motion, clip):
    """With a gradient that does not change, every step of Adam's is the rate, along every axis."""
    optimizer = make_optimizer(motion, ADAM)
    gradient = torch.randn(motion.tokens.shape)
    for _ in range(20):
        before = motion.tokens.clone()
        optimizer.step(gradient)
        assert torch.allclose(before - motion.tokens, 1e-2 * gradient.sign(), rtol=1e-2)


def test_the_rate_of_the_recipe_reaches_the_optimisers(motion):
    for recipe in (ADAM, MUON):
        travelled = []
        for lr in (recipe.lr, 2 * recipe.lr):
            moved = replace(motion, tokens=motion.tokens.clone())
            make_optimizer(moved, replace(recipe, lr=lr, steps=10)).step(torch.ones_like(moved.tokens))
            travelled.append((moved.tokens - motion.tokens).norm().item())
        assert travelled[1] == pytest.approx(2 * travelled[0], rel=1e-3)


def test_inversion_lowers_the_loss(mini_svd, motion, clip):
    """On fixed noise, so that the two losses differ by the tokens alone."""
    x0 = mini_svd.encode(clip[None])
    sigma, n = torch.tensor([1.0]), torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def loss() -> float:
        cond = mini_svd.prepare(clip[:1], motion.sets, motion.micro, torch.Generator().manual_seed(6))
        return edm.loss(mini_svd.network(cond), x0, sigma, n).item()

    before = loss()
    run(mini_svd, clip, motion, replace(ADAM, steps=8, lr=1.0, p_std=0.5), flip=False)
    assert motion.steps == 8
    assert loss() < 0.9 * before


@pytest.mark.parametrize("recipe", [ADAM, MUON])
def test_inversion_is_reproducible(mini_svd, motion, clip, recipe):
    def repeat(seed: int) -> tuple[list[float], torch.Tensor]:
        copy = replace(motion, tokens=motion.tokens.clone(), seed=seed)
        return run(mini_svd, clip, copy, replace(recipe, steps=2)), copy.tokens

    (losses, tokens), (again, same), (other, _) = repeat(0), repeat(0), repeat(1)
    assert losses == again and torch.equal(tokens, same)
    assert losses != other


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("recipe", [ADAM, MUON])
@pytest.mark.parametrize("fetch_every", [1, 4, 100])
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_fault_leaves_the_last_good_step(mini_svd, motion, clip, monkeypatch, recipe, fetch_every, bad):
    """A gradient that is not finite in step `bad` of 6: whatever runs until it is noticed changes nothing."""
    constant, gradients = view(mini_svd, clip[None], motion, False, True, 0), torch.randn(6, *motion.tokens.shape)
    gradients[bad, 1, 2, 3] = torch.nan

    def planted(svd, motion, view, sigma, n, scale):
        return torch.tensor(0.5), gradients[next(steps)]

    monkeypatch.setattr(module, "loss_and_gradient", planted)
    good, steps = replace(motion, tokens=motion.tokens.clone()), iter(range(6))
    iterator = invert(mini_svd, lambda _: constant, good, replace(recipe, steps=6))
    for _ in range(bad):
        next(iterator)
    expected = good.tokens.clone()

    steps, yielded = iter(range(6)), []
    with pytest.raises(FloatingPointError, match=rf"step {bad + 1} \(sigma .*the tokens are those of step {bad}$"):
        for loss in invert(mini_svd, lambda _: constant, motion, replace(recipe, steps=6), fetch_every):
            yielded.append(loss)
    assert torch.equal(motion.tokens, expected) and motion.steps == bad and yielded == [0.5] * bad


@pytest.mark.parametrize("recipe", [ADAM, MUON])
@pytest.mark.parametrize("good", [0, 1])
def test_a_step_that_is_not_finite_changes_neither_tokens_nor_optimiser(motion, recipe, good):
    """After a bad first or second step, good ones go on as if it had not been taken."""
    gradients, results = torch.randn(4, *motion.tokens.shape), []
    for bad in (False, True):
        tokens = motion.tokens.clone()
        learned = replace(motion, tokens=tokens)
        optimizer = make_optimizer(learned, replace(recipe, steps=10_000))  # a rate that hardly falls
        for step, gradient in enumerate(gradients):
            if bad and step == good:
                module._step_if(torch.tensor(False), optimizer, gradient * torch.nan)
            module._step_if(torch.tensor(True), optimizer, gradient)
        results.append(tokens)
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6) and not torch.allclose(results[0], motion.tokens, atol=1e-3)


def test_a_loss_that_is_not_finite_is_a_fault_too(mini_svd, motion, clip, monkeypatch):
    before = motion.tokens.clone()
    gradient = torch.randn(motion.tokens.shape)
    monkeypatch.setattr(module, "loss_and_gradient", lambda *_: (torch.tensor(torch.inf), gradient))
    with pytest.raises(FloatingPointError, match="step 1 "):
        run(mini_svd, clip, motion, MUON)
    assert torch.equal(motion.tokens, before)


def test_a_clip_that_is_not_finite_is_a_fault(mini_svd, motion, clip):
    before = motion.tokens.clone()
    with pytest.raises(FloatingPointError, match=r"step 1 \(sigma .*, seed 0\) is not finite"):
        run(mini_svd, clip * float("nan"), motion)
    assert torch.equal(motion.tokens, before)


@pytest.mark.parametrize("recipe", [ADAM, MUON])
def test_late_fetching_changes_nothing_else(mini_svd, motion, clip, monkeypatch, recipe):
    """Every loss arrives once and in order, and the tokens are the same."""
    constant, gradients = view(mini_svd, clip[None], motion, False, True, 0), torch.randn(7, *motion.tokens.shape)
    results = []
    for fetch_every in (None, 1, 3, 7, 100):
        copy, steps = replace(motion, tokens=motion.tokens.clone()), iter(range(7))

        def planted(svd, motion, view, sigma, n, scale, steps=steps):
            return torch.tensor(float(step := next(steps))), gradients[step]

        monkeypatch.setattr(module, "loss_and_gradient", planted)
        losses = []
        for loss in invert(mini_svd, lambda _: constant, copy, replace(recipe, steps=7), fetch_every):
            losses.append(loss)
            assert copy.steps == min(7, math.ceil(len(losses) / (fetch_every or 1)) * (fetch_every or 1))
        results.append(copy.tokens)
        assert losses == list(range(7))
    assert all(torch.equal(results[0], tokens) for tokens in results[1:])


def test_fp16_halves_the_scale_and_repeats_a_step_that_overflows(mini_svd, motion, clip, monkeypatch):
    """The scale stays halved; a step that overflows at any scale is a fault as in other precisions."""
    constant, scales = view(mini_svd, clip[None], motion, False, True, 0), []

    def planted(svd, motion, view, sigma, n, scale):
        scales.append(scale.item())
        overflows = scale > greatest
        return torch.tensor(0.5), torch.full_like(motion.tokens, torch.inf if overflows else 1.0)

    monkeypatch.setattr(module, "loss_and_gradient", planted)
    monkeypatch.setattr(SVD, "dtype", torch.float16)
    first, greatest = constant[0].numel(), constant[0].numel() / 4
    assert list(invert(mini_svd, lambda _: constant, motion, replace(ADAM, steps=2))) == [0.5, 0.5]
    assert scales == [first, first / 2, first / 4, first / 4] and motion.tokens.isfinite().all()
    greatest, motion.steps = 0.0, 0
    with pytest.raises(FloatingPointError, match="step 1 .*not finite"):
        list(invert(mini_svd, lambda _: constant, motion, replace(ADAM, steps=2)))
    assert min(scales) <= module.MIN_SCALE
