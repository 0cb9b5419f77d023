"""The five stages of pre-training: their data, their losses, and the modules that they train.

A stage draws the tensors of a step on the CPU, all random numbers among them, and its loss computes with them alone. So
a step can be repeated exactly, and recorded as a CUDA graph.
"""

from collections.abc import Callable, Mapping
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
from minimti.networks.layers import Blend, ResBlock
from minimti.networks.vae import VAE, Decoder
from minimti.svd import SVD, Conditioning
from minimti.world.captions import CaptionEmbedding, word_ids
from minimti.world.clips import SCENES, captioned_scene, first_frame, habitual_scene, pixels
from minimti.world.scene import SCALES, SPEED, Scene, flip, render, trajectory
from minimti.world.shapes import SHAPES

Batch = tuple[Tensor, ...]  # what a stage draws for a step

# Autoencoder.
KL_WEIGHT = 1e-4
EQUIVARIANCE_WEIGHT = 0.2
SQUARED_WEIGHT = 4.0  # weight of the squared error relative to the absolute error
MAX_LATENT_NOISE = 0.3  # largest deviation of the noise added to scaled latents, which have deviation 1
INITIAL_LOG_VARIANCE = -6.0

# Image encoder.
POSED_SHARE = 0.25  # pictures whose sprite has a pose as in the middle of a clip
WAYPOINTS = 3  # points of the habitual path that the embedding must predict
NUM_FACTS = 11 + 3 * WAYPOINTS
FACTS_WEIGHT = 4.0
UNIT_WEIGHT = 0.1

# Diffusion. ln sigma ~ N(P_MEAN, P_STD^2): less noise than inversion draws, because appearance is learned here too.
P_MEAN, P_STD = 1.5, 1.7
DROP_IMAGE, DROP_TOKENS, DROP_BOTH = 0.1, 0.1, 0.05  # probabilities of condition dropout, for guidance


class PretrainModel(nn.Module):
    """Everything that is trained: the SVD, the caption embedding, and the image encoder's heads, which are not kept."""

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

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.words.word.weight.device


def initialise(svd: SVD) -> None:
    """Initialise what PyTorch's defaults do not suit.

    Residual branches start at zero, as in the official code, and the autoencoder's layers over time as identities. The
    autoencoder's other layers preserve the variance of their input, and its posterior starts with little noise:
    otherwise the latents carry little of the picture at first, and the decoder's output stays grey for long.
    """
    for module in svd.vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    _, posterior_bias = svd.vae.quant_conv.parameters()
    nn.init.constant_(posterior_bias[svd.config.vae.z_channels :], INITIAL_LOG_VARIANCE)
    for module in svd.modules():
        if isinstance(module, Blend):
            nn.init.zeros_(module.mix_factor)
    last_layers: list[nn.Module] = [svd.unet.conv_out]
    last_layers += [module.conv2 for module in svd.modules() if isinstance(module, ResBlock)]
    last_layers += [module.proj_out for module in svd.unet.modules() if isinstance(module, SpatioTemporalTransformer)]
    for layer in last_layers:
        for p in layer.parameters():
            nn.init.zeros_(p)
    time_weight, time_bias = svd.vae.decoder.time_conv_out.parameters()
    nn.init.dirac_(time_weight)
    nn.init.zeros_(time_bias)


# ---------------------------------------------------------------------------------------------- data


def gaussian(rng: np.random.Generator, *shape: int) -> Tensor:
    """Unit normal noise in fp32."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def latent_shape(config: SVDConfig) -> tuple[int, int, int]:
    """Channels, height and width of a frame's latent."""
    width, height = config.size
    return config.vae.z_channels, height // config.vae.cell, width // config.vae.cell


@dataclass(frozen=True)
class EncodedClips:
    """Clips of one of SCENES' kinds, encoded ahead because the encoder costs as much as a UNet step.

    Floats are in fp16, and all of it is on the CPU.
    """

    latents: Tensor  # [n, F, z, h, w], scaled
    image: Tensor  # [n, z, h, w], raw latent of the noisy first frame (see `SVD.prepare`)
    embedding: Tensor  # [n, d], of the first frame
    words: Tensor  # int64 [n, NUM_SLOTS], the caption


@dataclass(frozen=True)
class DrawnClips:
    """Clips before they are encoded: each is followed by its mirror image, which has the same caption."""

    frames: np.ndarray  # uint8 [n, F, 3, H, W]
    noise: np.ndarray  # fp32 [n, 3, H, W], unit normal, for the first frame
    words: Tensor  # int64 [n, NUM_SLOTS]


def draw_clips(config: SVDConfig, kind: str, rng: np.random.Generator, num_scenes: int) -> DrawnClips:
    """Draw scenes of a kind and render them: 2 * num_scenes clips."""
    scenes = [SCENES[kind](rng, config) for _ in range(num_scenes)]
    rendered = [render(scene) for scene in scenes]
    frames = np.stack([clip for own in rendered for clip in (own, own[..., ::-1])])
    noise = rng.standard_normal(frames[:, 0].shape, dtype=np.float32)
    words = word_ids([scene.program for scene in scenes for _ in range(2)])
    return DrawnClips(frames, noise, words)


@torch.no_grad()
def encode_clips(model: PretrainModel, drawn: DrawnClips) -> EncodedClips:
    """Encode clips on the model's device."""
    svd, config, parts = model.svd, model.config, []
    at_once = 2 if model.device.type == "cpu" else 64  # on a CPU, activations should fit its caches
    for start in range(0, len(drawn.frames), at_once):
        part = slice(start, start + at_once)
        clips = pixels(drawn.frames[part]).to(model.device)  # [n, F, 3, H, W]
        image = clips[:, 0] + config.micro.cond_aug * torch.from_numpy(drawn.noise[part]).to(model.device)
        pictures = torch.cat([clips.flatten(0, 1), image])  # [n F + n, 3, H, W]
        raw = svd.vae.moments(pictures).chunk(2, dim=1)[0].float()
        latents = config.vae.scale_factor * raw[: -len(clips)].unflatten(0, (len(clips), -1))  # [n, F, z, h, w]
        parts.append((latents, raw[-len(clips) :], svd.embed(clips[:, 0])))
    # Converted last: torch.cat fails on fp16 tensors under the CPU's autocast to bf16.
    latents, image, embedding = (torch.cat(tensors).half().cpu() for tensors in zip(*parts))
    return EncodedClips(latents, image, embedding, drawn.words)


# ---------------------------------------------------------------------------------------------- autoencoder


def decode_frames(decoder: Decoder, z: Tensor) -> Tensor:
    """The decoder without its layers over time: raw latents [batch, z, h, w] -> pixels [batch, 3, H, W]."""
    mid = decoder.mid_block
    x = mid.resnets[0].spatial_res_block(decoder.conv_in(z), None)
    x = mid.resnets[1].spatial_res_block(mid.attentions[0](x), None)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet.spatial_res_block(x, None)
        for upsample in block.upsamplers:
            x = upsample(x)
    return decoder.conv_out(decoder.conv_norm_out(x, silu=True))


def picture_loss(out: Tensor, truth: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Absolute plus squared error of the pixels, and of the differences between neighbours along `dims`; a scalar.

    The differences make edges sharp. The squares give weight to sprites: few pixels with large errors on a background
    of many pixels with small ones.
    """
    error = out - truth
    terms = (error, *(error.diff(dim=dim) for dim in dims))
    return sum(((e.abs() + SQUARED_WEIGHT * e.square()).mean() for e in terms), error.new_zeros(()))


def random_maps(rng: np.random.Generator, batch: int) -> Tensor:
    """Affine maps [batch, 2, 3] for `F.affine_grid`: rotation by up to 0.5, scale by up to e^0.3, a shift.

    The shift is up to a tenth of the picture's side.
    """
    angle, scale = rng.uniform(-0.5, 0.5, batch), np.exp(rng.uniform(-0.3, 0.3, batch))
    cos, sin, shift = scale * np.cos(angle), scale * np.sin(angle), rng.uniform(-0.2, 0.2, (2, batch))
    rows = np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]], np.float32)  # [2, 3, batch]
    return torch.from_numpy(rows).permute(2, 0, 1)  # [batch, 2, 3]


def mapped(pictures: Tensor, maps: Tensor) -> Tensor:
    """Pictures or latents [batch, C, H, W] under maps [batch, 2, 3]; same shape, continued outside by reflection."""
    grid = F.affine_grid(maps, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, "bicubic", padding_mode="reflection", align_corners=False)


def posterior(vae: VAE, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Frames [batch, 3, H, W] in [-1,1] -> mean and log-variance of raw latents [batch, z, h, w], in fp32."""
    mean, log_variance = vae.moments(frames).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def frames_batch(config: SVDConfig, encoded: Mapping[str, EncodedClips], rng: np.random.Generator, batch: int) -> Batch:
    """`batch` single frames [batch, 3, H, W], two of each clip, and for one half of them maps [batch / 2, 2, 3].

    The third is noise for the latents of the frames and of the mapped half: [3 batch / 2, z, h, w].
    """
    frames = []
    for _ in range(batch // 2):
        scene = captioned_scene(rng, config)
        frames.append(render(scene)[rng.choice(scene.num_frames, 2, replace=False)])
    maps = random_maps(rng, batch // 2)
    return pixels(np.concatenate(frames)), maps, gaussian(rng, 3 * (batch // 2), *latent_shape(config))


def frames_loss(model: PretrainModel, frames: Tensor, maps: Tensor, noise: Tensor) -> Tensor:
    """Autoencoding of what `frames_batch` draws; a scalar.

    Half of the pictures are rotated, scaled and shifted. Their latents must transform likewise, both those that the
    encoder makes and those that the decoder is given (after EQ-VAE, Kouzelis et al. 2025). Otherwise a sprite that
    moves by half a cell has a different code, and motion is hard to learn.
    """
    vae = model.svd.vae
    still, moving = frames.chunk(2)
    moved = mapped(moving, maps)
    mean, log_variance = posterior(vae, torch.cat([still, moving, moved]))
    z_still, z_moving, _ = (mean + (log_variance / 2).exp() * noise).chunk(3)
    out = decode_frames(vae.decoder, torch.cat([z_still, mapped(z_moving, maps)])).float()
    _, before, after = mean.chunk(3)
    equivariance_error = (after - mapped(before, maps)).square().mean((0, 2, 3)) / mean.var((0, 2, 3))
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
    fidelity = picture_loss(out, torch.cat([still, moved]), (-1, -2))
    return fidelity + KL_WEIGHT * divergence + EQUIVARIANCE_WEIGHT * equivariance_error.mean()


def clips_batch(config: SVDConfig, encoded: Mapping[str, EncodedClips], rng: np.random.Generator, batch: int) -> Batch:
    """`batch` clips of half the length L, [batch, L, 3, H, W], and noise of one random level, [(batch L), z, h, w]."""
    length, clips = config.num_frames // 2, []
    for _ in range(batch):
        start = int(rng.integers(config.num_frames - length + 1))
        clips.append(render(captioned_scene(rng, config))[start : start + length])
    level = rng.uniform(0, MAX_LATENT_NOISE) / config.vae.scale_factor
    return pixels(np.stack(clips)), level * gaussian(rng, batch * length, *latent_shape(config))


def clips_loss(model: PretrainModel, frames: Tensor, noise: Tensor) -> Tensor:
    """Decoding of what `clips_batch` draws, with layers over time; the encoder is not trained. A scalar.

    Noise on the latents makes the decoder robust to the errors of a sampler.
    """
    length = frames.shape[1]
    with torch.no_grad():
        mean, _ = posterior(model.svd.vae, frames.flatten(0, 1))  # [(batch length), z, h, w]
    out = model.svd.vae.decoder(mean + noise, length).float()
    return picture_loss(out.unflatten(0, (-1, length)), frames, (-1, -2, 1))  # [batch, length, 3, H, W]


def normalise_latents(vae: VAE, frames: Tensor) -> None:
    """Fold a shift and a scale of each latent channel into the layers around the latents, in place.

    Afterwards the scaled latents of `frames` [batch, 3, H, W] in [-1,1] have mean 0 and deviation 1, and the decoder's
    output is unchanged except at the border, where its first convolution pads the changed latents with zeros.
    """
    with torch.no_grad():
        raw = torch.cat([vae.moments(part).chunk(2, dim=1)[0].float() for part in frames.split(16)])
        shift, scale = raw.mean((0, 2, 3)), raw.std((0, 2, 3)) * vae.config.scale_factor  # [z]
        z = vae.config.z_channels
        weight, bias = vae.quant_conv.parameters()  # [2 z, 2 z, 1, 1], [2 z]
        weight[:z] /= scale.view(-1, 1, 1, 1)
        bias[:z] = (bias[:z] - shift) / scale
        bias[z:] -= 2 * scale.log()
        weight, bias = vae.decoder.conv_in.parameters()  # [C, z, 3, 3], [C]
        bias.add_((weight.sum((2, 3)) * shift).sum(1))
        weight.mul_(scale.view(1, -1, 1, 1))


# ---------------------------------------------------------------------------------------------- image encoder


def tower_scene(rng: np.random.Generator, config: SVDConfig) -> Scene:
    """A sprite about to follow its habit; a share of them in a pose that occurs only in the middle of clips."""
    scene = habitual_scene(rng, config)
    if rng.random() < POSED_SHARE:
        (width, height), sprite = config.size, scene.sprites[0]
        posed = replace(
            sprite,
            x=width * rng.uniform(0.15, 0.85),
            y=height * rng.uniform(0.15, 0.85),
            length=sprite.length * rng.uniform(*SCALES),
            tilt=rng.uniform(-np.pi, np.pi),
        )
        scene = replace(scene, sprites=(posed,))
    return scene


def facts(scene: Scene) -> np.ndarray:
    """What the embedding of a scene's first frame must predict: [NUM_FACTS], each with a magnitude of about 1.

    In this order: facing, cos and sin of the tilt, both times facing; RGB; x, y, log length; then for WAYPOINTS frames
    the displacements in x, those in y (downwards), and the turns since frame 0.
    """
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


def tower_batch(config: SVDConfig, encoded: Mapping[str, EncodedClips], rng: np.random.Generator, batch: int) -> Batch:
    """Pictures [batch, 3, H, W] in [-1,1], their shapes [batch] (indices into SHAPES) and facts [batch, NUM_FACTS].

    The second half are the mirror images of the first, so that the labels of a pair differ only in directions.
    """
    scenes = [tower_scene(rng, config) for _ in range(batch // 2)]
    images = pixels(np.stack([first_frame(scene) for scene in scenes]))
    images, scenes = torch.cat([images, images.flip(-1)]), scenes + [flip(scene) for scene in scenes]
    shapes = torch.tensor([SHAPES.index(scene.sprites[0].shape) for scene in scenes])
    return images, shapes, torch.from_numpy(np.stack([facts(scene) for scene in scenes])).float()


def tower_loss(model: PretrainModel, images: Tensor, shapes: Tensor, truth: Tensor) -> Tensor:
    """Classification of the shape plus regression of the facts by the heads on the embedding; a scalar.

    A third term gives the elements of the embedding mean 0 and deviation 1, like those of the caption embedding.
    """
    embedding = model.svd.image_encoder(image_encoder.preprocess(images, model.config.image_encoder.image_size)).float()
    logits, predicted = model.heads(embedding).float().split([len(SHAPES), NUM_FACTS], dim=1)
    unit = embedding.mean(0).square().mean() + (embedding.std(0) - 1).square().mean()
    return F.cross_entropy(logits, shapes) + FACTS_WEIGHT * F.mse_loss(predicted, truth) + UNIT_WEIGHT * unit


# ---------------------------------------------------------------------------------------------- diffusion


def denoising_batch(
    config: SVDConfig, clips: EncodedClips, pick: np.ndarray, tokens: Tensor, rng: np.random.Generator
) -> Batch:
    """What `denoising_loss` takes, of the clips with indices `pick` [B] and their tokens.

    Image and tokens are dropped (zeroed) at random. The noise levels of a batch are stratified: one in each of B
    equally likely intervals.
    """
    latents, batch = clips.latents[pick].float(), len(pick)
    neither = rng.random(batch) < DROP_BOTH
    with_image = torch.from_numpy((rng.random(batch) >= DROP_IMAGE) & ~neither)
    with_tokens = torch.from_numpy((rng.random(batch) >= DROP_TOKENS) & ~neither)
    image = clips.image[pick].float() * with_image[:, None, None, None]
    micro = torch.tensor([[config.micro.fps_id, config.micro.motion_bucket_id, config.micro.cond_aug]] * batch)
    quantiles = torch.from_numpy((rng.random() + np.arange(batch) / batch) % 1)
    sigma = edm.training_sigma(quantiles, P_MEAN, P_STD, config.sigma_max)
    return latents, image, tokens, with_tokens, micro, sigma, gaussian(rng, *latents.shape)


def denoising_loss(
    model: PretrainModel,
    latents: Tensor,
    image: Tensor,
    tokens: Tensor,
    with_tokens: Tensor,
    micro: Tensor,
    sigma: Tensor,
    noise: Tensor,
) -> Tensor:
    """The paper's equation 1; a scalar. All frames and the temporal set have the same tokens.

    latents      [B, F, z, h, w]
    image        [B, z, h, w], or zeros where it is dropped
    tokens       captions as indices of words, int64 [B, NUM_SLOTS], or embeddings of images [B, 1, d]
    with_tokens  [B], whether they are not dropped
    micro        [B, 3]
    sigma        [B]
    noise        [B, F, z, h, w]
    """
    tokens = tokens if tokens.is_floating_point() else model.words(tokens)
    tokens = tokens.float() * with_tokens[:, None, None]
    num_frames = latents.shape[1]
    cond = Conditioning(
        concat=image[:, None].expand(-1, num_frames, -1, -1, -1),
        micro=micro,
        spatial=tokens[:, None].expand(-1, num_frames, -1, -1),
        temporal=tokens,
    )
    return edm.loss(model.svd.network(cond), latents, sigma, noise)


def captions_batch(
    config: SVDConfig, encoded: Mapping[str, EncodedClips], rng: np.random.Generator, batch: int
) -> Batch:
    """`batch` clips with their captions: text (and, unless dropped, image) to video."""
    clips = encoded["captions"]
    pick = rng.integers(len(clips.words), size=batch)
    return denoising_batch(config, clips, pick, clips.words[pick], rng)


def images_batch(config: SVDConfig, encoded: Mapping[str, EncodedClips], rng: np.random.Generator, batch: int) -> Batch:
    """Image to video, with the image's embedding as the only token; in half of the steps `captions_batch` instead."""
    if rng.random() < 0.5:
        return captions_batch(config, encoded, rng, batch)
    clips = encoded["habits"]
    pick = rng.integers(len(clips.words), size=batch)
    return denoising_batch(config, clips, pick, clips.embedding[pick, None].float(), rng)


# ---------------------------------------------------------------------------------------------- the course


@dataclass(frozen=True)
class Stage:
    """A stage of pre-training."""

    name: str
    title: str  # for the card
    draw: Callable[[SVDConfig, Mapping[str, EncodedClips], np.random.Generator, int], Batch]
    loss: Callable[..., Tensor]  # takes the model and what was drawn
    steps: int
    batch: int
    modules: tuple[str, ...]  # submodules of PretrainModel that it trains
    clips: tuple[str, ...] = ()  # kinds of encoded clips that it draws from
    decays: bool = True  # whether its learning rate falls to 0; not if the next stage trains the same modules


STAGES = (
    Stage("frames", "autoencoder, on frames", frames_batch, frames_loss, 4000, 8, ("svd.vae",)),
    Stage("clips", "its decoder, on clips", clips_batch, clips_loss, 350, 2, ("svd.vae.decoder",)),
    Stage("tower", "image tower", tower_batch, tower_loss, 3400, 48, ("svd.image_encoder", "heads")),
    Stage(
        "captions",
        "text to video",
        captions_batch,
        denoising_loss,
        5400,
        4,
        ("svd.unet", "words"),
        ("captions",),
        False,
    ),
    Stage(
        "images", "image to video", images_batch, denoising_loss, 3200, 4, ("svd.unet", "words"), ("captions", "habits")
    ),
)
