"""Sizes of the networks, the constants of their training, and the named models."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace


@dataclass(frozen=True)
class UNetConfig:
    """Field names are those of `network_config` in the official svd.yaml."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]  # one resolution level per entry, finest first
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]  # downsampling factors at which transformers stand
    num_head_channels: int
    context_dim: int  # d, the width of a token
    adm_in_channels: int  # three sinusoids side by side: fps id, motion bucket, noise augmentation
    norm_groups: int = 32  # a constant of the official code


@dataclass(frozen=True)
class VAEConfig:
    """Field names are those of `ddconfig` in the official svd.yaml, add_owned its `scale_factor`."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float  # scaled latent = scale_factor * raw latent
    norm_groups: int = 32


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Field names are those of open_clip's vision configurations."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    head_width: int
    embed_dim: int


@dataclass(frozen=True)
class MicroConditioning:
    """The three numbers that SVD was told about every clip it was trained on."""

    fps_id: int  # frames per second minus one
    motion_bucket_id: int  # 0..255, how much moves
    cond_aug: float  # standard deviation of the noise added to the conditioning image, in [-1,1] units


@dataclass(frozen=True)
class SVDConfig:
    name: str  # an embedding only fits the model it was optimised on
    num_frames: int  # F
    size: tuple[int, int]  # width, height in pixels
    num_steps: int  # of the Euler sampler
    sigma_min: float
    sigma_max: float
    rho: float  # curvature of the Karras schedule
    p_mean: float  # inversion draws ln(sigma) ~ N(p_mean, p_std^2), paper B.2
    p_std: float
    num_iterations: int  # of an inversion by the paper's recipe, B.2
    micro: MicroConditioning
    unet: UNetConfig
    vae: VAEConfig
    image_encoder: ImageEncoderConfig

    @property
    def size_multiple(self) -> int:
        """Pixels that width and height must be multiples of: one cell of the coarsest UNet level."""
        return 2 ** (len(self.vae.ch_mult) - 1 + len(self.unet.channel_mult) - 1)


def to_json(config: SVDConfig) -> str:
    """The text that a weight file of other sizes carries under `config` in its safetensors metadata."""
    return json.dumps(asdict(config))


def from_json(text: str) -> SVDConfig:
    """Inverse of `to_json`. Raises ValueError, TypeError or AttributeError where it is not the text of one."""
    parts = {"unet": UNetConfig, "vae": VAEConfig, "image_encoder": ImageEncoderConfig, "micro": MicroConditioning}
    entries = _lists_to_tuples(json.loads(text))
    if "clip" in entries:  # its name in files of version 0.1.0
        entries["image_encoder"] = entries.pop("clip")
    config = SVDConfig(**{key: checked(parts[key](**v)) if key in parts else v for key, v in entries.items()})
    return checked(config)


def checked(config):
    """The same dataclass. Raises TypeError where a number is not of its field's type, or not one from 0 up."""
    for field in fields(config):
        value = getattr(config, field.name)
        signed = field.name == "p_mean"  # the mean of a logarithm
        for entry in value if isinstance(value, tuple) else (value,):
            wrong = isinstance(entry, (int, float)) and (not -math.inf < entry < math.inf or entry < 0 and not signed)
            of_kind = {int: int, float: (int, float), str: str}.get(field.type, object)
            if wrong or isinstance(entry, bool) or not isinstance(entry, of_kind):
                raise TypeError(f"{field.name} is {value!r}")
    return config


def _lists_to_tuples(fields: dict) -> dict:
    convert = {dict: _lists_to_tuples, list: tuple}
    return {key: convert.get(type(value), lambda v: v)(value) for key, value in fields.items()}


_SVD = SVDConfig(
    name="svd",
    num_frames=14,
    size=(1024, 576),
    num_steps=25,
    sigma_min=0.002,
    sigma_max=700.0,
    rho=7.0,
    p_mean=2.8,
    p_std=1.6,
    num_iterations=1000,
    micro=MicroConditioning(fps_id=6, motion_bucket_id=127, cond_aug=0.02),
    unet=UNetConfig(
        in_channels=8,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(4, 2, 1),
        num_head_channels=64,
        context_dim=1024,
        adm_in_channels=768,
    ),
    vae=VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, scale_factor=0.18215),
    image_encoder=ImageEncoderConfig(
        image_size=224, patch_size=14, width=1280, layers=32, head_width=80, embed_dim=1024
    ),
)

# The embedded model: SVD's networks at sizes for a CPU, pre-trained on the procedural world (pretrain.py).
_TINY = replace(
    _SVD,
    name="tiny",
    size=(64, 64),
    num_steps=12,
    sigma_min=0.02,
    sigma_max=100.0,
    p_mean=2.0,
    p_std=1.5,
    num_iterations=300,
    unet=UNetConfig(
        in_channels=16,
        out_channels=8,
        model_channels=64,
        channel_mult=(1, 1, 2),
        num_res_blocks=1,
        attention_resolutions=(4, 2, 1),
        num_head_channels=32,
        context_dim=64,
        adm_in_channels=96,
        norm_groups=4,
    ),
    # Cells of 4x4 pixels, SVD's have 8x8: in larger ones a small sprite that moves or turns is another code every time.
    vae=VAEConfig(ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=8, scale_factor=0.18215, norm_groups=4),
    image_encoder=ImageEncoderConfig(image_size=64, patch_size=8, width=128, layers=4, head_width=32, embed_dim=64),
)

MODELS = {
    "svd": _SVD,
    "svd-xt": replace(_SVD, name="svd-xt", num_frames=25, num_steps=30),
    "tiny": _TINY,
}
