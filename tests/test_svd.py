"""Conditioning, guidance and sampling: what training and sampling share."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from official import MINI, fill_by_name

from minimti import edm
from minimti.budget import Budget
from minimti.svd import SVD, Conditioning

F, N, D = MINI.num_frames, 5, MINI.unet.context_dim
LATENT = (MINI.unet.out_channels, MINI.size[1] // 2, MINI.size[0] // 2)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, MINI.size[1], MINI.size[0]) * 2 - 1


def tokens(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, F, N, D), torch.randn(batch, N, D)


def conditioning(svd: SVD, image: torch.Tensor) -> Conditioning:
    return svd.prepare(image, tokens(), MINI.micro, torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_batch_of_two_is_two_batches_of_one(mini_svd):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    one_by_one = torch.cat([mini_svd.vae.encode(pixels[:1]), mini_svd.vae.encode(pixels[1:])])
    assert torch.allclose(one_by_one, mini_svd.vae.encode(pixels))
    latents = torch.randn(2, F, *LATENT)
    one_by_one = torch.cat([mini_svd.decode(latents[:1]), mini_svd.decode(latents[1:])])
    assert torch.allclose(one_by_one, mini_svd.decode(latents), atol=1e-5)


@torch.no_grad()
def test_scaled_latents_are_raw_latents_times_the_scale(mini_svd):
    pixels = torch.rand(1, 2, 3, 64, 64) * 2 - 1
    raw = mini_svd.vae.moments(pixels[0]).chunk(2, dim=1)[0]
    assert torch.allclose(mini_svd.vae.encode(pixels[0]), raw, atol=1e-5)
    assert torch.allclose(mini_svd.encode(pixels)[0], 0.18215 * raw, atol=1e-5)
    decoded = mini_svd.vae.decoder(raw, num_frames=2)
    assert torch.allclose(mini_svd.decode(0.18215 * raw[None])[0], decoded, atol=1e-4)


@torch.no_grad()
def test_the_conditioning_of_an_image(mini_svd, image):
    svd, micro = mini_svd, replace(MINI.micro, cond_aug=0.0)
    cond = svd.prepare(image, svd.tokens_of(image, F), micro, torch.Generator())
    assert torch.equal(cond.concat, svd.vae.encode(image)[:, None].expand(-1, F, -1, -1, -1))  # raw, not scaled
    assert cond.micro.tolist() == [[6, 127, 0]]
    assert torch.equal(cond.spatial, svd.embed(image)[:, None, None].expand(-1, F, -1, -1))
    assert torch.equal(cond.temporal, svd.embed(image)[:, None])


@torch.no_grad()
def test_noise_is_added_to_the_encoded_image_alone(mini_svd, image):
    svd, micro = mini_svd, replace(MINI.micro, cond_aug=0.5)
    clean = svd.tokens_of(image, F)
    noisy = svd.prepare(image, clean, micro, torch.Generator().manual_seed(2))
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(noisy.concat[:, 0], svd.vae.encode(image + 0.5 * noise))
    assert torch.equal(noisy.spatial, clean[0]) and noisy.micro[0, 2] == 0.5


def test_the_forms_of_a_conditioning(mini_svd, image):
    cond = conditioning(mini_svd, image)
    alone = cond.without_image()
    assert (alone.concat == 0).all() and torch.equal(alone.spatial, cond.spatial)
    negative = cond.negative()
    assert not any(t.any() for t in (negative.concat, negative.spatial, negative.temporal))
    assert negative.spatial.shape == cond.spatial.shape and torch.equal(negative.micro, cond.micro)
    assert cond.without_tokens().spatial.shape == (1, F, 0, D) and cond.without_tokens().temporal.shape == (1, 0, D)
    both = negative.batched_with(cond)
    assert torch.equal(both.spatial[1:], cond.spatial) and not both.spatial[:1].any()
    assert torch.equal(both.concat[1:], cond.concat) and torch.equal(both.micro, cond.micro.expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("in_turn", [False, True])
def test_the_denoiser_guides_from_the_negative_branch_to_the_positive(mini_svd, monkeypatch, in_turn):
    """Its own estimate is D(negative) + scale * (D(positive) - D(negative)), with the scale of each frame."""
    monkeypatch.setattr(mini_svd, "budget", Budget(in_turn=in_turn))
    x, concat = torch.randn(2, 3, 3, LATENT[0], 4, 6)  # three clips of three frames
    cond = Conditioning(concat, torch.rand(3, 3), torch.randn(3, 3, N, D), torch.randn(3, N, D))
    zeroed = replace(cond, concat=cond.concat * 0, spatial=cond.spatial * 0, temporal=cond.temporal * 0)
    sigma = torch.tensor([0.5, 2.0, 8.0])
    negative, positive = (edm.denoise(mini_svd.network(c), x, sigma) for c in (zeroed, cond))
    estimate = mini_svd.denoiser(cond, (0.0, 3.0))(x, sigma)
    for frame, scale in enumerate((0.0, 1.5, 3.0)):
        expected = negative[:, frame] + scale * (positive[:, frame] - negative[:, frame])
        assert torch.allclose(estimate[:, frame], expected, atol=1e-4)


@torch.no_grad()
def test_sampling_starts_from_the_noise_at_the_largest_sigma(mini_svd, image, monkeypatch):
    """One Euler step from sigma_max to 0 ends on the first estimate, D(n sqrt(1 + sigma_max^2); sigma_max)."""
    cond, n = conditioning(mini_svd, image), torch.randn(1, F, *LATENT)
    (x,) = mini_svd.sample(cond, n, 1, (1.0, 3.0))
    D_1 = mini_svd.denoiser(cond, (1.0, 3.0))(n * (1 + 700**2) ** 0.5, torch.tensor([700.0]))
    assert torch.allclose(x, D_1, rtol=1e-3, atol=1e-3 * D_1.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("in_turn, batches", [(False, [2]), (True, [1, 1])], ids=str)
def test_tokens_are_projected_once_per_sample(mini_svd, image, monkeypatch, in_turn, batches):
    """And the two branches are evaluated as one batch or in turn, in every step."""
    monkeypatch.setattr(mini_svd, "budget", Budget(in_turn=in_turn))
    projected, evaluated = [], []
    project, forward = mini_svd.unet.project_tokens, mini_svd.unet.forward
    monkeypatch.setattr(mini_svd.unet, "project_tokens", lambda *args: projected.append(len(args[0])) or project(*args))
    monkeypatch.setattr(mini_svd.unet, "forward", lambda *args: evaluated.append(len(args[0])) or forward(*args))
    cond, n = conditioning(mini_svd, image), torch.randn(1, F, *LATENT)
    list(mini_svd.sample(cond, n, 3, (1.0, 3.0)))
    assert (projected, evaluated) == (batches, 3 * batches)
    mini_svd.denoiser(cond, (1.0, 3.0))(n, torch.ones(1))
    assert (projected, evaluated) == (2 * batches, 4 * batches)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_sample_that_is_not_finite_names_its_step(mini_svd, image, monkeypatch, steps):
    n = torch.full((1, F, *LATENT), torch.inf)
    with pytest.raises(FloatingPointError, match=rf"step 1 of {steps} \(sigma 700\) gave"):
        list(mini_svd.sample(conditioning(mini_svd, image), n, steps, (1.0, 3.0)))


@torch.no_grad()
def test_a_fault_in_the_last_step_is_found(mini_svd, image):
    def solver(D, n, sigmas):
        yield n
        yield n * torch.nan

    with pytest.raises(FloatingPointError, match="step 2 of 2"):
        list(mini_svd.sample(conditioning(mini_svd, image), torch.randn(1, F, *LATENT), 2, (1.0, 3.0), solver))


def build() -> SVD:
    with torch.device("meta"):
        svd = SVD(MINI)
    return fill_by_name(svd, MINI, "")


def uses(svd: SVD, image: torch.Tensor) -> dict[str, list[Callable[[], object]]]:
    """The calls that compute with each network."""
    cond = Conditioning(torch.zeros(1, F, *LATENT), torch.zeros(1, 3), *tokens())
    return {
        "vae": [
            lambda: svd.encode(image[None]),
            lambda: svd.decode(torch.zeros(1, F, *LATENT)),
            lambda: svd.prepare(image, tokens(), MINI.micro, torch.Generator()),
        ],
        "image_encoder": [lambda: svd.embed(image)],
        "unet": [lambda: svd.network(cond)],
    }


@torch.no_grad()
def test_networks_of_another_precision_take_and_give_fp32(image):
    svd = build().double()
    assert svd.dtype == torch.float64
    cond, n = conditioning(svd, image), torch.randn(1, F, *LATENT)
    (x,) = svd.sample(cond, n, 1, (1.0, 3.0))
    for out in (svd.embed(image), svd.encode(image[None]), svd.decode(n), cond.concat, cond.micro, x):
        assert out.dtype == torch.float32


@torch.no_grad()
def test_a_released_network_is_named_when_it_is_used(image):
    svd = build()
    for name in ("vae", "image_encoder", "unet"):
        svd.release(name)
    for name, calls in uses(svd, image).items():
        for call in calls:
            with pytest.raises(RuntimeError, match=f"{name} was released"):
                call()
        for use in (lambda network: network(image), lambda network: network.weight):
            with pytest.raises(RuntimeError, match=f"{name} was released"):
                use(getattr(svd, name))
    assert not list(svd.parameters())


class Recorded(torch.nn.Linear):
    """A layer that records where it is moved to, in place of a second device."""

    def __init__(self):
        super().__init__(1, 1)
        self.moves = []

    def to(self, device):
        self.moves.append(str(device))
        return self


def test_a_parked_network_is_fetched_when_it_is_used(image):
    svd = build()
    for name, calls in uses(svd, image).items():
        for call in calls:
            network = Recorded()
            setattr(svd, name, network)
            svd.device = None
            svd.park(name)
            assert network.moves == []  # no device of its own: nothing to move
            svd.device = torch.device("meta")
            svd.park(name)
            assert network.moves == ["cpu"]
            with pytest.raises((AttributeError, RuntimeError)):  # the stand-in computes nothing of use
                call()
            assert network.moves == ["cpu", "meta"]


def test_a_network_that_is_where_it_computes_is_not_moved(image):
    svd = build()
    svd.vae, svd.device = Recorded(), torch.device("cpu")
    with pytest.raises(AttributeError):
        svd.encode(image[None])
    assert svd.vae.moves == []


def test_a_budget_stays_after_an_exception_and_no_longer():
    """The advice after "out of memory" names the mode that comes after it."""
    with torch.device("meta"):
        svd = SVD(MINI)
    before, other = svd.budget, Budget(memory="fast")
    with svd.using(other):
        assert svd.budget is other
    assert svd.budget is before
    with pytest.raises(MemoryError), svd.using(other):
        raise MemoryError
    assert svd.budget is other
