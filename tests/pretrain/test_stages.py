"""The losses of the stages: which pictures, labels, latents and conditions go together.

Simple functions take the place of networks, so that the tests can check what a loss passes to them.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official import SMALLER, TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from minimti.muon import is_matrix
from minimti.networks.vae import VAE
from minimti.pretrain import stages
from minimti.pretrain.stages import EncodedClips, PretrainModel
from minimti.world.clips import SCENES, habitual_scene, pixels
from minimti.world.scene import WORDS, Background, Scene, Sprite, render
from minimti.world.shapes import SHAPES

SMALL = SimpleNamespace(z_channels=3, scale_factor=0.5)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def loss_of(name: str, model, clips: dict[str, EncodedClips], rng: np.random.Generator, batch: int) -> torch.Tensor:
    """The loss of a stage on a batch that it draws."""
    (stage,) = (stage for stage in stages.STAGES if stage.name == name)
    return stage.loss(model, *stage.draw(model.config, clips, rng, batch))


def encoded(model, kind: str, rng: np.random.Generator, num_scenes: int) -> EncodedClips:
    return stages.encode_clips(model, stages.draw_clips(model.config, kind, rng, num_scenes))


# Data


def encode_with_pixels(kind: str, num_scenes: int) -> EncodedClips:
    """`encoded` where raw latents and embeddings are the pixels themselves."""
    config = SimpleNamespace(**{**vars(SMALLER), "vae": SMALL})
    config.micro = SimpleNamespace(cond_aug=0.02)
    vae = SimpleNamespace(moments=lambda x: torch.cat([x, torch.zeros_like(x)], dim=1))
    svd = SimpleNamespace(vae=vae, embed=lambda images: images.flatten(1))
    model = SimpleNamespace(device=torch.device("cpu"), svd=svd, config=config)
    return encoded(model, kind, rng(), num_scenes)


@pytest.mark.parametrize("kind", ["captions", "habits"])
def test_encoded_clips_are_a_scene_and_its_mirror_image(kind):
    clips = encode_with_pixels(kind, 3)
    assert clips.latents.shape == (6, 8, 3, 48, 48)
    scene = SCENES[kind](rng(), SMALLER)
    frames = pixels(render(scene))
    assert torch.allclose(clips.latents[0].float(), 0.5 * frames, atol=1e-3)
    for k in (0, 2, 4):
        assert torch.equal(clips.latents[k + 1], clips.latents[k].flip(-1))
        assert (clips.latents[k + 1] - clips.latents[k]).abs().mean() > 0.01
        assert torch.equal(clips.words[k], clips.words[k + 1])
    assert (clips.latents[2] - clips.latents[0]).abs().mean() > 0.01
    assert [WORDS[i] for i in clips.words[0]] == list(scene.program)


def test_image_and_embedding_are_those_of_the_clips_first_frame():
    clips = encode_with_pixels("habits", 3)
    first = 2 * clips.latents[:, 0].float()
    assert torch.allclose(clips.embedding.float(), first.flatten(1), atol=1e-3)
    noise = clips.image.float() - first
    assert noise.std().item() == pytest.approx(0.02, rel=0.05) and abs(noise.mean()) < 1e-3
    assert len({round(n, 6) for n in noise[:, 0, 0, 0].tolist()}) == 6  # other noise for every clip


def test_encoding_works_in_bf16():
    """Most CPUs of developers run these tests in fp32."""
    torch.manual_seed(0)
    model = PretrainModel(SMALLER)
    with torch.autocast("cpu", torch.bfloat16):
        clips = encoded(model, "habits", rng(), 1)
        for name in ("tower", "captions", "images"):
            assert loss_of(name, model, {"captions": clips, "habits": clips}, rng(), 2).isfinite()
    assert {tensor.dtype for tensor in vars(clips).values()} == {torch.float16, torch.int64}


# Autoencoder


def autoencoder(moments, decode) -> SimpleNamespace:
    """A model for `frames_loss` with moments(frames) and decode(z), without a network."""
    same = SimpleNamespace(spatial_res_block=lambda x, _: x)
    decoder = SimpleNamespace(
        conv_in=lambda z: z,
        mid_block=SimpleNamespace(resnets=[same, same], attentions=[lambda x: x]),
        up_blocks=[],
        conv_norm_out=lambda x, silu: x + 100,  # far from 0, SiLU is the identity
        conv_out=lambda x: decode(x - 100),
    )
    vae = SimpleNamespace(moments=moments, decoder=decoder)
    return SimpleNamespace(svd=SimpleNamespace(vae=vae), config=with_pixels_as_latents(SMALLER))


def with_pixels_as_latents(config):
    return replace(config, vae=replace(config.vae, z_channels=3, ch_mult=(1,), scale_factor=0.5))


def moments_of(mean, log_variance: float):
    return lambda frames: torch.cat([mean(frames), torch.full_like(frames, log_variance)], dim=1)


def test_the_loss_of_an_exact_and_equivariant_autoencoder_is_its_divergence():
    model = autoencoder(moments_of(lambda frames: frames, -30.0), lambda z: z)
    loss = loss_of("frames", model, {}, rng(), 8).item()
    assert loss == pytest.approx(1e-4 * (30 - 1 + 0.25) / 2, rel=0.02)  # the squares of the means are about 0.25


def test_the_posterior_is_sampled():
    """Noise of deviation 1 has the errors below in the still half; interpolation reduces them in the other."""
    model = autoencoder(moments_of(lambda frames: frames, 0.0), lambda z: z)
    still = 0.80 + 4 * 1 + 2 * (1.13 + 4 * 2)
    assert 0.5 * still < loss_of("frames", model, {}, rng(), 8).item() < 1.02 * still


def test_an_encoder_that_is_not_equivariant_has_a_larger_loss():
    """Random signs at each position do not change the divergence, and the decoder's output does not depend on them."""
    signs = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(0)).sign()

    def loss(mean) -> float:
        model = autoencoder(moments_of(mean, -30.0), lambda z: torch.full_like(z, -1))
        return loss_of("frames", model, {}, rng(), 8).item()

    extra = loss(lambda frames: frames * signs) - loss(lambda frames: frames)
    assert 0.2 * 1 < extra < 0.2 * 2.2  # at most twice the variance, which interpolation reduces


def test_maps_rotate_scale_and_shift_each_picture_differently():
    maps = stages.random_maps(rng(), 200)
    linear, shift = maps[:, :, :2], maps[:, :, 2]
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    scale = torch.linalg.det(linear).sqrt()
    for values, largest in ((angle, 0.5), (scale.log(), 0.3), (shift[:, 0], 0.2), (shift[:, 1], 0.2)):
        assert 0.9 * largest < values.abs().max() <= largest + 1e-6 and values.abs().mean() > 0.3 * largest


def test_the_decoder_is_trained_on_half_a_clip_with_noise_of_many_levels():
    """The loss of a decoder that returns its input is that of the noise, in space and in time."""
    given = []

    def moments(frames):
        given.append(frames)
        return torch.cat([frames, frames], dim=1)

    def decode(z, num_frames):
        assert z.shape == (2 * num_frames, 3, 64, 64) and num_frames == 7
        given.append(z)
        return z

    vae = SimpleNamespace(moments=moments, decoder=decode)
    model = SimpleNamespace(svd=SimpleNamespace(vae=vae), config=with_pixels_as_latents(TINY))
    levels = []
    for seed in range(30):
        loss = loss_of("clips", model, {}, rng(seed), 2).item()
        frames, z = given[-2:]
        s = (z - frames).std().item()
        levels.append(s)
        # Absolute plus 4 times squared error, also of differences over x, y and time, with deviation sqrt(2) s.
        assert loss == pytest.approx(0.798 * s + 4 * s**2 + 3 * (1.128 * s + 8 * s**2), rel=0.02)
    # 0.3 of scaled latents, which are raw latents times 0.5
    assert 0.9 * 0.6 < max(levels) < 1.02 * 0.6 and min(levels) < 0.1 * 0.6


def test_frames_and_clips_come_from_all_parts_of_a_scene(monkeypatch):
    """Two different frames of each scene for the first stage, half of its frames in a row for the second."""
    scene, given = SCENES["habits"](rng(), TINY), []
    clip = pixels(render(scene))
    monkeypatch.setattr(stages, "captioned_scene", lambda rng, config: scene)

    def moments(frames):
        given.append([int((clip - frame).abs().flatten(1).mean(1).argmin()) for frame in frames])
        return torch.cat([frames, frames], dim=1)

    model = autoencoder(moments, lambda z: z)
    model.config = with_pixels_as_latents(TINY)
    for seed in range(40):
        loss_of("frames", model, {}, rng(seed), 4)
    assert all(a != b and c != d for a, b, c, d, *_ in given)
    assert {frame for frames in given for frame in frames[:4]} == set(range(14))
    given.clear()
    model.svd.vae.decoder = lambda z, _: z
    for seed in range(60):
        loss_of("clips", model, {}, rng(seed), 1)
    assert all(frames == list(range(frames[0], frames[0] + 7)) for frames in given)
    assert {frames[0] for frames in given} == set(range(8))


def test_the_encoder_gets_no_gradient_from_clips():
    torch.manual_seed(0)
    model = PretrainModel(SMALLER)
    loss_of("clips", model, {}, rng(), 1).backward()
    assert all(p.grad is None for p in model.svd.vae.encoder.parameters())
    assert all(p.grad is not None for p in model.svd.vae.decoder.parameters())


# Image encoder


def arrow(**changes) -> Scene:
    """Faces left and 30 degrees up, is left of the middle and below it, and is about to move forward."""
    sprite = dict(shape="arrow", colour=(1.0, 0.5, 0.0), x=16.0, y=48.0, length=0.42 * 64, facing=-1, tilt=np.pi / 6)
    return Scene((64, 64), 14, Background(0), (Sprite(**sprite | changes),), ("forward",) * 7)


def test_facts_are_pose_colour_and_future_path():
    """Speed is 0.055 * 64 pixels per frame; waypoints at frames 4, 9, 13 in units of half the full path."""
    cos, sin = 0.8660254, 0.5
    attitude, place = [-1, cos, sin, -cos, -sin], [-1, 1, 0]
    along_x, along_y = [-cos * 2 * k / 13 for k in (4, 9, 13)], [-sin * 2 * k / 13 for k in (4, 9, 13)]
    expected = [*attitude, 1, 0, -1, *place, *along_x, *along_y, 0, 0, 0]
    assert np.allclose(stages.facts(arrow()), expected)
    right_and_down = stages.facts(arrow(facing=1, tilt=-np.pi / 6))
    assert np.allclose(right_and_down[:5], [1, cos, -sin, cos, -sin])
    assert np.allclose(right_and_down[11:17], [-w for w in (*along_x, *along_y)])
    assert stages.facts(arrow(length=0.42 * 64 * np.e))[10] == pytest.approx(4)
    turning = stages.facts(replace(arrow(), program=("turn",) * 7))
    assert np.allclose(turning[17:], np.radians([4 * 6, 9 * 6, 13 * 6]))  # 6 degrees per frame, nose up


MIRRORED = [0, 3, 4, 8, 11, 12, 13]  # facing, the two facts that it multiplies, x, and displacements in x


def test_the_labels_of_mirrored_pictures_are_mirrored():
    images, shapes, facts = stages.tower_batch(TINY, {}, rng(), 32)
    assert images.shape == (32, 3, 64, 64) and torch.equal(images[16:], images[:16].flip(-1))
    assert torch.equal(shapes[16:], shapes[:16]) and shapes.unique().numel() > 4
    assert torch.allclose(facts[16:, MIRRORED], -facts[:16, MIRRORED], atol=1e-4)
    others = [i for i in range(20) if i not in MIRRORED]
    assert torch.allclose(facts[16:, others], facts[:16, others], atol=1e-4)
    assert facts[:16, MIRRORED].abs().amax(0).min() > 0.2


def test_colour_and_place_agree_with_the_picture():
    """The centroid of the pixels with the label's colour is near the label's place, in both halves."""
    images, _, facts = stages.tower_batch(TINY, {}, rng(), 64)
    colour = facts[:, 5:8, None, None]
    mask = ((images - colour).norm(dim=1) < 0.1).float()  # [64, H, W]
    found = mask.sum((1, 2)) > 20
    assert found.float().mean() > 0.7
    across = torch.arange(64) + 0.5
    x = (mask.sum(1) * across).sum(1) / mask.sum((1, 2)).clamp(1)
    y = (mask.sum(2) * across).sum(1) / mask.sum((1, 2)).clamp(1)
    for measured, label in ((x, facts[:, 8]), (y, facts[:, 9])):
        assert (measured - (label + 2) * 16)[found].abs().quantile(0.9) < 8


def test_a_quarter_of_the_sprites_are_in_an_arbitrary_pose():
    tilts = np.array([stages.tower_scene(rng(seed), TINY).sprites[0].tilt for seed in range(400)])
    beyond = np.abs(tilts) > np.radians(15) + 1e-9
    assert 0.16 < beyond.mean() < 0.30 and np.abs(tilts).max() > 2.5


def test_the_loss_with_perfect_heads_is_that_of_the_embeddings_scale():
    truth = stages.tower_batch(SMALLER, {}, rng(), 8)
    embedding = torch.randn(8, 64)
    embedding = (embedding - embedding.mean(0)) / embedding.std(0)

    def model(shapes, facts, embedding):
        heads = lambda _: torch.cat([30 * F.one_hot(shapes, len(SHAPES)), facts], dim=1)  # noqa: E731
        return SimpleNamespace(svd=SimpleNamespace(image_encoder=lambda _: embedding), heads=heads, config=SMALLER)

    def loss(*parts) -> float:
        return loss_of("tower", model(*parts), {}, rng(), 8).item()

    _, shapes, facts = truth
    assert loss(shapes, facts, embedding) == pytest.approx(0, abs=1e-5)
    assert loss(shapes, facts, 3 * embedding + 1) == pytest.approx(0.1 * (1 + 4), rel=1e-3)
    assert loss(shapes, facts + 0.5, embedding) == pytest.approx(4 * 0.25, rel=1e-3)
    assert loss(shapes.roll(1), facts, embedding) > 1
    assert loss(shapes, facts.roll(4, 0), embedding) > 0.5


# Diffusion


class Recorder:
    """A model for the diffusion losses whose network returns zeros and records its inputs."""

    def __init__(self):
        self.config = SMALLER
        self.svd = SimpleNamespace(network=self.network)
        self.conds, self.inputs = [], []

    def network(self, cond):
        def F_theta(x, c_noise):
            self.conds.append(cond)
            self.inputs.append((x, c_noise))
            return torch.zeros_like(x)

        return F_theta

    def words(self, ids):
        """[B, 7, 1]: the first index of a caption, everywhere."""
        return ids[:, :1, None].expand(-1, 7, -1).float()


def numbered(count: int, start: int = 1) -> EncodedClips:
    """Clips whose tensors are filled with the clip's number; latents with a million times that."""
    number = torch.arange(start, start + count).float()
    return EncodedClips(
        latents=1e6 * number.view(-1, 1, 1, 1, 1).expand(-1, 4, 2, 3, 3),
        image=number.view(-1, 1, 1, 1).expand(-1, 2, 3, 3),
        embedding=number.view(-1, 1),
        words=number.long().view(-1, 1).expand(-1, 7),
    )


def denoised(batch: int = 4000, seed: int = 0):
    """The conditioning, x and sigma of a batch of numbered clips, and their numbers."""
    model, pick = Recorder(), rng(9).integers(50, size=batch)
    clips = numbered(50)
    tokens = clips.embedding[pick, None]
    stages.denoising_loss(model, *stages.denoising_batch(model.config, clips, pick, tokens, rng(seed)))
    ((x, c_noise),) = model.inputs
    return model.conds[0], x, (4 * c_noise).exp(), torch.from_numpy(pick) + 1


def test_image_tokens_and_both_are_dropped_at_random():
    cond, _, _, number = denoised()
    no_image = (cond.concat == 0).flatten(1).all(1)
    no_tokens = (cond.spatial == 0).flatten(1).all(1)
    assert torch.equal(no_tokens, (cond.temporal == 0).flatten(1).all(1))
    # 0.05 lack both; of the others 0.1 lack the image, and 0.1 the tokens.
    assert no_image.float().mean().item() == pytest.approx(0.145, abs=0.02)
    assert no_tokens.float().mean().item() == pytest.approx(0.145, abs=0.02)
    assert (no_image & no_tokens).float().mean().item() == pytest.approx(0.05 + 0.95 * 0.01, abs=0.012)


def test_a_clip_is_denoised_given_its_own_image_and_tokens():
    cond, x, sigma, number = denoised()
    for part in (cond.concat, cond.spatial, cond.temporal):
        values = part.flatten(1)
        kept = values.any(1)
        assert torch.equal(values[kept], number[kept, None].expand_as(values[kept]).float())
    clean = x.flatten(1).mean(1) * (sigma**2 + 1).sqrt() / 1e6  # the noise is far below a million
    assert torch.equal(clean.round().long(), number)
    assert cond.concat.shape == (4000, 4, 2, 3, 3) and cond.spatial.shape == (4000, 4, 1, 1)
    micro = SMALLER.micro
    assert torch.allclose(cond.micro, torch.tensor([micro.fps_id, micro.motion_bucket_id, micro.cond_aug]))


def test_noise_levels_of_a_batch_are_stratified():
    levels = torch.cat([denoised(4, seed)[2].log()[None] for seed in range(200)])  # [200, 4]
    assert levels.mean().item() == pytest.approx(1.5, abs=0.15) and levels.std().item() == pytest.approx(1.7, abs=0.15)
    ordered = (levels.sort(dim=1)[0] - 1.5) / 1.7
    quartiles = torch.tensor([-0.674, 0.0, 0.674])  # those of a standard normal
    for i, bound in enumerate(quartiles):
        assert ordered[:, i].max() <= bound + 0.02 and ordered[:, i + 1].min() >= bound - 0.02
    assert levels[:, 0].std() > 0.5  # and not always the same


def test_the_noise_differs_from_clip_to_clip():
    model, clips = Recorder(), numbered(1, start=0)
    drawn = stages.denoising_batch(model.config, clips, np.zeros(3, int), torch.zeros(3, 1, 1), rng())
    stages.denoising_loss(model, *drawn)
    ((x, c_noise),) = model.inputs
    sigma = (4 * c_noise).exp().view(-1, 1, 1, 1, 1)
    n = x * (sigma**2 + 1).sqrt() / sigma
    assert n.std().item() == pytest.approx(1, abs=0.1)
    assert min((n[0] - n[1]).abs().mean(), (n[1] - n[2]).abs().mean()) > 0.5


def test_captions_go_with_their_own_clips():
    model = Recorder()
    loss_of("captions", model, {"captions": numbered(11)}, rng(), 200)
    (cond,), ((x, c_noise),) = model.conds, model.inputs
    number = (x.flatten(1).mean(1) * ((8 * c_noise).exp() + 1).sqrt() / 1e6).round()
    kept = cond.temporal.flatten(1).any(1)
    assert cond.temporal.shape == (200, 7, 1) and kept.float().mean() > 0.7
    assert torch.equal(cond.temporal[kept], number[kept, None, None].expand(-1, 7, 1))
    assert number.unique().numel() == 11


def test_half_of_the_steps_train_images_and_half_captions():
    model = Recorder()
    encoded = {"captions": numbered(11), "habits": numbered(10, start=21)}
    for seed in range(200):
        loss_of("images", model, encoded, rng(seed), 2)
    with_image = [cond.temporal.shape[1] == 1 for cond in model.conds]
    assert 0.4 < np.mean(with_image) < 0.6
    for cond, (x, c_noise), alone in zip(model.conds, model.inputs, with_image):
        number = (x.flatten(1).mean(1) * ((8 * c_noise).exp() + 1).sqrt() / 1e6).round()
        assert torch.all(number > 20 if alone else number < 12)
        kept = cond.temporal.flatten(1).any(1)
        assert torch.equal(cond.temporal[kept, 0, 0], number[kept])


# Layers


def test_muon_gets_nearly_all_weights_of_the_transformers_and_convolutions():
    model = PretrainModel(TINY)
    kinds = {name: is_matrix(name, p) for name, p in model.named_parameters()}
    transformer = "svd.unet.mid_block.attentions.0.transformer_blocks.0"
    assert kinds[f"{transformer}.attn1.to_q.weight"]
    assert kinds["svd.unet.mid_block.resnets.0.spatial_res_block.conv1.weight"]
    for other in (f"{transformer}.norm1.weight", "svd.unet.conv_out.weight", "words.word.weight", "words.slot.weight"):
        assert not kinds[other]
    for part in ("svd.unet", "svd.image_encoder"):
        sizes = {k: p.numel() for k, p in model.named_parameters() if k.startswith(part)}
        assert sum(n for k, n in sizes.items() if kinds[k]) > 0.95 * sum(sizes.values())


def test_latents_start_as_large_as_pictures_with_little_noise():
    torch.manual_seed(0)
    model, frames = PretrainModel(SMALLER), pixels(render(habitual_scene(rng(), SMALLER)))
    with torch.no_grad():
        mean, log_variance = stages.posterior(model.svd.vae, frames)
    assert 0.3 < mean.square().mean().sqrt() / frames.square().mean().sqrt() < 3
    assert abs(log_variance.mean() + 6) < 1


def test_branches_start_at_zero():
    torch.manual_seed(0)
    unet = PretrainModel(SMALLER).svd.unet
    assert not any(p.any() for p in unet.conv_out.parameters())
    blocks = [module for name, module in unet.named_modules() if name.endswith("proj_out")]
    assert len(blocks) > 3 and not any(p.any() for block in blocks for p in block.parameters())


def test_space_and_time_have_equal_weight_at_first():
    model = PretrainModel(SMALLER)
    weights = [p.sigmoid().item() for name, p in model.named_parameters() if name.endswith("mix_factor")]
    assert len(weights) > 10 and set(weights) == {0.5}


def test_maps_move_latents_as_they_move_pictures():
    """A square in a coarse picture and the same square in a finer one have the same centre after the map."""
    maps = stages.random_maps(rng(), 8)
    coarse = torch.zeros(8, 1, 16, 16)
    coarse[:, :, 6:10, 7:9] = 1
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    moved = stages.mapped(coarse, maps), stages.mapped(fine, maps)
    middles = []
    for pictures in moved:
        y, x = (torch.linspace(-1, 1, 2 * n + 1)[1::2] for n in pictures.shape[2:])
        mass = pictures.sum((1, 2, 3))
        middles.append(torch.stack([(pictures.sum((1, 2)) * x).sum(1), (pictures.sum((1, 3)) * y).sum(1)]) / mass)
    assert torch.allclose(*middles, atol=0.02)
    assert middles[0].std(1).min() > 0.05


def test_normalised_latents_have_unit_variance_and_decode_as_before():
    torch.manual_seed(0)
    vae = VAE(SMALLER.vae)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.05)
    frames = torch.rand(32, 3, 48, 48) * 2 - 1
    with torch.no_grad():
        raw = vae.moments(frames).chunk(2, dim=1)[0]
        before = vae.decoder.conv_in(raw)
        stages.normalise_latents(vae, frames)
        mean, log_variance = vae.moments(frames).chunk(2, dim=1)
        after = vae.decoder.conv_in(mean)
    scaled = mean * vae.config.scale_factor
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(SMALLER.vae.z_channels), atol=1e-3)
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(SMALLER.vae.z_channels), atol=1e-3)
    assert torch.allclose(before[..., 1:-1, 1:-1], after[..., 1:-1, 1:-1], atol=1e-4)


def test_layers_over_time_start_as_identities():
    torch.manual_seed(0)
    svd = PretrainModel(SMALLER).svd
    z = torch.randn(4, SMALLER.vae.z_channels, 6, 6)
    with torch.no_grad():
        assert torch.allclose(svd.vae.decoder(z, 4), stages.decode_frames(svd.vae.decoder, z), atol=1e-5)


@pytest.mark.parametrize("stage", stages.STAGES, ids=lambda stage: stage.name)
def test_every_loss_runs_on_the_device_of_the_model(stage):
    """On fake tensors of a GPU, where an operator on tensors of two devices is an error, as on a real one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.empty(2, 2, device="cuda")[..., 0]
        except RuntimeError:
            pytest.skip("this PyTorch cannot index fake tensors of a GPU that is not there")
        model = stages.PretrainModel(SMALLER)
        for module in model.modules():  # Module.to cannot move parameters to a GPU that is not there
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda")))
        clips = {kind: encoded(model, kind, rng(), 1) for kind in stage.clips}
        assert all(tensor.device.type == "cpu" for made in clips.values() for tensor in vars(made).values())
        for _ in range(3 if stage.name == "images" else 1):  # its steps are of two kinds
            drawn = [tensor.to(model.device) for tensor in stage.draw(model.config, clips, rng(), 2)]
            assert stage.loss(model, *drawn).device.type == "cuda"
