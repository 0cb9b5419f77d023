"""The distributions of clips that pre-training and the experiments draw from, and the sizes that they support."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minimti.config import SVDConfig
from minimti.io.files import InputError
from minimti.io.pixels import from_uint8
from minimti.world.scene import MIN_SIDE, NUM_SLOTS, Scene, habit, random_scene, render
from minimti.world.shapes import SHAPES

PAIR_SHARE = 0.2  # captioned scenes with two sprites
CAMERA_SHARE = 0.3  # captioned scenes whose program may contain camera words


def pixels(frames: np.ndarray) -> Tensor:
    """Images of any shape, uint8 -> fp32 in [-1,1]."""
    return from_uint8(torch.from_numpy(frames))


def captioned_scene(rng: np.random.Generator, config: SVDConfig) -> Scene:
    """A scene with a random program, of the model's size and number of frames."""
    pair, camera = rng.random(2) < (PAIR_SHARE, CAMERA_SHARE)
    return random_scene(rng, config.size[::-1], config.num_frames, num_sprites=1 + pair, camera=camera)


def habitual_scene(rng: np.random.Generator, config: SVDConfig) -> Scene:
    """A scene in which a single sprite follows the habit of its shape: its first frame determines the motion."""
    shape = str(rng.choice(SHAPES))
    own = habit(shape, NUM_SLOTS)
    size = config.size[::-1]
    return random_scene(rng, size, config.num_frames, program=own.program, shapes=(shape,), wave=own.wave)


SCENES = {"captions": captioned_scene, "habits": habitual_scene}


def first_frame(scene: Scene) -> np.ndarray:
    """The first frame of a scene: uint8 [3, H, W]."""
    return render(replace(scene, num_frames=2, program=("still",)))[0]


def check_sizes(config: SVDConfig) -> None:
    """Raises InputError, with the reason, if a model with this configuration cannot be pre-trained on the world."""
    unet, vae, tower, (width, height) = config.unet, config.vae, config.image_encoder, config.size
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    picture, multiple = f"a picture of {width}x{height}", config.size_multiple
    refusals = [
        (width % multiple or height % multiple, f"{picture} is not a multiple of {multiple}, which the networks need"),
        (height < MIN_SIDE, f"{picture} is lower than {MIN_SIDE}, too small for a sprite"),
        (not 1 <= width / height <= 1.8, f"{picture} is neither square nor up to 16:9"),
        (
            config.num_frames <= NUM_SLOTS,
            f"{config.num_frames} frames have too few steps for the {NUM_SLOTS} words of a caption",
        ),
        (
            (unet.in_channels, unet.out_channels) != (2 * vae.z_channels, vae.z_channels),
            f"a UNet of {unet.in_channels} channels in and {unet.out_channels} out does not fit latents of"
            f" {vae.z_channels}: it takes twice as many and returns as many",
        ),
        (
            tower.embed_dim != unet.context_dim,
            f"the image encoder's embedding has {tower.embed_dim} elements, a token {unet.context_dim}",
        ),
        (
            any(w % unet.num_head_channels for w in widths),
            f"channels of {', '.join(map(str, widths))} do not divide into heads of {unet.num_head_channels}",
        ),
        (
            unet.model_channels % unet.norm_groups or vae.ch % vae.norm_groups,
            f"channels of {unet.model_channels} and {vae.ch} do not divide into {unet.norm_groups} and"
            f" {vae.norm_groups} groups",
        ),
        (
            tower.image_size % tower.patch_size,
            f"the image encoder's {tower.image_size} pixels do not divide into patches of {tower.patch_size}",
        ),
    ]
    for applies, reason in refusals:
        if applies:
            raise InputError(f"{config.name}: {reason}")
