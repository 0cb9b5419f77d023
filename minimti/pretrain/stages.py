"""The five stages of pre-training: their data, their losses, and the modules that they train.

Everything random in a loss comes from the generator that it is given, so a step can be repeated exactly.
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
from minimti.networks.layers import Blend, ResBlock
from minimti.networks.vae import VAE, Decoder
from minimti.svd import SVD, Conditioning
from minimti.world.captions import CaptionEmbedding, word_ids
from minimti.world.clips import SCENES, captioned_scene, first_frame, habitual_scene, pixels
from minimti.world.scene import SCALES, SPEED, Scene, flip, render, trajectory
from minimti.world.shapes import SHAPES

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


def gaussian(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Unit normal noise in fp32, of the shape and on the device of a tensor; the same on every device."""
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype=np.float32)).to(like.device)


@dataclass(frozen=True)
class EncodedClips:
    """Clips of one of SCENES' kinds, encoded ahead because the encoder costs as much as a UNet step.

    Floats are in fp16, and all of it is on the CPU.
    """

    latents: Tensor  # [n, F, z, h, w], scaled
    image: Tensor  # [n, z, h, w], raw latent of the noisy first frame (see `SVD.prepare`)
    embedding: Tensor  # [n, d], of the first frame
    words: Tensor  # int64 [n, NUM_SLOTS], the caption


def encode_scenes(model: PretrainModel, kind: str, rng: np.random.Generator, num_scenes: int) -> EncodedClips:
    """Draw scenes of a kind and encode them: 2 * num_scenes clips, each followed by its mirror image.

    A clip and its mirror image have the same caption.
    """
    svd, config = model.svd, model.config
    parts = []
    for _ in range(num_scenes):
        scene = SCENES[kind](rng, config)
        frames = pixels(render(scene)).to(model.device)
        both = torch.stack([frames, frames.flip(-1)])  # [2, F, 3, H, W]
        image = both[:, 0] + config.micro.cond_aug * gaussian(rng, both[:, 0])
        with torch.no_grad():
            pictures = torch.cat([both.flatten(0, 1), image])  # [2 F + 2, 3, H, W]
            raw = svd.vae.moments(pictures).chunk(2, dim=1)[0].float()
            embedding = svd.embed(both[:, 0])
        latents = config.vae.scale_factor * raw[:-2].unflatten(0, (2, -1))  # [2, F, z, h, w]
        parts.append((latents, raw[-2:], embedding, word_ids([scene.program] * 2)))
    latents, image, embedding, ids = (torch.cat(tensors) for tensors in zip(*parts))
    # Converted last: torch.cat fails on fp16 tensors under the CPU's autocast to bf16.
    return EncodedClips(latents.half().cpu(), image.half().cpu(), embedding.half().cpu(), ids)


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


def frames_loss(model: PretrainModel, encoded: dict[str, EncodedClips], rng: np.random.Generator, batch: int) -> Tensor:
    """Autoencoding of `batch` single frames, two of each clip; a scalar.

    Half of the pictures are rotated, scaled and shifted. Their latents must transform likewise, both those that the
    encoder makes and those that the decoder is given (after EQ-VAE, Kouzelis et al. 2025). Otherwise a sprite that
    moves by half a cell has a different code, and motion is hard to learn.
    """
    vae, frames = model.svd.vae, []
    for _ in range(batch // 2):
        scene = captioned_scene(rng, model.config)
        frames.append(render(scene)[rng.choice(scene.num_frames, 2, replace=False)])
    still, moving = pixels(np.concatenate(frames)).to(model.device).chunk(2)
    maps = random_maps(rng, len(moving)).to(model.device)
    moved = mapped(moving, maps)
    mean, log_variance = posterior(vae, torch.cat([still, moving, moved]))
    z_still, z_moving, _ = (mean + (log_variance / 2).exp() * gaussian(rng, mean)).chunk(3)
    out = decode_frames(vae.decoder, torch.cat([z_still, mapped(z_moving, maps)])).float()
    _, before, after = mean.chunk(3)
    equivariance_error = (after - mapped(before, maps)).square().mean((0, 2, 3)) / mean.var((0, 2, 3))
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
    fidelity = picture_loss(out, torch.cat([still, moved]), (-1, -2))
    return fidelity + KL_WEIGHT * divergence + EQUIVARIANCE_WEIGHT * equivariance_error.mean()


def clips_loss(model: PretrainModel, encoded: dict[str, EncodedClips], rng: np.random.Generator, batch: int) -> Tensor:
    """Decoding of `batch` clips of half the length, with layers over time; the encoder is not trained. A scalar.

    Noise of a random level on the latents makes the decoder robust to the errors of a sampler.
    """
    vae, length, clips = model.svd.vae, model.config.num_frames // 2, []
    for _ in range(batch):
        start = int(rng.integers(model.config.num_frames - length + 1))
        clips.append(render(captioned_scene(rng, model.config))[start : start + length])
    frames = pixels(np.stack(clips)).to(model.device)  # [batch, length, 3, H, W]
    with torch.no_grad():
        mean, _ = posterior(vae, frames.flatten(0, 1))  # [(batch length), z, h, w]
    noise = rng.uniform(0, MAX_LATENT_NOISE) / vae.config.scale_factor
    out = vae.decoder(mean + noise * gaussian(rng, mean), length).float()
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


def tower_batch(rng: np.random.Generator, config: SVDConfig, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [batch, 3, H, W] in [-1,1], their shapes [batch] (indices into SHAPES) and facts [batch, NUM_FACTS].

    The second half are the mirror images of the first, so that the labels of a pair differ only in directions.
    """
    scenes = [tower_scene(rng, config) for _ in range(batch // 2)]
    images = pixels(np.stack([first_frame(scene) for scene in scenes]))
    images, scenes = torch.cat([images, images.flip(-1)]), scenes + [flip(scene) for scene in scenes]
    shapes = torch.tensor([SHAPES.index(scene.sprites[0].shape) for scene in scenes])
    return images, shapes, torch.from_numpy(np.stack([facts(scene) for scene in scenes])).float()


def tower_loss(model: PretrainModel, encoded: dict[str, EncodedClips], rng: np.random.Generator, batch: int) -> Tensor:
    """Classification of the shape plus regression of the facts by the heads on the embedding; a scalar.

    A third term gives the elements of the embedding mean 0 and deviation 1, like those of the caption embedding.
    """
    images, shapes, truth = (t.to(model.device) for t in tower_batch(rng, model.config, batch))
    embedding = model.svd.image_encoder(image_encoder.preprocess(images, model.config.image_encoder.image_size)).float()
    logits, predicted = model.heads(embedding).float().split([len(SHAPES), NUM_FACTS], dim=1)
    unit = embedding.mean(0).square().mean() + (embedding.std(0) - 1).square().mean()
    return F.cross_entropy(logits, shapes) + FACTS_WEIGHT * F.mse_loss(predicted, truth) + UNIT_WEIGHT * unit


# ---------------------------------------------------------------------------------------------- diffusion


def denoising_loss(
    model: PretrainModel, clips: EncodedClips, pick: np.ndarray, tokens: Tensor, rng: np.random.Generator
) -> Tensor:
    """The paper's equation 1 on the clips with indices `pick` [B], given their tokens [B, N, d]; a scalar.

    All frames and the temporal set have the same tokens. Image and tokens are dropped (zeroed) at random. The noise
    levels of a batch are stratified: one in each of B equally likely intervals.
    """
    config, device = model.config, model.device
    latents = clips.latents[pick].float().to(device)
    batch, num_frames = latents.shape[:2]
    neither = rng.random(batch) < DROP_BOTH
    with_image = torch.from_numpy((rng.random(batch) >= DROP_IMAGE) & ~neither).to(device)
    with_tokens = torch.from_numpy((rng.random(batch) >= DROP_TOKENS) & ~neither).to(device)
    tokens = tokens.float() * with_tokens[:, None, None]
    image = clips.image[pick].float().to(device) * with_image[:, None, None, None]
    micro = torch.tensor([config.micro.fps_id, config.micro.motion_bucket_id, config.micro.cond_aug], device=device)
    cond = Conditioning(
        concat=image[:, None].expand(-1, num_frames, -1, -1, -1),
        micro=micro.expand(batch, -1),
        spatial=tokens[:, None].expand(-1, num_frames, -1, -1),
        temporal=tokens,
    )
    quantiles = torch.from_numpy((rng.random() + np.arange(batch) / batch) % 1).to(device)
    sigma = edm.training_sigma(quantiles, P_MEAN, P_STD, config.sigma_max)
    return edm.loss(model.svd.network(cond), latents, sigma, gaussian(rng, latents))


def captions_loss(
    model: PretrainModel, encoded: dict[str, EncodedClips], rng: np.random.Generator, batch: int
) -> Tensor:
    """Denoising of `batch` clips given the tokens of their captions: text (and, unless dropped, image) to video."""
    clips = encoded["captions"]
    pick = rng.integers(len(clips.words), size=batch)
    return denoising_loss(model, clips, pick, model.words(clips.words[pick].to(model.device)), rng)


def images_loss(model: PretrainModel, encoded: dict[str, EncodedClips], rng: np.random.Generator, batch: int) -> Tensor:
    """Image to video, with the image's embedding as the only token; in half of the steps `captions_loss` instead."""
    if rng.random() < 0.5:
        return captions_loss(model, encoded, rng, batch)
    clips = encoded["habits"]
    pick = rng.integers(len(clips.words), size=batch)
    return denoising_loss(model, clips, pick, clips.embedding[pick, None].to(model.device), rng)


# ---------------------------------------------------------------------------------------------- the course

Loss = Callable[[PretrainModel, dict[str, EncodedClips], np.random.Generator, int], Tensor]


@dataclass(frozen=True)
class Stage:
    """A stage of pre-training."""

    name: str
    title: str  # for the card
    loss: Loss
    steps: int
    batch: int
    modules: tuple[str, ...]  # submodules of PretrainModel that it trains
    clips: tuple[str, ...] = ()  # kinds of encoded clips that its loss needs
    decays: bool = True  # whether its learning rate falls to 0; not if the next stage trains the same modules


STAGES = (
    Stage("frames", "autoencoder, on frames", frames_loss, 4000, 8, ("svd.vae",)),
    Stage("clips", "its decoder, on clips", clips_loss, 350, 2, ("svd.vae.decoder",)),
    Stage("tower", "image tower", tower_loss, 3400, 48, ("svd.image_encoder", "heads")),
    Stage("captions", "text to video", captions_loss, 5400, 4, ("svd.unet", "words"), ("captions",), False),
    Stage("images", "image to video", images_loss, 3200, 4, ("svd.unet", "words"), ("captions", "habits")),
)
