"""What training and sampling cost, ours / diffusers:  python -m minimti.bench

Prices follow from shapes alone (price.py): the official size, bf16. Times are measured here, on the same weights and by
turns, so that a machine busy with something else slows both. A GPU is given the priced steps; a CPU, which would need
hours for those, the full-size UNet on a smaller clip. Where a step is called compiled, ours is, and theirs as it comes.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from minimti import cli, edm
from minimti.bench.cost import Price, price
from minimti.checkpoint.load import fill as fill_module
from minimti.checkpoint.load import memory_format
from minimti.config import SVDConfig, UNetConfig, VAEConfig
from minimti.invert import VIEWS
from minimti.motion import NUM_TOKENS
from minimti.networks.recompute import set_mode
from minimti.svd import GUIDANCE, SVD, Conditioning

EMULATED = 2  # bf16 products this many times slower than fp32 ones are not the hardware's own
BF16, FP32 = torch.bfloat16, torch.float32


def diffusers_unet(config: UNetConfig) -> nn.Module:
    """The class of diffusers with the sizes of ours, and the same names of tensors."""
    from diffusers import UNetSpatioTemporalConditionModel  # of the extra `test`: slow, and nobody else needs it

    attends = [2**level in config.attention_resolutions for level in range(len(config.channel_mult))]
    widths = [config.model_channels * mult for mult in config.channel_mult]
    return UNetSpatioTemporalConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=widths,
        down_block_types=[f"{'CrossAttn' * a}DownBlockSpatioTemporal" for a in attends],
        up_block_types=[f"{'CrossAttn' * a}UpBlockSpatioTemporal" for a in reversed(attends)],
        layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim,
        num_attention_heads=[width // config.num_head_channels for width in widths],
        addition_time_embed_dim=config.adm_in_channels // 3,
        projection_class_embeddings_input_dim=config.adm_in_channels,
    )


def diffusers_vae(config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder(
        down_block_types=["DownEncoderBlock2D"] * len(config.ch_mult),
        block_out_channels=[config.ch * mult for mult in config.ch_mult],
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        scaling_factor=config.scale_factor,
    )


class Diffusers(nn.Module):
    """The networks of diffusers behind the methods of our SVD."""

    def __init__(self, config: SVDConfig):
        super().__init__()
        self.config, self.unet, self.vae = config, diffusers_unet(config.unet), diffusers_vae(config.vae)

    def network(self, cond: Conditioning) -> edm.Network:
        """One set of tokens serves every frame and every position: the temporal one, zeros where there is none."""
        zeros = cond.temporal.new_zeros(len(cond.concat) - len(cond.temporal), *cond.temporal.shape[1:])
        tokens = torch.cat([zeros, cond.temporal]).to(self.unet.dtype)

        def F_theta(x: Tensor, c_noise: Tensor) -> Tensor:
            noisy = torch.cat([x, cond.concat], dim=2).to(self.unet.dtype)
            return self.unet(noisy, c_noise, tokens, cond.micro).sample.to(x.dtype)

        return F_theta

    def encode(self, clip: Tensor) -> Tensor:
        raw = self.vae.encode(clip[0].to(self.vae.dtype)).latent_dist.mode()
        return raw[None].to(clip.dtype) * self.config.vae.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        raw = (latents[0] / self.config.vae.scale_factor).to(self.vae.dtype)
        return self.vae.decode(raw, num_frames=len(raw)).sample[None].to(latents.dtype)


def train(svd: SVD | Diffusers, x0: Tensor, image: Tensor, tokens: Tensor) -> Tensor:
    """The gradient of the loss to the tokens [1, N, d]; x0 [1, F, z, h, w], image [1, 1, z, h, w]."""
    tokens = tokens.detach().requires_grad_()
    loss = edm.loss(svd.network(_conditioning(svd.config, image, tokens)), x0, x0.new_ones(1), torch.randn_like(x0))
    loss.backward()
    return tokens.grad


@torch.no_grad()
def denoise(svd: SVD | Diffusers, x: Tensor, image: Tensor, tokens: Tensor) -> Tensor:
    """One estimate of x0 with guidance; shapes as of `train`."""
    cond = _conditioning(svd.config, image, tokens)
    both = svd.network(cond.negative().beside(cond))
    negative, positive = edm.denoise(both, torch.cat([x, x]), x.new_ones(2)).chunk(2)
    return edm.guide(negative, positive, edm.guidance_scale(1.0, 3.0, x.shape[1]).to(x))


@torch.no_grad()
def encode(svd: SVD | Diffusers, clip: Tensor) -> Tensor:
    return svd.encode(clip)


@torch.no_grad()
def decode(svd: SVD | Diffusers, latents: Tensor) -> Tensor:
    return svd.decode(latents)


def sample(svd: SVD, pixels: Tensor, tokens: Tensor) -> Tensor:
    """What sample.py does after loading, in a single step of its solver: pixels [1, 3, H, W], tokens [1, N, d]."""
    config = svd.config
    with torch.no_grad():
        del svd.image_encoder
        sets = tokens[:, None].expand(-1, config.num_frames, -1, -1), tokens
        cond = svd.prepare(pixels, sets, config.micro, torch.Generator())
        x = next(svd.sample(cond, torch.randn_like(cond.concat), 1, GUIDANCE))
        del svd.unet
        return svd.decode(x)


def _conditioning(config: SVDConfig, image: Tensor, tokens: Tensor) -> Conditioning:
    """The same image for every frame and the same tokens for all sets."""
    micro = image.new_tensor([list(asdict(config.micro).values())])
    spatial = tokens[:, None].expand(-1, config.num_frames, -1, -1)
    return Conditioning(image.expand(-1, config.num_frames, -1, -1, -1), micro, spatial, tokens)


@dataclass(frozen=True)
class Case:
    step: Callable[..., Tensor]  # one of those above
    config: SVDConfig
    dtype: torch.dtype  # of the UNet and the CLIP tower; the inputs are fp32
    mode: str | None = None  # of memory.py
    checkpointing: bool | None = False  # of diffusers; None: leave diffusers out
    vae_dtype: torch.dtype = FP32
    compiled: bool = False  # our UNet, when timed

    @property
    def unneeded(self) -> tuple[str, ...]:
        """Networks that the step does without."""
        return {train: ("vae", "image_encoder"), denoise: ("vae", "image_encoder"), sample: ()}.get(
            self.step, ("unet", "image_encoder")
        )


def official_cases(config: SVDConfig) -> dict[str, Case]:
    """The steps of training and sampling, as train.py and sample.py do them on a GPU."""
    return {
        "train_fast": Case(train, config, BF16, "fast"),
        "train_balanced": Case(train, config, BF16, "balanced", checkpointing=True),
        "train_low": Case(train, config, BF16, "low", checkpointing=None),
        "denoise": Case(denoise, config, BF16),
        "encode": Case(encode, config, BF16),
        "decode": Case(decode, config, BF16),
        "decode_bf16": Case(decode, config, BF16, vae_dtype=BF16),
        "sample": Case(sample, config, BF16, checkpointing=None),
    }


def cpu_cases(config: SVDConfig) -> dict[str, Case]:
    """The UNet on latents of 16x16 and a tiny one on 8x8; without bf16 where the processor has none."""
    unet = replace(config.unet, model_channels=64, channel_mult=(1, 2), attention_resolutions=(2, 1))
    tiny, config = replace(config, size=(64, 64), unet=unet), replace(config, size=(128, 128))
    dtypes = {"fp32": FP32}
    if multiplies_bf16():
        dtypes["bf16"] = BF16
    else:
        print("no times in bf16: this processor only emulates it", file=sys.stderr)
    found = {}
    for name, dtype in dtypes.items():
        found[f"tiny_train_{name}"] = Case(train, tiny, dtype)
        found[f"tiny_train_compiled_{name}"] = Case(train, tiny, dtype, compiled=True)
        found[f"train_{name}"] = Case(train, config, dtype)
        found[f"denoise_{name}"] = Case(denoise, config, dtype)
    return found


def multiplies_bf16() -> bool:
    """Whether the CPU does so itself, judged by its pace."""
    return EMULATED * cli.bf16_speedup() > 1


def skeletons(case: Case) -> tuple[SVD, Diffusers]:
    """Both on the meta device, with nothing but the networks that the case needs."""
    with torch.device("meta"):
        ours, theirs = SVD(case.config), Diffusers(case.config)
    for svd in (ours, theirs):
        for name in case.unneeded:
            if hasattr(svd, name):
                delattr(svd, name)
        svd.requires_grad_(False).eval()
    set_mode(ours, case.mode)
    if case.checkpointing:
        theirs.unet.enable_gradient_checkpointing()
    return ours, theirs


def fill(networks: Sequence[SVD | Diffusers], case: Case, device: str) -> None:
    """Gives all of them the same random weights, such that activations neither vanish nor explode.

    Each in the layout it loads its own in: ours with channels innermost.
    """
    tensors = {}
    for name, old in networks[0].named_parameters():
        dtype = case.vae_dtype if name.startswith("vae.") else case.dtype
        tensors[name] = torch.randn(old.shape, dtype=dtype, device=device).div_(old.shape[1:].numel() ** 0.5)
    for svd in networks:
        if isinstance(svd, SVD):
            laid_out = ((name, tensor.to(memory_format=memory_format(tensor))) for name, tensor in tensors.items())
            fill_module(svd, laid_out)
        else:
            svd.load_state_dict(tensors, assign=True)


def inputs(case: Case, device: str) -> list[Tensor]:
    config = case.config
    width, height = config.size
    pixels = 1, config.num_frames, 3, height, width
    first = 1, 3, height, width
    scale = 2 ** (len(config.vae.ch_mult) - 1)
    clip, image = ((1, n, config.vae.z_channels, height // scale, width // scale) for n in (config.num_frames, 1))
    tokens = 1, NUM_TOKENS, config.unet.context_dim
    shapes = {encode: (pixels,), decode: (clip,), sample: (first, tokens)}.get(case.step, (clip, image, tokens))
    return [torch.randn(shape, device=device) for shape in shapes]


def prices(cases: dict[str, Case]) -> dict[str, tuple[Price, Price | None]]:
    """Of every step, ours and theirs; and of `encode`, what it comes to per iteration of train.py."""
    found = {}
    for name, case in cases.items():
        print(f"pricing {name}", file=sys.stderr)
        ours, theirs = skeletons(case)
        found[name] = _price(case, ours), None if case.checkpointing is None else _price(case, theirs)
    clip, config = found["encode"][0], cases["encode"].config
    # Views are encoded once, iterations share them; the conditioning image is one frame more.
    share = VIEWS / config.num_iterations * (config.num_frames + 1) / config.num_frames
    found["encode_per_step"] = replace(clip, tflop=clip.tflop * share, traffic_tb=clip.traffic_tb * share), None
    return found


def _price(case: Case, svd: SVD | Diffusers) -> Price:
    def build() -> tuple[nn.Module | Tensor, ...]:
        fill([svd], case, "cpu")
        return svd, *inputs(case, "cpu")

    return price(build, case.step)


def clock(case: Case, device: str, repeats: int) -> dict[str, float | None]:
    """Median seconds, peak GiB (of CUDA), and the ratios theirs / ours of runs by turns; None where there are none."""
    both, tensors = skeletons(case), inputs(case, device)
    fill(both, case, device)
    if case.compiled:
        cli.compile_if_asked(both[0].unet, True, torch.device(device))
    steps = {who: partial(case.step, svd, *tensors) for who, svd in zip(("ours", "diffusers"), both)}
    if case.checkpointing is None:
        del steps["diffusers"]
    for who, step in list(steps.items()):
        try:
            step()  # compiles, chooses kernels, takes memory from the system: done once
        except torch.OutOfMemoryError:
            print(f"  {who}: not enough memory", file=sys.stderr)
            del steps[who]
        torch.cuda.empty_cache()
    runs = [{who: _measure(step, device) for who, step in steps.items()} for _ in range(repeats)]
    keys = ("ours_s", "diffusers_s", "ours_gib", "diffusers_gib", "ratio", "ratio_min", "ratio_max")
    found = dict.fromkeys(keys)
    for who in steps:
        found[f"{who}_s"] = statistics.median(run[who][0] for run in runs)
        found[f"{who}_gib"] = runs[-1][who][1]
    if len(steps) == 2:
        ratios = [run["diffusers"][0] / run["ours"][0] for run in runs]
        found |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return found


def _measure(step: Callable[[], Tensor], device: str) -> tuple[float, float | None]:
    """Seconds, and the peak of allocated GiB on CUDA."""
    if device == "cpu":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began, None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() / 2**30


def table(prices: dict[str, tuple[Price, Price | None]], times: dict[str, dict[str, float | None]]) -> str:
    """Markdown with aligned columns, ours / theirs."""
    rows = [["step", "peak GiB", "TFLOP", "TB moved", "A100 s, at least", "s here", "GiB here", "diffusers : ours"]]
    for name in prices | times:
        priced, timed = prices.get(name, ()), times.get(name, {})
        row = [name]
        for field, digits in (("peak_gib", 2), ("tflop", 2), ("traffic_tb", 3), ("roofline_s", 3)):
            row.append(_cell([getattr(found, field, None) for found in priced], digits))
        row += [_cell([timed.get(f"{who}_{unit}") for who in ("ours", "diffusers")], 3) for unit in ("s", "gib")]
        compared = timed.get("ratio") is not None
        row.append("{ratio:.2f} ({ratio_min:.2f}..{ratio_max:.2f})".format(**timed) if compared else "-")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def _cell(values: list[float | None], digits: int) -> str:
    known = any(value is not None for value in values)
    return " / ".join("-" if v is None else f"{v:.{digits}f}" for v in values) if known else "-"
