"""What is compared: the steps of training and sampling, the sizes and precisions at which they run, and their forms."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from minimti import edm
from minimti.bench.reference import Diffusers
from minimti.budget import Budget, budget_of
from minimti.checkpoint.load import fill as fill_module
from minimti.checkpoint.load import memory_format
from minimti.config import MEMORY_MODES, NUM_TOKENS, SVDConfig
from minimti.networks.graph import record
from minimti.pipeline import compile_unet
from minimti.svd import GUIDANCE, SVD, Conditioning

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

Model = SVD | Diffusers
Library = type[SVD] | type[Diffusers]
LIBRARIES: dict[str, Library] = {"ours": SVD, "diffusers": Diffusers}


@dataclass(frozen=True)
class Step:
    """A computation that both libraries can do, with what it needs.

    `prepare(model, *inputs)` does what happens once per clip or sample and returns the step itself: a function without
    arguments that a CUDA graph can record. Its inputs stay where they are, and nothing in it comes from the CPU.
    """

    prepare: Callable[..., Callable[[], Tensor]]
    networks: tuple[str, ...]  # those that it uses
    inputs: tuple[str, ...]  # names in `inputs`

    def run(self, model: "Model", *inputs: Tensor) -> Tensor:
        """Both parts, once."""
        return self.prepare(model, *inputs)()


def train(svd: Model, x0: Tensor, image: Tensor, tokens: Tensor) -> Callable[[], Tensor]:
    """The gradient of the loss with respect to tokens [1, N, d]; x0 [1, F, z, h, w], image latent [1, 1, z, h, w]."""
    tokens = tokens.detach().requires_grad_()
    fixed = _conditioning(svd.config, image, tokens.detach())
    sigma, n = x0.new_ones(1), torch.randn_like(x0)

    def step() -> Tensor:
        network = svd.network(replace(fixed, spatial=_per_frame(svd.config, tokens), temporal=tokens))
        # Scaled as in invert.loss_and_gradient, for half precision.
        (gradient,) = torch.autograd.grad(edm.loss(network, x0, sigma, n) * x0.numel(), tokens)
        return gradient / x0.numel()

    return step


@torch.no_grad()
def denoise(svd: Model, x: Tensor, image: Tensor, tokens: Tensor) -> Callable[[], Tensor]:
    """D(x; sigma = 1) with guidance, [1, F, z, h, w]; inputs as in `train`."""
    D, sigma = svd.denoiser(_conditioning(svd.config, image, tokens), GUIDANCE), x.new_ones(1)
    return torch.no_grad()(lambda: D(x, sigma))


def encode(svd: Model, clip: Tensor) -> Callable[[], Tensor]:
    """A clip [1, F, 3, H, W] in [-1,1] -> scaled latents [1, F, z, h, w]."""
    return torch.no_grad()(lambda: svd.encode(clip))


def decode(svd: Model, latents: Tensor) -> Callable[[], Tensor]:
    """Scaled latents [1, F, z, h, w] -> a clip [1, F, 3, H, W]."""
    return torch.no_grad()(lambda: svd.decode(latents))


def sample(svd: SVD, pixels: Tensor, tokens: Tensor) -> Callable[[], Tensor]:
    """What sample.py does after loading, with a single step of its solver, one network after the other.

    pixels [1, 3, H, W] in [-1,1], tokens [1, N, d] -> a clip [1, F, 3, H, W].
    """

    @torch.no_grad()
    def step() -> Tensor:
        svd.release("image_encoder")
        cond = svd.prepare(pixels, (_per_frame(svd.config, tokens), tokens), svd.config.micro, torch.Generator())
        x = next(svd.sample(cond, torch.randn_like(cond.concat), 1, GUIDANCE))
        svd.release("unet")
        return svd.decode(x)

    return step


TRAIN = Step(train, ("unet",), ("clip_latents", "image_latent", "tokens"))
DENOISE = Step(denoise, ("unet",), ("clip_latents", "image_latent", "tokens"))
ENCODE = Step(encode, ("vae",), ("clip",))
DECODE = Step(decode, ("vae",), ("clip_latents",))
SAMPLE = Step(sample, ("unet", "vae", "image_encoder"), ("image", "tokens"))


@dataclass(frozen=True)
class Case:
    """A step at one size and precision. The settings of both libraries stand in one case."""

    step: Step
    config: SVDConfig
    dtype: torch.dtype  # weights of the UNet and the image encoder; inputs are fp32
    vae_dtype: torch.dtype = FP32
    budget: Budget = Budget(memory="max")  # ours
    checkpointing: bool = False  # diffusers' recomputation
    compared: bool = True  # False: diffusers is not built at all

    @property
    def forms(self) -> dict[str, tuple[str, ...]]:
        """The forms in which a GPU runs the step, by library, the cheapest first; see `start`."""
        unet = self.step.networks == ("unet",)
        ours = ("graph", "eager", "compiled") if unet else ("eager",)
        theirs = ("eager", "channels_last", "compiled") if unet else ("eager", "channels_last")
        return {"ours": ours} | ({"diffusers": theirs} if self.compared else {})


def official_cases(config: SVDConfig) -> dict[str, Case]:
    """The steps of train.py and sample.py as they run on a GPU, by name."""
    most, fast, balanced, low = (budget_of(mode, config.num_frames) for mode in MEMORY_MODES)
    return {
        "train_max": Case(TRAIN, config, BF16, budget=most),
        "train_fast": Case(TRAIN, config, BF16, budget=fast, compared=False),
        "train_balanced": Case(TRAIN, config, BF16, budget=balanced, checkpointing=True),
        "train_low": Case(TRAIN, config, BF16, budget=low, compared=False),
        "denoise": Case(DENOISE, config, BF16, budget=most),
        "encode": Case(ENCODE, config, BF16, budget=most),
        "encode_low": Case(ENCODE, config, BF16, budget=low, compared=False),
        "decode": Case(DECODE, config, BF16, budget=most),
        "decode_fast": Case(DECODE, config, BF16, budget=fast, compared=False),
        "decode_low": Case(DECODE, config, BF16, budget=low, compared=False),
        "sample": Case(SAMPLE, config, BF16, budget=low, compared=False),
    }


def timed_cases(config: SVDConfig) -> dict[str, Case]:
    """The cases that a GPU times, the most telling first: those of `official_cases` that repeat, and fp16."""
    cases = official_cases(config)
    cases["denoise_fp16"] = replace(cases["denoise"], dtype=FP16)
    cases["decode_fp16"] = replace(cases["decode"], vae_dtype=FP16)
    names = "train_max denoise train_balanced train_fast train_low encode decode decode_fast decode_low encode_low"
    names += " denoise_fp16 decode_fp16"
    return {name: cases[name] for name in names.split()}


def cpu_cases(config: SVDConfig) -> dict[str, tuple[Case, str]]:
    """Steps that a CPU finishes in seconds, each with our form of it.

    The UNet on latents of 16x16, and a tiny UNet on latents of 8x8, in fp32 and in bf16.
    """
    unet = replace(config.unet, model_channels=64, channel_mult=(1, 2), attention_resolutions=(2, 1))
    tiny, config = replace(config, size=(64, 64), unet=unet), replace(config, size=(128, 128))
    cases = {}
    for name, dtype in [("fp32", FP32), ("bf16", BF16)]:
        cases[f"tiny_train_{name}"] = Case(TRAIN, tiny, dtype), "eager"
        cases[f"tiny_train_compiled_{name}"] = Case(TRAIN, tiny, dtype), "compiled"
        cases[f"train_{name}"] = Case(TRAIN, config, dtype), "eager"
        cases[f"denoise_{name}"] = Case(DENOISE, config, dtype), "eager"
    return cases


# ---------------------------------------------------------------------------------------------- models


def skeleton(library: Library, case: Case) -> Model:
    """A model on the meta device, with only the networks that the step uses."""
    with torch.device("meta"):
        model = SVD(case.config) if library is SVD else Diffusers(case.config, case.checkpointing)
    for name, _ in list(model.named_children()):
        if name not in case.step.networks:
            model.release(name)
    if isinstance(model, SVD):
        model.use(case.budget)
    return model.requires_grad_(False).eval()


def random_weight(name: str, shape: torch.Size, dtype: torch.dtype, device: str) -> Tensor:
    """A weight that follows from its name: activations neither vanish nor explode under such weights."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    tensor = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return tensor.div_(shape[1:].numel() ** 0.5)


def empty_weight(name: str, shape: torch.Size, dtype: torch.dtype, device: str) -> Tensor:
    """A weight without values, for fake tensors: a generator needs the device to be there."""
    return torch.empty(shape, dtype=dtype, device=device)


def fill(
    model: Model,
    case: Case,
    device: str,
    weight: Callable[[str, torch.Size, torch.dtype, str], Tensor] = random_weight,
) -> Model:
    """Gives a skeleton weights by name, shape, precision and device, and returns it.

    The names are the same in both libraries. Ours have the memory format in which minimti loads them, those of
    diffusers the default.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, old in model.named_parameters():
            dtype = case.vae_dtype if name.startswith("vae.") else case.dtype
            tensor = weight(name, old.shape, dtype, device)
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
    z, h, w = config.vae.z_channels, height // config.vae.cell, width // config.vae.cell
    shapes = {
        "clip": (1, config.num_frames, 3, height, width),
        "clip_latents": (1, config.num_frames, z, h, w),
        "image": (1, 3, height, width),
        "image_latent": (1, 1, z, h, w),
        "tokens": (1, NUM_TOKENS, config.unet.context_dim),
    }
    return [torch.randn(shapes[name], device=device) for name in case.step.inputs]


def start(model: Model, case: Case, form: str, tensors: list[Tensor]) -> Callable[[], Tensor]:
    """The step of a case on its inputs, in a form.

    eager          as the library comes
    graph          ours, recorded once as a CUDA graph and replayed
    compiled       ours: by `--compile`; diffusers: channels_last, and its repeated blocks compiled
    channels_last  diffusers, with the weights of its 2D convolutions in this format, as its documentation advises

    Raises ValueError for a form that the library does not have.
    """
    if isinstance(model, Diffusers) and form in ("channels_last", "compiled"):
        model.speed_up(compiled=form == "compiled")
    elif isinstance(model, SVD) and form == "compiled":
        compile_unet(model.unet)
    elif form != "eager" and (form, type(model)) != ("graph", SVD):
        raise ValueError(f"{type(model).__name__} has no form {form!r}")
    step = case.step.prepare(model, *tensors)
    return graphed(step) if form == "graph" else step


def graphed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of a step, which is recorded here after two warm-up runs; a call replays it.

    Every call returns the same tensor, with new values. Raises RuntimeError where the step cannot be recorded.
    """
    graph, result = record(step)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _conditioning(config: SVDConfig, image: Tensor, tokens: Tensor) -> Conditioning:
    """One image latent [1, 1, z, h, w] for every frame, and the same tokens [1, N, d] in every set."""
    return Conditioning(
        concat=image.expand(-1, config.num_frames, -1, -1, -1),  # [1, F, z, h, w]
        micro=image.new_tensor([astuple(config.micro)]),  # [1, 3]
        spatial=_per_frame(config, tokens),
        temporal=tokens,
    )


def _per_frame(config: SVDConfig, tokens: Tensor) -> Tensor:
    """[1, N, d] -> [1, F, N, d]."""
    return tokens[:, None].expand(-1, config.num_frames, -1, -1)
