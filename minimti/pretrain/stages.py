"""The five stages of pre-training: what each one sees, and what it is asked for.

Everything random in a step comes from the generator it is given, so a step can be done again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti import edm
from minimti.checkpoint.load import memory_format
from minimti.config import SVDConfig
from minimti.networks import image_encoder
from minimti.networks.attention import SpatioTemporalTransformer
from minimti.networks.layers import Blend, ResBlock, silu
from minimti.networks.vae import VAE, Decoder
from minimti.svd import SVD, Conditioning
from minimti.world.captions import CaptionEmbedding, word_ids
from minimti.world.clips import SCENES, captioned_scene, first_frame, habitual_scene, pixels
from minimti.world.scene import SCALES, SPEED, Scene, flip, render, trajectory
from minimti.world.shapes import SHAPES

KL = 1e-4
EQUIVARIANCE = 0.2
SQUARE = 4.0
ROUGHNESS = 0.3  # the largest deviation of what is added to latents of deviation 1
LOG_VARIANCE = -6.0  # of latents, at first
POSED = 0.25  # share of the image tower's pictures whose sprite stands anywhere, as it may in the middle of a clip

# ln sigma ~ N(P_MEAN, P_STD^2). Inversion draws stronger noise, where motion is decided; here looks are learnt too.
P_MEAN, P_STD = 1.5, 1.7

# Condition dropout, for guidance.
NO_IMAGE, NO_TOKENS, NEITHER = 0.1, 0.1, 0.05

WAYPOINTS = 3  # of the habitual path that the image tower shall foresee
NUM_FACTS = 11 + 3 * WAYPOINTS


class PretrainModel(nn.Module):
    """All that learns: the model, its words, and the heads that question the image tower and are thrown away."""

    def __init__(self, config: SVDConfig):
        super().__init__()
        dim = config.image_encoder.embed_dim
        self.config = config
        self.svd = SVD(config)
        self.words = CaptionEmbedding(dim)
        self.heads = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, len(SHAPES) + NUM_FACTS))
        initialise(self.svd)
        for p in self.svd.parameters():
            p.data = p.data.contiguous(memory_format=memory_format(p))


def initialise(svd: SVD) -> None:
    """Beyond PyTorch's own: branches start silent, as in the official code, and layers over time as identities.

    The autoencoder's layers keep the size of what they are given, and its latents start with little noise: else what
    the decoder sees of a picture at first is drowned by constants and noise, and it stays grey for long.
    """
    for module in svd.vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    nn.init.constant_(svd.vae.quant_conv.bias[svd.config.vae.z_channels :], LOG_VARIANCE)
    for module in svd.modules():
        if isinstance(module, Blend):
            nn.init.zeros_(module.mix_factor)
    silent = [module.conv2 for module in svd.modules() if isinstance(module, ResBlock)]
    silent += [module.proj_out for module in svd.unet.modules() if isinstance(module, SpatioTemporalTransformer)]
    for layer in (*silent, svd.unet.conv_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.dirac_(svd.vae.decoder.time_conv_out.weight)
    nn.init.zeros_(svd.vae.decoder.time_conv_out.bias)


# ---------------------------------------------------------------------------------------------- data


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class Library:
    """Encoded clips of a kind (of SCENES), in fp16 but for the words. The encoder costs as much as a UNet step."""

    latents: Tensor  # [n, F, z, h, w], scaled
    image: Tensor  # [n, z, h, w], raw latent of the first frame with noise as in `SVD.prepare`
    embedding: Tensor  # [n, d], of the first frame
    words: Tensor  # [n, NUM_SLOTS], indices


def encoded(model: PretrainModel, kind: str, rng: np.random.Generator, num_scenes: int) -> Library:
    """Scenes and their mirror images, which have the same captions."""
    # Half precision comes last: under autocast to bf16 a CPU does not even join tensors of fp16.
    svd, config = model.svd, model.config
    parts = []
    for _ in range(num_scenes):
        scene = SCENES[kind](rng, config)
        frames = pixels(render(scene))
        both = torch.stack([frames, frames.flip(-1)])
        image = both[:, 0] + config.micro.cond_aug * gaussian(rng, both[:, 0].shape)
        with torch.no_grad():
            raw = svd.vae.moments(torch.cat([both.flatten(0, 1), image])).chunk(2, dim=1)[0].float()
            embedding = svd.embed(both[:, 0])
        latents = config.vae.scale_factor * raw[:-2].unflatten(0, (2, -1))
        parts.append((latents, raw[-2:], embedding, word_ids([scene.program] * 2)))
    latents, image, embedding, ids = (torch.cat(tensors) for tensors in zip(*parts))
    return Library(latents.half(), image.half(), embedding.half(), ids)


# ---------------------------------------------------------------------------------------------- autoencoder


def decode_frames(decoder: Decoder, z: Tensor) -> Tensor:
    """The decoder without its layers over time: raw latents [batch, z, h, w] -> pixels."""
    mid = decoder.mid_block
    x = mid.resnets[0].spatial_res_block(decoder.conv_in(z), None)
    x = mid.resnets[1].spatial_res_block(mid.attentions[0](x), None)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet.spatial_res_block(x, None)
        for upsample in block.upsamplers:
            x = upsample(x)
    return decoder.conv_out(silu(decoder.conv_norm_out(x)))


def picture_loss(out: Tensor, truth: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of the error, and of that of the differences between neighbours along `dims`: edges shall be sharp.

    The square makes sprites count, which are a few strong pixels on much faint background.
    """
    error = out - truth
    return sum((e.abs() + SQUARE * e.square()).mean() for e in (error, *(error.diff(dim=dim) for dim in dims)))


def random_maps(rng: np.random.Generator, batch: int) -> Tensor:
    """Affine maps [batch, 2, 3] as of `F.affine_grid`: a turn, a scale, a shift by up to a tenth of the side."""
    angle, scale = rng.uniform(-0.5, 0.5, batch), np.exp(rng.uniform(-0.3, 0.3, batch))
    cos, sin, shift = scale * np.cos(angle), scale * np.sin(angle), rng.uniform(-0.2, 0.2, (2, batch))
    return torch.from_numpy(np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]], np.float32)).permute(2, 0, 1)


def mapped(pictures: Tensor, maps: Tensor) -> Tensor:
    """[batch, C, H, W] -> the same shape; what lies outside is what lies inside, mirrored."""
    grid = F.affine_grid(maps, pictures.shape, align_corners=False)
    return F.grid_sample(pictures, grid, "bicubic", padding_mode="reflection", align_corners=False)


def posterior(vae: VAE, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of raw latents, in fp32."""
    mean, log_variance = vae.moments(frames).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def frames_loss(model: PretrainModel, libraries: dict[str, Library], rng: np.random.Generator, batch: int) -> Tensor:
    """Autoencoding single frames, two of each clip.

    Half of the pictures are turned, scaled and shifted, and their latents shall change likewise, for the encoder as for
    the decoder (after EQ-VAE, Kouzelis et al. 2025): else a sprite that moves by half a cell is another code, and to
    move it is hard to learn.
    """
    vae, frames = model.svd.vae, []
    for _ in range(batch // 2):
        scene = captioned_scene(rng, model.config)
        frames.append(render(scene)[rng.choice(scene.num_frames, 2, replace=False)])
    still, moving = pixels(np.concatenate(frames)).chunk(2)
    maps = random_maps(rng, len(moving))
    moved = mapped(moving, maps)
    mean, log_variance = posterior(vae, torch.cat([still, moving, moved]))
    z_still, z_moving, _ = (mean + (log_variance / 2).exp() * gaussian(rng, mean.shape)).chunk(3)
    out = decode_frames(vae.decoder, torch.cat([z_still, mapped(z_moving, maps)])).float()
    _, before, after = mean.chunk(3)
    equivariance_error = (after - mapped(before, maps)).square().mean((0, 2, 3)) / mean.var((0, 2, 3))
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
    fidelity = picture_loss(out, torch.cat([still, moved]), (-1, -2))
    return fidelity + KL * divergence + EQUIVARIANCE * equivariance_error.mean()


def clips_loss(model: PretrainModel, libraries: dict[str, Library], rng: np.random.Generator, batch: int) -> Tensor:
    """The whole decoder on clips of half the length, the encoder as it is.

    What a sampler gives is never exact: more or less noise on the latents makes a decoder that forgives.
    """
    vae, length, clips = model.svd.vae, model.config.num_frames // 2, []
    for _ in range(batch):
        start = int(rng.integers(model.config.num_frames - length + 1))
        clips.append(render(captioned_scene(rng, model.config))[start : start + length])
    frames = pixels(np.stack(clips))
    with torch.no_grad():
        mean, _ = posterior(vae, frames.flatten(0, 1))
    noise = rng.uniform(0, ROUGHNESS) / vae.config.scale_factor
    out = vae.decoder(mean + noise * gaussian(rng, mean.shape), length).float().unflatten(0, (-1, length))
    return picture_loss(out, frames, (-1, -2, 1))


def normalise_latents(vae: VAE, frames: Tensor) -> None:
    """Folds a shift and a scale of each channel into the layers around the latents of frames [batch, 3, H, W].

    After it, scaled latents have mean 0 and deviation 1, and the decoder gives what it gave, but at the border: its
    first convolution pads with zeros, which then are another latent.
    """
    with torch.no_grad():
        raw = torch.cat([vae.moments(part).chunk(2, dim=1)[0].float() for part in frames.split(16)])
        shift, scale = raw.mean((0, 2, 3)), raw.std((0, 2, 3)) * vae.config.scale_factor
        z, last, first = vae.config.z_channels, vae.quant_conv, vae.decoder.conv_in
        last.weight[:z] /= scale.view(-1, 1, 1, 1)
        last.bias[:z] = (last.bias[:z] - shift) / scale
        last.bias[z:] -= 2 * scale.log()
        first.bias += (first.weight.sum((2, 3)) * shift).sum(1)
        first.weight *= scale.view(1, -1, 1, 1)


# ---------------------------------------------------------------------------------------------- image tower


def questioned_scene(rng: np.random.Generator, config: SVDConfig) -> Scene:
    """A sprite about to follow its habit; at times from a place and an attitude that no clip starts with."""
    scene = habitual_scene(rng, config)
    if rng.random() < POSED:
        (width, height), sprite = config.size, scene.sprites[0]
        place = {"x": width * rng.uniform(0.15, 0.85), "y": height * rng.uniform(0.15, 0.85)}
        attitude = {"length": sprite.length * rng.uniform(*SCALES), "tilt": rng.uniform(-np.pi, np.pi)}
        scene = replace(scene, sprites=(replace(sprite, **place, **attitude),))
    return scene


def facts(scene: Scene) -> np.ndarray:
    """[NUM_FACTS], each about as large as 1: attitude, colour, place and size, and where the habit will lead."""
    sprite, path, (height, width) = scene.sprites[0], trajectory(scene)[0], scene.size
    at = np.linspace(0, scene.num_frames - 1, WAYPOINTS + 1).round().astype(int)[1:]
    reach = SPEED * (scene.num_frames - 1) * height / 2
    return np.array(
        [
            *(sprite.facing, np.cos(sprite.tilt), np.sin(sprite.tilt)),
            *(sprite.facing * np.cos(sprite.tilt), sprite.facing * np.sin(sprite.tilt)),
            *(2 * c - 1 for c in sprite.colour),
            *(4 * sprite.x / width - 2, 4 * sprite.y / height - 2, 4 * np.log(sprite.length / (0.42 * height))),
            *((path.x[at] - path.x[0]) / reach),
            *((path.y[at] - path.y[0]) / reach),
            *(path.angle[at] - path.angle[0]),
        ]
    )


def tower_loss(model: PretrainModel, libraries: dict[str, Library], rng: np.random.Generator, batch: int) -> Tensor:
    """What is there, how it stands and where it will go; and an embedding of elements as large as those of words.

    Half the pictures are the others mirrored: what differs between them is the way things face.
    """
    scenes = [questioned_scene(rng, model.config) for _ in range(batch // 2)]
    images = pixels(np.stack([first_frame(scene) for scene in scenes]))
    images, scenes = torch.cat([images, images.flip(-1)]), scenes + [flip(scene) for scene in scenes]
    shapes = torch.tensor([SHAPES.index(scene.sprites[0].shape) for scene in scenes])
    wanted = torch.from_numpy(np.stack([facts(scene) for scene in scenes])).float()
    embedding = model.svd.image_encoder(image_encoder.preprocess(images, model.config.image_encoder.image_size)).float()
    logits, found = model.heads(embedding).float().split([len(SHAPES), NUM_FACTS], dim=1)
    unit = embedding.mean(0).square().mean() + (embedding.std(0) - 1).square().mean()
    return F.cross_entropy(logits, shapes) + 4 * F.mse_loss(found, wanted) + 0.1 * unit


# ---------------------------------------------------------------------------------------------- diffusion


def denoising_loss(
    model: PretrainModel, library: Library, pick: np.ndarray, tokens: Tensor, rng: np.random.Generator
) -> Tensor:
    """Equation 3 on the clips `pick` of a library under tokens [B, N, d], the same for every frame and over time."""
    config, latents = model.config, library.latents[pick].float()
    batch, num_frames = latents.shape[:2]
    neither = rng.random(batch) < NEITHER
    with_image = torch.from_numpy((rng.random(batch) >= NO_IMAGE) & ~neither)
    with_tokens = torch.from_numpy((rng.random(batch) >= NO_TOKENS) & ~neither)
    tokens = tokens.float() * with_tokens[:, None, None]
    image = library.image[pick].float() * with_image[:, None, None, None]
    micro = torch.tensor([config.micro.fps_id, config.micro.motion_bucket_id, config.micro.cond_aug])
    cond = Conditioning(
        concat=image[:, None].expand(-1, num_frames, -1, -1, -1),
        micro=micro.expand(batch, -1),
        spatial=tokens[:, None].expand(-1, num_frames, -1, -1),
        temporal=tokens,
    )
    quantiles = torch.from_numpy((rng.random() + np.arange(batch) / batch) % 1)
    sigma = edm.training_sigma(quantiles, P_MEAN, P_STD, config.sigma_max)
    return edm.loss(model.svd.network(cond), latents, sigma, gaussian(rng, latents.shape))


def captions_loss(model: PretrainModel, libraries: dict[str, Library], rng: np.random.Generator, batch: int) -> Tensor:
    """Text to video, and text and image to video."""
    library = libraries["captions"]
    pick = rng.integers(len(library.words), size=batch)
    return denoising_loss(model, library, pick, model.words(library.words[pick]), rng)


def images_loss(model: PretrainModel, libraries: dict[str, Library], rng: np.random.Generator, batch: int) -> Tensor:
    """Half the batches: image to video, the image's embedding the only token. The other half: as before."""
    if rng.random() < 0.5:
        return captions_loss(model, libraries, rng, batch)
    library = libraries["habits"]
    pick = rng.integers(len(library.words), size=batch)
    return denoising_loss(model, library, pick, library.embedding[pick, None], rng)


# ---------------------------------------------------------------------------------------------- the course

Loss = Callable[[PretrainModel, dict[str, Library], np.random.Generator, int], Tensor]


@dataclass(frozen=True)
class Stage:
    name: str
    teaches: str
    loss: Loss
    steps: int
    batch: int
    learns: tuple[str, ...]  # modules of PretrainModel
    needs: tuple[str, ...] = ()  # libraries
    settles: bool = True  # its learning rate falls; not where the next stage goes on with the same modules


STAGES = (
    Stage("frames", "autoencoder, on frames", frames_loss, 4000, 8, ("svd.vae",)),
    Stage("clips", "its decoder, on clips", clips_loss, 350, 2, ("svd.vae.decoder",)),
    Stage("tower", "image tower", tower_loss, 3400, 48, ("svd.image_encoder", "heads")),
    Stage("captions", "text to video", captions_loss, 5400, 4, ("svd.unet", "words"), ("captions",), False),
    Stage("images", "image to video", images_loss, 3200, 4, ("svd.unet", "words"), ("captions", "habits")),
)
CHUNK = 16  # scenes encoded at once; each gives two clips
CHUNKS = {"captions": 250, "habits": 80}
