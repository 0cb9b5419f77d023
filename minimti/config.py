"""Sizes of the networks, constants of their training, the named models, and the words that options take.

The command lines need all of this for their help, so nothing here imports torch.
"""

import json
import math
from dataclasses import asdict, dataclass, is_dataclass, replace
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

MEMORY_MODES = ("fast", "balanced", "low")  # how much of the forward pass a training step recomputes, least first
SOLVERS = ("euler", "heun", "dpmpp-2m")
FITS = ("crop", "pad", "stretch")  # how a picture of another shape fits a size
NUM_TOKENS = 5  # N of the paper, tokens per set
RECIPES = ("paper", "muon")  # how an inversion optimises
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class UNetConfig:
    """Field names are those of `network_config` in the official svd.yaml."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]  # one resolution level per entry, finest first
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]  # downsampling factors of the levels that have transformers
    num_head_channels: int
    context_dim: int  # d, the width of a token
    adm_in_channels: int  # three sinusoids side by side: fps id, motion bucket, noise augmentation
    norm_groups: int = 32  # a constant of the official code


@dataclass(frozen=True)
class VAEConfig:
    """Field names are those of `ddconfig` in the official svd.yaml, and its `scale_factor`."""

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
    """The three numbers that condition SVD besides the image; in training they described each clip."""

    fps_id: int  # frames per second minus one
    motion_bucket_id: int  # 0..255, how much moves
    cond_aug: float  # standard deviation of the noise added to the conditioning image, in [-1,1] units


@dataclass(frozen=True)
class SVDConfig:
    """A model: its sizes, the constants of its diffusion, and the defaults of training and sampling."""

    name: str  # an embedding only fits the model it was optimised on
    num_frames: int  # F
    size: tuple[int, int]  # width, height in pixels
    num_steps: int  # Euler steps of a sample
    sigma_min: float
    sigma_max: float
    rho: float  # curvature of the Karras schedule
    p_mean: float  # inversion draws ln(sigma) ~ N(p_mean, p_std^2), paper B.2
    p_std: float
    num_iterations: int  # optimisation steps of the paper's recipe, B.2
    recipe: str  # the default of an inversion, one of RECIPES
    memory: str | None  # the default of an inversion, one of MEMORY_MODES; None recomputes nothing
    note: str  # printed when the model is loaded; "" for none
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
    """Inverse of `to_json`, for the files of version 0.1.0 too.

    Raises ValueError where the text is not JSON, TypeError where it does not describe exactly the fields of a
    configuration.
    """
    entries = json.loads(text)
    if isinstance(entries, dict) and "clip" in entries:
        entries = _from_0_1_0(entries)
    return checked(_build(SVDConfig, entries))


def _from_0_1_0(entries: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1.0 called the image encoder "clip" and had no defaults of recipe, memory and note in its files."""
    named = MODELS.get(entries.get("name", ""), MODELS["svd"])
    added = {"recipe": named.recipe, "memory": named.memory, "note": named.note}
    return added | {"image_encoder" if name == "clip" else name: value for name, value in entries.items()}


def _build(kind: Any, value: Any) -> Any:
    """Nested dataclasses from JSON's objects, tuples from its lists; anything else stays as it is."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, dict):
        raise TypeError(f"{kind.__name__} is {value!r}")
    hints = get_type_hints(kind)
    if odd := hints.keys() ^ value.keys():
        raise TypeError(f"{kind.__name__} has missing or unknown fields: {', '.join(sorted(odd))}")
    return kind(**{name: _build(hint, value[name]) for name, hint in hints.items()})


Config = TypeVar("Config")
_CHOICES = {"recipe": RECIPES, "memory": (None, *MEMORY_MODES)}


def checked(config: Config) -> Config:
    """The same dataclass.

    Raises TypeError where a value, also inside tuples and nested dataclasses, is not of its field's type, where a
    number is negative (p_mean may be) or not finite, and where recipe or memory is not a known name.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        minimum = -math.inf if name == "p_mean" else 0  # the mean of a logarithm
        if not _fits(value, kind, minimum) or value not in _CHOICES.get(name, (value,)):
            raise TypeError(f"{name} is {value!r}")
    return config


def _fits(value: Any, kind: Any, minimum: float) -> bool:
    """Whether a value is of a type that a field names. An int is a float too, a bool is no number."""
    if get_origin(kind) is UnionType:
        return any(_fits(value, option, minimum) for option in get_args(kind))
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:  # tuple[int, ...]
            kinds = kinds[:1] * len(value)
        return len(value) == len(kinds) and all(_fits(v, k, minimum) for v, k in zip(value, kinds))
    if kind in (int, float):
        return type(value) in (int, kind) and -math.inf < value < math.inf and value >= minimum
    return isinstance(value, kind) and (not is_dataclass(value) or checked(value) is value)


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
    recipe="paper",
    memory="balanced",
    note="",
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

# The embedded model: SVD's networks at sizes for a CPU, pre-trained on the procedural world (minimti/pretrain).
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
    recipe="muon",
    memory=None,
    note="tiny has been trained on drawn sprites like those of examples/ only;"
    " for photographs and films use --model svd",
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
    # Cells of 4x4 pixels where SVD has 8x8: in larger ones the code of a small sprite changes with every move and turn.
    vae=VAEConfig(ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=8, scale_factor=0.18215, norm_groups=4),
    image_encoder=ImageEncoderConfig(image_size=64, patch_size=8, width=128, layers=4, head_width=32, embed_dim=64),
)

_SVD_XT = replace(_SVD, name="svd-xt", num_frames=25, num_steps=30)

MODELS = {
    "svd": _SVD,
    "svd-xt": _SVD_XT,
    "svd-xt-1-1": replace(_SVD_XT, name="svd-xt-1-1"),
    "tiny": _TINY,
}
