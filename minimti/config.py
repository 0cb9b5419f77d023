"""Sizes of the networks, constants of their training, the named models, and the words that options take.

The command lines need all of this for their help, so nothing here imports torch.
"""

import json
import re
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

MEMORY_MODES = ("max", "fast", "balanced", "low")  # fastest first, least memory last (minimti/budget.py)
SOLVERS = ("euler", "heun", "dpmpp-2m")
SCHEDULES = ("karras", "ays")  # ways to space the noise levels of a sample
FORMATS = ("mp4", "gif", "png")  # kinds of results; png: a folder of frames
FITS = ("crop", "pad", "stretch")  # how a picture of another shape fits a size
NUM_TOKENS = 5  # N of the paper, tokens per set
RECIPES = ("paper", "muon")  # how an inversion optimises
DTYPES = ("float32", "bfloat16", "float16")
MAX_SIDE, MAX_PIXELS = 4096, 2**22  # bounds of a picture: 2560x1440, 7 times SVD's own 1024x576, is within


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

    @property
    def cell(self) -> int:
        """Pixels on a side of what one latent cell stands for."""
        return 2 ** (len(self.ch_mult) - 1)


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
    note: str  # printed when the model is loaded; "" for none
    micro: MicroConditioning
    unet: UNetConfig
    vae: VAEConfig
    image_encoder: ImageEncoderConfig

    @property
    def size_multiple(self) -> int:
        """Pixels that width and height must be multiples of: one cell of the coarsest UNet level."""
        return self.vae.cell * 2 ** (len(self.unet.channel_mult) - 1)


def to_json(config: SVDConfig) -> str:
    """The text that a weight file of other sizes carries under `config` in its safetensors metadata."""
    return json.dumps(asdict(config))


def from_json(text: str) -> SVDConfig:
    """Inverse of `to_json`, for the files of version 0.1.0 too.

    Raises ValueError where the text is not JSON, TypeError where it does not describe exactly the fields of a
    configuration, or one of them is out of bounds (`checked`).
    """
    try:
        entries = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(entries, dict) and "clip" in entries:
        entries = _from_0_1_0(entries)
    return checked(_build(SVDConfig, entries))


def _from_0_1_0(entries: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1.0 called the image encoder "clip" and had no defaults of recipe and note in its files.

    Of a model that is named here, num_iterations is that of MODELS.
    """
    named = MODELS.get(entries.get("name", ""), MODELS["svd"])
    added: dict[str, Any] = {"recipe": named.recipe, "note": named.note}
    if named.name == entries.get("name") and "num_iterations" in entries:
        added["num_iterations"] = named.num_iterations
    return {"image_encoder" if name == "clip" else name: value for name, value in entries.items()} | added


def _build(kind: Any, value: Any) -> Any:
    """Nested dataclasses from JSON's objects, tuples from its lists; anything else stays as it is."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, dict):
        raise TypeError(f"{kind.__name__} is {_short(value)}")
    hints = get_type_hints(kind)
    if odd := hints.keys() ^ value.keys():
        names = printable(", ".join(sorted(odd)), 200)
        raise TypeError(f"{kind.__name__} has missing or unknown fields: {names}")
    return kind(**{name: _build(hint, value[name]) for name, hint in hints.items()})


Config = TypeVar("Config")
_CHOICES = {"recipe": RECIPES}

# Smallest and largest value of a number, or of each number of a tuple, by field. A bound is several times that of any
# released video model, or that of an option of train.py and sample.py, or the least that can be computed. A network
# within them is built on the meta device in seconds; a file whose tensors differ from it is then refused.
_BOUNDS: dict[str, tuple[float, float]] = {
    "num_frames": (1, 1000),
    "size": (1, MAX_SIDE),
    "num_steps": (1, 10**4),
    "sigma_min": (1e-6, 1e6),
    "sigma_max": (1e-6, 1e6),
    "rho": (0.1, 100),
    "p_mean": (-10, 10),  # the mean of a logarithm
    "p_std": (0, 10),
    "num_iterations": (0, 10**6),
    "fps_id": (0, 999),
    "motion_bucket_id": (0, 10**4),
    "cond_aug": (0, 100),
    "in_channels": (1, 512),
    "out_channels": (1, 512),
    "model_channels": (1, 4096),
    "channel_mult": (1, 64),
    "num_res_blocks": (1, 8),
    "attention_resolutions": (1, 128),
    "num_head_channels": (1, 4096),
    "context_dim": (1, 16384),
    "adm_in_channels": (1, 16384),
    "norm_groups": (1, 4096),
    "ch": (1, 4096),
    "ch_mult": (1, 64),
    "z_channels": (1, 256),
    "scale_factor": (1e-6, 1e6),
    "image_size": (1, 4096),
    "patch_size": (1, 4096),
    "width": (1, 16384),
    "layers": (1, 64),
    "head_width": (1, 16384),
    "embed_dim": (1, 16384),
}
_MAX_ENTRIES = 8  # length of a tuple: levels of a network; SVD has 4
_MAX_TEXT = 500  # characters of a note


def checked(config: Config) -> Config:
    """The same dataclass.

    Raises TypeError where a value, also inside tuples and nested dataclasses, is not of its field's type or outside of
    its bounds (_BOUNDS), a tuple has more than 8 entries, a text is not printable or longer than 500 characters, the
    name of a model is no word, and where recipe is not a known name.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        low, high = _BOUNDS.get(name, (0, 0))
        fits = _fits(value, kind, low, high)
        if not fits or value not in _CHOICES.get(name, (value,)) or (name == "name" and not is_word(value)):
            raise TypeError(f"{name} is {_short(value)}" + (f", not in {low}..{high}" if high else ""))
    return config


def is_word(value: Any) -> bool:
    """Whether a value can name a model, and so be a part of file names.

    That is a letter or digit, then up to 63 letters, digits, dots, underscores and hyphens.
    """
    return type(value) is str and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value) is not None


def _fits(value: Any, kind: Any, minimum: float, maximum: float) -> bool:
    """Whether a value is of a type that a field names, and within its bounds. An int is a float too."""
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple) or len(value) > _MAX_ENTRIES:
            return False
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:  # tuple[int, ...]
            kinds = kinds[:1] * len(value)
        return len(value) == len(kinds) and all(_fits(v, k, minimum, maximum) for v, k in zip(value, kinds))
    if kind in (int, float):
        return type(value) in (int, kind) and minimum <= value <= maximum  # False for NaN
    if kind is str:
        return isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()
    return isinstance(value, kind) and (not is_dataclass(value) or checked(value) is value)


def printable(text: object, most: int | None = None) -> str:
    """The first `most` characters of a text, all by default, on one line.

    Letters, signs and spaces stay, as in names of files; control characters, line breaks and bytes that are not in the
    encoding of file names become escapes such as \\n and \\udcff.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:most])[:most]


def _short(value: Any) -> str:
    """A value for a message. Of one that has parts only the type: in a hostile file the parts may be without end."""
    plain = value is None or type(value) in (bool, int, float, str)
    return printable(repr(value), 60) if plain else f"an unsuitable {type(value).__name__}"


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
    num_iterations=600,
    recipe="muon",
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
