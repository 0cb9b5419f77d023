"""Properties of the networks and of motion-textual inversion that need no reference implementation."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official import SMALL, fill_by_name

import minimti.invert
from minimti import edm, motion
from minimti.augment import augment
from minimti.invert import invert, view
from minimti.io.files import InputError
from minimti.motion import Motion
from minimti.networks.layers import Blend
from minimti.svd import SVD

F, N, D = SMALL.num_frames, 5, SMALL.unet.context_dim
LATENT = (SMALL.unet.out_channels, SMALL.size[1] // 8, SMALL.size[0] // 8)


@pytest.fixture(scope="module")
def svd() -> SVD:
    with torch.device("meta"):
        svd = SVD(SMALL)
    return fill_by_name(svd, SMALL, "")


@pytest.fixture
def learned() -> Motion:
    tokens = torch.randn(F + 1, N, D)
    return Motion(tokens, SMALL.name, SMALL.micro, SMALL.size, steps=0, seed=0)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(F, 3, SMALL.size[1], SMALL.size[0]) * 2 - 1


def unet_inputs(batch: int) -> dict[str, torch.Tensor]:
    return dict(
        x=torch.randn(batch, F, SMALL.unet.in_channels, 8, 16),
        c_noise=torch.randn(batch),
        micro=torch.tensor([[6.0, 127.0, 0.02], [10.0, 30.0, 0.1]])[:batch],
        spatial=torch.randn(batch, F, N, D),
        temporal=torch.randn(batch, N, D),
    )


def evaluate(svd, x, c_noise, micro, spatial, temporal) -> torch.Tensor:
    return svd.unet(x, c_noise, micro, svd.unet.absorb(spatial, temporal))


# ------------------------------------------------------------------------------------------------------- the networks


@torch.no_grad()
def test_batch_of_two_is_two_batches_of_one(svd):
    inputs = unet_inputs(2)
    both = evaluate(svd, **inputs)
    for i in range(2):
        assert torch.allclose(evaluate(svd, **{k: v[i : i + 1] for k, v in inputs.items()})[0], both[i], atol=1e-5)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(torch.cat([svd.vae.encode(pixels[:1]), svd.vae.encode(pixels[1:])]), svd.vae.encode(pixels))
    latents = torch.randn(2, F, *LATENT)
    both = svd.decode(latents)
    assert torch.allclose(torch.cat([svd.decode(latents[:1]), svd.decode(latents[1:])]), both, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("weighs_temporal", [False, True])
def test_blend_extremes_are_the_single_branch(weighs_temporal):
    spatial, temporal = torch.randn(2, 3, 4)
    blend = Blend(weighs_temporal)
    for factor, first in ((-100.0, False), (100.0, True)):
        blend.mix_factor.fill_(factor)
        branch = temporal if first == weighs_temporal else spatial
        assert torch.equal(blend(spatial, temporal), branch)


@torch.no_grad()
def test_frames_are_independent_where_every_blend_is_spatial(svd):
    """A token set reaches other frames through the layers over time alone; without them, only its own frame."""
    mixers = [module for module in svd.unet.modules() if isinstance(module, Blend)]
    kept = [mixer.mix_factor.clone() for mixer in mixers]
    inputs = unet_inputs(1)
    changed = inputs | {"spatial": inputs["spatial"].clone()}
    changed["spatial"][:, 2] += 1
    with_time = (evaluate(svd, **changed) - evaluate(svd, **inputs)).abs().amax(dim=(0, 2, 3, 4))
    for mixer in mixers:
        mixer.mix_factor.fill_(100.0)
    alone = (evaluate(svd, **changed) - evaluate(svd, **inputs)).abs().amax(dim=(0, 2, 3, 4))
    for mixer, factor in zip(mixers, kept):
        mixer.mix_factor.copy_(factor)
    assert (with_time > 1e-6).all()
    assert alone[2] > 1e-3 and (alone[[0, 1, 3]] == 0).all()


@torch.no_grad()
def test_temporal_tokens_act_through_time_alone(svd):
    inputs = unet_inputs(1)
    moved = evaluate(svd, **inputs | {"temporal": inputs["temporal"] + 1}) - evaluate(svd, **inputs)
    assert (moved.abs().amax(dim=(0, 2, 3, 4)) > 1e-4).all()


@torch.no_grad()
def test_equal_tokens_are_one_token(svd):
    """N copies of a token share the attention that one would have: plain image-to-video is N = 1 broadcast."""
    inputs = unet_inputs(1)
    one = inputs | {"spatial": inputs["spatial"][:, :, :1], "temporal": inputs["temporal"][:, :1]}
    five = one | {"spatial": one["spatial"].expand(-1, -1, 5, -1), "temporal": one["temporal"].expand(-1, 5, -1)}
    assert torch.allclose(evaluate(svd, **one), evaluate(svd, **five), atol=1e-5)


def test_misfits_are_named(svd):
    inputs = unet_inputs(1)
    with pytest.raises(ValueError, match="3 sets of spatial tokens do not fit 1 clips of 4 frames"):
        evaluate(svd, **inputs | {"spatial": inputs["spatial"][:, :3]})
    with pytest.raises(ValueError, match="16x9 cannot be halved 3 times"):
        evaluate(svd, **inputs | {"x": torch.randn(1, F, 8, 9, 16)})


# ----------------------------------------------------------------------------------------------------- the embedding


def test_initialise():
    """From the mean of all frames, the same for every set; as the paper has it, from each frame's own embedding."""
    embeddings = 10 * torch.randn(14, 16384)  # wide enough to tell the noise of a single set closely
    mean = embeddings.mean(0, keepdim=True)
    for paper, first in (False, mean), (True, torch.cat([embeddings, mean])):
        tokens = motion.initialise(embeddings, 5, torch.Generator().manual_seed(0), paper)
        assert tokens.shape == (15, 5, 16384)
        noise = tokens - first[:, None]
        assert noise.std().item() == pytest.approx(0.1, rel=0.02) and noise.mean().abs() < 1e-3
        assert torch.equal(tokens[0], tokens[1]) is not paper
        assert not torch.equal(tokens[0, 0], tokens[0, 1])  # N equal tokens would stay equal for ever


def test_an_embedding_survives_its_file(learned, tmp_path):
    learned = replace(learned, steps=7, seed=3)
    motion.save(learned, tmp_path / "m.pt")
    back = motion.load(tmp_path / "m.pt")
    assert torch.equal(back.tokens, learned.tokens) and not back.tokens.requires_grad
    assert vars(back) | {"tokens": None} == vars(learned) | {"tokens": None}
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize("change", [{"name": "other"}, {"unet": replace(SMALL.unet, context_dim=64)}])
def test_an_embedding_fits_its_own_model_only(learned, change):
    learned.check_fits(SMALL)
    with pytest.raises(InputError, match="the embedding is for model 'small'"):
        learned.check_fits(replace(SMALL, **change))


# ----------------------------------------------------------------------------------------------------- augmentation


@given(seed=st.integers(0, 1000), flip=st.booleans())
def test_augmentation_is_the_same_for_every_frame(seed, flip):
    """Frames that are equal stay equal, whatever the other frames of the clip show."""
    image, other = torch.rand(2, 3, 32, 48) * 2 - 1
    out = augment(torch.stack([image, other, image]), torch.Generator().manual_seed(seed), flip)
    assert out.shape == (3, 3, 32, 48) and out.abs().max() <= 1
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    assert torch.equal(augment(image[None], torch.Generator().manual_seed(seed), flip)[0], out[0])


def test_augmentation_mirrors_only_where_it_may():
    ramp = torch.linspace(-0.5, 0.5, 48).expand(1, 3, 32, 48)  # brighter to the right

    def mirrored(flip):
        outs = [augment(ramp, torch.Generator().manual_seed(seed), flip) for seed in range(40)]
        return sum((out[..., -1].mean() < out[..., 0].mean()).item() for out in outs)

    assert mirrored(flip=False) == 0
    assert 10 <= mirrored(flip=True) <= 30


# --------------------------------------------------------------------------------------------------------- inversion


def inversion(svd, clip, learned, flip=True, **settings) -> list[float]:
    views = partial(view, svd, clip, learned, flip)
    return list(invert(svd, views, learned, **{"steps": 1, "lr": 1e-2, "p_mean": 0.0, "p_std": 1.0} | settings))


def test_gradients_reach_every_token_and_no_weight(svd, learned, clip):
    before = learned.tokens.clone()
    assert len(inversion(svd, clip, learned)) == 1 and learned.steps == 1
    assert (learned.tokens.grad.abs().amax(dim=-1) > 0).all()
    assert ((learned.tokens - before).abs().amax(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in svd.parameters())


def test_the_papers_recipe(svd, learned, clip, monkeypatch):
    """Adam, whose first step is the rate and whose rate does not fall, on independent sigmas."""
    before = learned.tokens.clone()
    inversion(svd, clip, learned, paper=True)
    assert (learned.tokens - before).abs().median().item() == pytest.approx(1e-2, rel=1e-3)
    travelled, sigmas = course(svd, learned, clip, monkeypatch, paper=True)
    assert travelled[-1] == pytest.approx(travelled[0], rel=1e-3)
    assert largest_gap(sigmas) > 2 / len(sigmas)


def test_our_recipe(svd, learned, clip, monkeypatch):
    """Muon at a rate that falls along half a cosine, on evenly spread sigmas."""
    travelled, sigmas = course(svd, learned, clip, monkeypatch)
    for step in (16, 32, 63):
        expected = (1 + math.cos(math.pi * step / 64)) / 2
        assert travelled[step] / travelled[0] == pytest.approx(expected, rel=1e-2)
    assert largest_gap(sigmas) < 2 / len(sigmas)


@pytest.mark.parametrize("paper", [False, True])
def test_what_one_set_is_taught_the_others_learn(svd, learned, clip, monkeypatch, paper):
    """In our recipe: all go where the sum of their gradients points, and each a little further where its own does."""
    before = learned.tokens.clone()
    monkeypatch.setattr(edm, "loss", lambda *_: learned.tokens[0].sum())
    inversion(svd, clip, learned, paper=paper)
    taught, *others = (learned.tokens.detach() - before).norm(dim=(1, 2))
    assert all(other == 0 if paper else 0 < other < taught for other in others)


def course(svd, learned, clip, monkeypatch, **settings):
    """Of 64 steps along one direction: how far each goes, and its sigma as a share of its distribution."""
    direction = torch.randn(learned.tokens.shape, generator=torch.Generator().manual_seed(0))
    places, sigmas = [], []

    def loss(network, x0, sigma, n):
        places.append(learned.tokens.detach().clone())
        sigmas.append(sigma.item())
        return (learned.tokens * direction).sum()

    monkeypatch.setattr(edm, "loss", loss)
    constant = view(svd, clip, learned, False, 0)
    list(invert(svd, lambda _: constant, learned, steps=64, lr=1.0, p_mean=0.0, p_std=1.0, **settings))
    places.append(learned.tokens.detach())
    travelled = [(after - before).norm().item() for before, after in pairwise(places)]
    return travelled, torch.special.ndtr(torch.tensor(sigmas).log())


def largest_gap(shares):
    ordered = torch.cat([torch.zeros(1), shares.sort().values, torch.ones(1)])
    return ordered.diff().max().item()


def test_a_view_is_of_the_augmented_clip(svd, learned, clip, monkeypatch):
    """Latents and conditioning are of the same augmentation, which is asked to mirror only where it may."""
    changed, asked = clip.flip(-1) / 2, []
    monkeypatch.setattr(minimti.invert, "augment", lambda c, generator, flip: asked.append((c, flip)) or changed)
    learned.micro = replace(learned.micro, cond_aug=0.0)
    for flip in (True, False):
        x0, cond = view(svd, clip, learned, flip, index=3)
        assert torch.equal(x0, svd.encode(changed[None]))
        assert torch.equal(cond.concat[:, 0], svd.vae.encode(changed[:1]))
    assert [flip for _, flip in asked] == [True, False] and asked[0][0] is clip


def test_views_and_steps_draw_apart(svd, learned, clip):
    firsts = [minimti.invert._generator(0, draw).initial_seed() for draw in range(100)]
    assert len({0, *firsts}) == 101  # 0 is the seed of the initial noise


def test_sigma_is_clamped_to_what_the_model_knows(svd, learned, clip, monkeypatch):
    seen = []
    monkeypatch.setattr(edm, "loss", lambda network, x0, sigma, n: seen.append(sigma) or 0 * learned.tokens.sum())
    inversion(svd, clip, learned, p_mean=9.0, p_std=0.0)
    assert seen[0].item() == SMALL.sigma_max


def test_set_f_is_of_frame_f(learned):
    spatial, temporal = learned.sets
    assert spatial.shape == (1, F, N, D) and temporal.shape == (1, N, D)
    assert torch.equal(spatial[0], learned.tokens[:F]) and torch.equal(temporal[0], learned.tokens[F])


def test_inversion_lowers_the_loss(svd, learned, clip):
    """On fixed noise, so that the two losses differ by the tokens alone."""
    generator = torch.Generator().manual_seed(5)
    x0 = svd.encode(clip[None])
    sigma, n = torch.tensor([1.0]), torch.randn(x0.shape, generator=generator)

    @torch.no_grad()
    def loss():
        cond = svd.prepare(clip[:1], learned.sets, learned.micro, torch.Generator().manual_seed(6))
        return edm.loss(svd.network(cond), x0, sigma, n).item()

    before = loss()
    inversion(svd, clip, learned, steps=25, lr=1.0, flip=False, p_std=0.5)
    assert learned.steps == 25
    assert loss() < 0.9 * before


def test_inversion_is_reproducible(svd, learned, clip):
    def run(seed):
        copy = replace(learned, tokens=learned.tokens.clone(), seed=seed)
        return inversion(svd, clip, copy, steps=2), copy.tokens.detach()

    (losses, tokens), (again, same), (other, _) = run(0), run(0), run(1)
    assert losses == again and torch.equal(tokens, same)
    assert losses != other


def test_a_loss_that_is_not_finite_is_named_and_leaves_the_tokens(svd, learned, clip):
    before = learned.tokens.clone()
    with pytest.raises(FloatingPointError, match=r"step 1 \(sigma .*\) is not finite"):
        inversion(svd, clip * float("nan"), learned)
    assert torch.equal(learned.tokens, before)


# -------------------------------------------------------------------------------- conditioning, shared by both programs


def test_training_and_sampling_condition_alike(svd, learned, clip, monkeypatch, tmp_path):
    """What the UNet is told in a training step is what it is told in sampling, for the same image and draws."""
    seen = []
    forward = svd.unet.forward
    monkeypatch.setattr(svd.unet, "forward", lambda *args: seen.append(args) or forward(*args))
    monkeypatch.setattr(minimti.invert, "augment", lambda clip, generator, flip: clip)
    motion.save(learned, tmp_path / "m.pt")

    prepare, states = svd.prepare, []

    def recorded(image, tokens, micro, generator):
        states.append(generator.get_state())
        return prepare(image, tokens, micro, generator)

    monkeypatch.setattr(svd, "prepare", recorded)
    inversion(svd, clip, learned)

    generator = torch.Generator()
    generator.set_state(states[0])
    learned = motion.load(tmp_path / "m.pt")
    with torch.inference_mode():
        cond = prepare(clip[:1], learned.sets, learned.micro, generator)
        list(svd.sample(cond, torch.randn(1, F, *LATENT), 1, (1.0, 3.0)))
    (x, _, micro, contexts), (both, _, both_micro, both_contexts) = seen
    assert torch.equal(x[:, :, 4:], both[1:, :, 4:]) and (both[:1, :, 4:] == 0).all()
    assert torch.equal(both_micro, micro.expand(2, -1))
    for training, sampling in zip(contexts, both_contexts):  # of one clip: the other branch has no tokens
        assert all(torch.equal(*pair) for pair in zip(training, sampling))


@torch.no_grad()
def test_latents_have_their_scale(svd):
    pixels = torch.rand(1, 2, 3, 64, 64) * 2 - 1
    raw = svd.vae.moments(pixels[0]).chunk(2, dim=1)[0]
    assert torch.allclose(svd.vae.encode(pixels[0]), raw, atol=1e-5)
    assert torch.allclose(svd.encode(pixels)[0], 0.18215 * raw, atol=1e-5)
    decoded = svd.vae.decoder(raw, num_frames=2)
    assert torch.allclose(svd.decode(0.18215 * raw[None])[0], decoded, atol=1e-4)


@torch.no_grad()
def test_prepare(svd, clip):
    image = clip[:1]
    micro = replace(SMALL.micro, cond_aug=0.0)
    cond = svd.prepare(image, svd.tokens_of(image, F), micro, torch.Generator())
    assert torch.equal(cond.concat, svd.vae.encode(image)[:, None].expand(-1, F, -1, -1, -1))  # raw, not scaled
    assert torch.equal(svd.encode(clip[None]), svd.vae.encode(clip)[None] * 0.18215)
    assert cond.micro.tolist() == [[6, 127, 0]]
    assert torch.equal(cond.spatial, svd.embed(image)[:, None, None].expand(-1, F, -1, -1))
    assert torch.equal(cond.temporal, svd.embed(image)[:, None])
    noisy = svd.prepare(image, svd.tokens_of(image, F), replace(micro, cond_aug=0.5), torch.Generator().manual_seed(2))
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(noisy.concat[:, 0], svd.vae.encode(image + 0.5 * noise))
    assert torch.equal(noisy.spatial, cond.spatial)  # CLIP sees the clean image
    assert (cond.without_image().concat == 0).all() and torch.equal(cond.without_image().spatial, cond.spatial)


@torch.no_grad()
def test_a_sample_that_is_not_finite_names_its_step(svd, learned, clip):
    cond = svd.prepare(clip[:1], learned.sets, learned.micro, torch.Generator())
    with pytest.raises(FloatingPointError, match=r"step 1 of 2 \(sigma 700\)"):
        list(svd.sample(cond, torch.full((1, F, *LATENT), torch.inf), 2, (1.0, 3.0)))
