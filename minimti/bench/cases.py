"""What is compared: the steps of training and sampling, and the sizes and precisions at which they run."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from minimti import edm
from minimti.bench.reference import Diffusers
from minimti.checkpoint.load import fill as fill_module
from minimti.checkpoint.load import memory_format
from minimti.config import NUM_TOKENS, SVDConfig
from minimti.networks.recompute import set_mode
from minimti.svd import GUIDANCE, SVD, Conditioning

BF16, FP32 = torch.bfloat16, torch.float32

Model = SVD | Diffusers
Library = type[SVD] | type[Diffusers]


@dataclass(frozen=True)
class Step:
    """A computation that both libraries can do, with what it needs."""

    run: Callable[..., Tensor]  # run(model, *inputs)
    networks: tuple[str, ...]  # those that it uses
    inputs: tuple[str, ...]  # names in `inputs`
    repeatable: bool = True  # False: it releases networks, so it is not timed


def train(svd: Model, x0: Tensor, image: Tensor, tokens: Tensor) -> Tensor:
    """The gradient of the loss with respect to tokens [1, N, d]; x0 [1, F, z, h, w], image latent [1, 1, z, h, w]."""
    tokens = tokens.detach().requires_grad_()
    network = svd.network(_conditioning(svd.config, image, tokens))
    loss = edm.loss(network, x0, x0.new_ones(1), torch.randn_like(x0))
    loss.backward()
    assert tokens.grad is not None
    return tokens.grad


@torch.no_grad()
def denoise(svd: Model, x: Tensor, image: Tensor, tokens: Tensor) -> Tensor:
    """D(x; sigma = 1) with guidance, [1, F, z, h, w]; inputs as in `train`."""
    return svd.denoiser(_conditioning(svd.config, image, tokens), GUIDANCE)(x, x.new_ones(1))


@torch.no_grad()
def encode(svd: Model, clip: Tensor) -> Tensor:
    """A clip [1, F, 3, H, W] in [-1,1] -> scaled latents [1, F, z, h, w]."""
    return svd.encode(clip)


@torch.no_grad()
def decode(svd: Model, latents: Tensor) -> Tensor:
    """Scaled latents [1, F, z, h, w] -> a clip [1, F, 3, H, W]."""
    return svd.decode(latents)


@torch.no_grad()
def sample(svd: SVD, pixels: Tensor, tokens: Tensor) -> Tensor:
    """What sample.py does after loading, with a single step of its solver, one network after the other.

    pixels [1, 3, H, W] in [-1,1], tokens [1, N, d] -> a clip [1, F, 3, H, W].
    """
    config = svd.config
    svd.release("image_encoder")
    spatial = tokens[:, None].expand(-1, config.num_frames, -1, -1)  # [1, F, N, d]
    cond = svd.prepare(pixels, (spatial, tokens), config.micro, torch.Generator())
    x = next(svd.sample(cond, torch.randn_like(cond.concat), 1, GUIDANCE))
    svd.release("unet")
    return svd.decode(x)


TRAIN = Step(train, ("unet",), ("clip_latents", "image_latent", "tokens"))
DENOISE = Step(denoise, ("unet",), ("clip_latents", "image_latent", "tokens"))
ENCODE = Step(encode, ("vae",), ("clip",))
DECODE = Step(decode, ("vae",), ("clip_latents",))
SAMPLE = Step(sample, ("unet", "vae", "image_encoder"), ("image", "tokens"), repeatable=False)


@dataclass(frozen=True)
class Case:
    """A step at one size and precision. The settings of both libraries stand in one case."""

    step: Step
    config: SVDConfig
    dtype: torch.dtype  # weights of the UNet and the image encoder; inputs are fp32
    vae_dtype: torch.dtype = FP32
    mode: str | None = None  # our recomputation (networks.recompute)
    checkpointing: bool = False  # diffusers' recomputation
    compared: bool = True  # False: diffusers is not built at all
    compiled: bool = False  # our UNet is compiled before it is timed


def official_cases(config: SVDConfig) -> dict[str, Case]:
    """The steps of train.py and sample.py as they run on a GPU, by name."""
    return {
        "train_fast": Case(TRAIN, config, BF16, mode="fast"),
        "train_balanced": Case(TRAIN, config, BF16, mode="balanced", checkpointing=True),
        "train_low": Case(TRAIN, config, BF16, mode="low", compared=False),
        "denoise": Case(DENOISE, config, BF16),
        "encode": Case(ENCODE, config, BF16),
        "decode": Case(DECODE, config, BF16),
        "decode_bf16": Case(DECODE, config, BF16, vae_dtype=BF16),
        "sample": Case(SAMPLE, config, BF16, compared=False),
    }


def cpu_cases(config: SVDConfig, bf16: bool) -> dict[str, Case]:
    """Steps that a CPU finishes in seconds: the UNet on latents of 16x16, and a tiny UNet on latents of 8x8.

    `bf16` adds the same steps in bf16, for a processor that multiplies in it.
    """
    unet = replace(config.unet, model_channels=64, channel_mult=(1, 2), attention_resolutions=(2, 1))
    tiny, config = replace(config, size=(64, 64), unet=unet), replace(config, size=(128, 128))
    cases = {}
    for name, dtype in [("fp32", FP32), ("bf16", BF16)][: 1 + bf16]:
        cases[f"tiny_train_{name}"] = Case(TRAIN, tiny, dtype)
        cases[f"tiny_train_compiled_{name}"] = Case(TRAIN, tiny, dtype, compiled=True)
        cases[f"train_{name}"] = Case(TRAIN, config, dtype)
        cases[f"denoise_{name}"] = Case(DENOISE, config, dtype)
    return cases


def skeleton(library: Library, case: Case) -> Model:
    """A model on the meta device, with only the networks that the step uses."""
    with torch.device("meta"):
        model = SVD(case.config) if library is SVD else Diffusers(case.config, case.checkpointing)
    for name, _ in list(model.named_children()):
        if name not in case.step.networks:
            model.release(name)
    if isinstance(model, SVD):
        set_mode(model, case.mode)
    return model.requires_grad_(False).eval()


def fill(model: Model, case: Case, device: str) -> Model:
    """Gives a skeleton random weights under which activations neither vanish nor explode, and returns it.

    They follow from the tensors' names, which are the same in both libraries. Ours have the memory format in which
    minimti loads them, those of diffusers the default.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, old in model.named_parameters():
            dtype = case.vae_dtype if name.startswith("vae.") else case.dtype
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            tensor = torch.randn(old.shape, dtype=dtype, device=device, generator=generator)
            tensor /= old.shape[1:].numel() ** 0.5
            yield name, tensor.to(memory_format=memory_format(tensor)) if isinstance(model, SVD) else tensor

    fill_module(model, tensors())
    return model


def build(library: Library, case: Case, device: str) -> Model:
    """A model for the case on a device."""
    return fill(skeleton(library, case), case, device)


def inputs(case: Case, device: str) -> list[Tensor]:
    """Random inputs of the step, in fp32."""
    config = case.config
    width, height = config.size
    scale = 2 ** (len(config.vae.ch_mult) - 1)  # pixels per latent cell
    z, h, w = config.vae.z_channels, height // scale, width // scale
    shapes = {
        "clip": (1, config.num_frames, 3, height, width),
        "clip_latents": (1, config.num_frames, z, h, w),
        "image": (1, 3, height, width),
        "image_latent": (1, 1, z, h, w),
        "tokens": (1, NUM_TOKENS, config.unet.context_dim),
    }
    return [torch.randn(shapes[name], device=device) for name in case.step.inputs]


def _conditioning(config: SVDConfig, image: Tensor, tokens: Tensor) -> Conditioning:
    """One image latent [1, 1, z, h, w] for every frame, and the same tokens [1, N, d] in every set."""
    return Conditioning(
        concat=image.expand(-1, config.num_frames, -1, -1, -1),  # [1, F, z, h, w]
        micro=image.new_tensor([astuple(config.micro)]),  # [1, 3]
        spatial=tokens[:, None].expand(-1, config.num_frames, -1, -1),  # [1, F, N, d]
        temporal=tokens,
    )
