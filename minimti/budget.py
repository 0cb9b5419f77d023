"""Memory as a budget: what a step needs, and the fastest way to compute it that fits what is free.

All ways give the same result but for rounding. Needs are linear in the number of latent cells of a clip, F h w. The
bytes per cell are those of exact counts (bench/cost.py) at full size, rounded up; tests/test_budget.py compares them,
and the needs of training with what a GPU measured, but for "low", which no GPU has measured since it recomputes more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from minimti.config import MEMORY_MODES, SVDConfig
from minimti.io.files import InputError

if TYPE_CHECKING:
    from minimti.svd import SVD

GIB = 2**30
TRAIN = {"max": 310_000, "fast": 200_000, "balanced": 90_000, "low": 27_500}  # bytes per cell, 16 bits, 320 channels
DENOISE = {"max": 24_000, "fast": 24_000, "balanced": 16_000, "low": 8_000}
# Bytes per pixel, 32 bits, 128 channels. ENCODE: of one image, in "max" of several at once. DECODE: of a clip.
ENCODE = {"max": 19_600, "fast": 2_800, "balanced": 2_800, "low": 2_800}
DECODE = {"max": 3_600, "fast": 1_150, "balanced": 700, "low": 700}
DECODERS = {"max": "whole", "fast": "keep", "balanced": "twice", "low": "twice"}
UNFUSED = 1.3  # factor on TRAIN["max"] without the fused operators (networks/fused.py)
MARGIN = 1.05  # an allocator needs more than the sum of live tensors
RESERVE = 0.4 * GIB  # work space of libraries, views, and what small networks need besides
LEAST_CHANNELS = 160  # narrower networks need more per channel
# Seconds of a training step with SVD, 14 frames of 1024x576, bfloat16 (bench/results/).
SECONDS = {"NVIDIA H100 80GB HBM3": {"max": 0.299, "fast": 0.349, "balanced": 0.392}}


@dataclass(frozen=True)
class Budget:
    """Choices that trade memory for time. The defaults suit a CPU, where slices should fit its caches."""

    memory: str = "balanced"  # one of MEMORY_MODES: what a training step recomputes (networks/recompute.py)
    slice_bytes: int = 2**25  # hidden layer that a feed-forward computes at once
    in_turn: bool = False  # the two branches of guidance one after the other, not as one batch
    images_per_call: int = 1  # in the VAE's encoder
    decoder: str = "twice"  # "whole", or "keep" or "twice" of networks/lowmem_decode.py
    park: bool = True  # networks that wait are moved to the CPU
    needed: float = 0.0  # bytes, estimated; 0: no estimate was made
    available: int | None = None  # bytes that the process could use; None: unknown

    def describe(self) -> str:
        """One line for people, such as "max, about 43.9 of 78.2 GiB"."""
        of = "" if self.available is None else f" of {self.available / GIB:.1f}"
        return f"{self.memory}, about {self.needed / GIB:.1f}{of} GiB"


def plan(
    svd: "SVD",
    config: SVDConfig,
    num_frames: int,
    size: tuple[int, int],
    *,
    training: bool,
    memory: str = "auto",
    available: int | None,
    device: str,
) -> Budget:
    """The budget of an inversion (`training`) or of a sample.

    svd        its weights count; on the meta device it takes no memory itself
    size       (width, height) in pixels
    memory     "auto": the first of MEMORY_MODES that fits, most memory first; or one of them
    available  bytes that the process can use in all, its own included; None: unknown, then "auto" is "balanced"
    device     its type: "cuda", "cpu", ...

    Raises InputError if "auto" finds that not even "low" fits, ValueError for an unknown mode.
    """
    if memory not in ("auto", *MEMORY_MODES):
        raise ValueError(f"unknown memory mode {memory!r}: auto, {', '.join(MEMORY_MODES)}")
    if memory == "auto" and available is None:
        memory = "balanced"
    needs = {mode: _needed(svd, config, num_frames, size, mode, training, device) for mode in MEMORY_MODES}
    if memory == "auto":
        assert available is not None
        memory = next((mode for mode in MEMORY_MODES if needs[mode] <= available), "")
        if not memory:
            fitting = (
                f"--size {smaller[0]}x{smaller[1]}"
                for smaller in _smaller_sizes(size, config.size_multiple)
                if _needed(svd, config, num_frames, smaller, "low", training, device) <= available
            )
            raise InputError(
                f"{size[0]}x{size[1]} and {num_frames} frames need about {needs['low'] / GIB:.1f} GiB with the least"
                f" memory, and {available / GIB:.1f} are free; choose {next(fitting, 'a smaller model')}, or --memory"
                " low to try it"
            )
    return replace(budget_of(memory, num_frames, device), needed=needs[memory], available=available)


def _smaller_sizes(size: tuple[int, int], multiple: int) -> Iterator[tuple[int, int]]:
    """Sizes of the same shape, within a fifth, whose sides are multiples of a number, the largest first."""
    longer = max(size)
    for length in range(longer - multiple, 0, -multiple):
        width, height = (max(1, round(side * length / longer / multiple)) * multiple for side in size)
        if 0.8 < width / height * size[1] / size[0] < 1.25:
            yield width, height


def budget_of(memory: str, num_frames: int, device: str = "cuda") -> Budget:
    """The choices of a mode, one of MEMORY_MODES. On a CPU, feed-forwards are cut to fit its caches."""
    on_cpu = device == "cpu"
    return Budget(
        memory=memory,
        slice_bytes=2**25 if on_cpu else 2**28 if memory == "low" else 2**29,
        in_turn=memory == "low",
        images_per_call=min(7, num_frames) if memory == "max" and not on_cpu else 1,
        decoder=DECODERS[memory],
        park=memory != "max" and not on_cpu,
    )


def seconds_of_step(card: str, memory: str) -> float | None:
    """Seconds of a training step with SVD at its size in bfloat16; None where that has not been measured.

    card    the name of the device, as torch.cuda.get_device_name gives it
    memory  one of MEMORY_MODES
    """
    return next((modes.get(memory) for name, modes in SECONDS.items() if card.startswith(name)), None)


def _needed(
    svd: "SVD",
    config: SVDConfig,
    num_frames: int,
    size: tuple[int, int],
    mode: str,
    training: bool,
    device: str,
) -> float:
    """The peak in bytes: of loading, of the UNet and of the VAE, with the networks that are in memory at the time."""
    unet, vae, everything = (sum(p.nbytes for p in part.parameters()) for part in (svd.unet, svd.vae, svd))
    pixels = num_frames * size[0] * size[1]
    cells = pixels / config.vae.cell**2
    channels, ch = max(config.unet.model_channels, LEAST_CHANNELS) / 320, config.vae.ch / 128
    unfused = UNFUSED if mode == "max" and training and device != "cuda" else 1
    per_cell = (TRAIN if training else DENOISE)[mode] * unfused
    step = MARGIN * cells * _scaled(per_cell, channels, svd.unet, 2)
    coding = MARGIN * _scaled(ENCODE[mode], ch, svd.vae, 4) * size[0] * size[1]
    if not training:
        coding = max(coding, MARGIN * _scaled(DECODE[mode], ch, svd.vae, 4) * pixels)
    if mode == "max" or device == "cpu":  # nothing is parked
        return everything + max(step, coding) + RESERVE
    while_coding = unet + vae if training else vae  # a sample parks the UNet before it decodes
    return max(everything, unet + step, while_coding + coding) + RESERVE


def _scaled(count: float, channels: float, network: nn.Module, itemsize: int) -> float:
    """A count of bytes for a network of other width and precision than it was made for."""
    parameter = next(network.parameters(), None)  # None: released
    return count * channels * (parameter.element_size() if parameter is not None else itemsize) / itemsize
