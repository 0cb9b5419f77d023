"""What the programs share: arguments and their types, what this machine is good for, how an error ends them."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import nn

from minimti.checkpoint.find import automatic
from minimti.checkpoint.load import Checkpoint, open_checkpoint
from minimti.config import MODELS, SVDConfig
from minimti.io.files import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """argparse, except that an error is one line; the usage is behind --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """An argument type: whole numbers from `minimum` to `maximum`."""
    return _within(int, minimum, maximum)


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """An argument type: numbers from `minimum` to `maximum`."""
    return _within(float, minimum, maximum)


def _within(kind: type, minimum: float, maximum: float) -> Callable:
    def parse(text: str) -> float:
        if not minimum <= (value := kind(text)) <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not in {minimum}..{maximum}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse's word for what it could not parse
    return parse


def size(text: str) -> tuple[int, int]:
    """An argument type: WIDTHxHEIGHT."""
    width, height = text.lower().split("x")
    return int(width), int(height)


def add_shared_arguments(parser: argparse.ArgumentParser, default_model: str, default_size: str) -> None:
    add = parser.add_argument
    auto = "auto (svd where it is here or there is a GPU, else tiny)"
    models = f"{auto}, {', '.join(MODELS)}, a .safetensors file, or a diffusers folder"
    add("--model", metavar="NAME|PATH", help=f"{models} (default: {default_model}auto)")
    add("--size", type=size, metavar="WxH", help=f"multiples of 64 pixels; cropped to (default: {default_size})")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="of every random number (default: %(default)s)")
    add("--device", default=default_device(), help="cuda, mps, cpu, ... (default here: %(default)s)")
    add("--dtype", choices=DTYPES, help="of UNet and CLIP tower (default: bfloat16 on cuda, else float32)")
    add("--vae-dtype", choices=DTYPES, default="float32", help="of the autoencoder (default: %(default)s)")
    compiled = "torch.compile the UNet to a single graph: minutes before the first step (default: on cuda)"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def device_and_dtype(device: str, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Raises InputError where the device does not exist here."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # NotImplementedError is one: meta cannot compute
        raise InputError(f"--device {device}: not available here; cpu always is") from error
    chosen = torch.device(device)
    return chosen, DTYPES[dtype or ("bfloat16" if chosen.type == "cuda" else "float32")]


def find_model(model: str, device: torch.device) -> Checkpoint:
    """The checkpoint that `--model` names. Raises InputError as `open_checkpoint` does."""
    checkpoint = open_checkpoint(automatic(device) if model == "auto" else model)
    if checkpoint.config.name == "tiny":
        print("note       tiny knows drawn sprites like those of examples/; for photographs and films: --model svd")
    return checkpoint


def bf16_speedup() -> float:
    """How many times faster than in fp32 this CPU multiplies matrices in bf16, measured; far below 1 where it only
    emulates that."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        runs = []
        for _ in range(5):
            began = time.perf_counter()
            a @ a
            runs.append(time.perf_counter() - began)
        seconds.append(min(runs))
    return seconds[0] / seconds[1]


def compile_if_asked(unet: nn.Module, asked: bool | None, device: torch.device) -> None:
    """Compiles in place. One graph for one shape: a break or another shape would be an error, not a slow surprise."""
    if device.type == "cuda" if asked is None else asked:
        unet.compile(fullgraph=True, dynamic=False)


def checked_size(size: tuple[int, int], config: SVDConfig) -> tuple[int, int]:
    """Raises InputError where the networks cannot halve such an image as often as they do."""
    if any(not 0 < length <= 8192 or length % config.size_multiple for length in size):
        raise InputError(f"--size {size[0]}x{size[1]}: width and height must be multiples of {config.size_multiple}")
    return size


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a program. Unusable input exits with 2, a failure with 1, an interrupt with 130, each with one line."""
    prog = sys.argv[0].rsplit("/", 1)[-1]
    try:
        with on_stop(_interrupt):
            main()
    except InputError as error:
        sys.exit(_say(prog, str(error), 2))
    except (FloatingPointError, torch.OutOfMemoryError, OSError) as error:
        sys.exit(_say(prog, str(error).splitlines()[0], 1))
    except KeyboardInterrupt:
        sys.exit(_say(prog, "interrupted", 130))
    sys.exit(0)


@contextmanager
def on_stop(handler: Callable, *also: signal.Signals) -> Iterator[None]:
    """Meanwhile a polite kill, a terminal that closes, and the signals named besides call the handler.

    Those that are ignored stay so: under nohup a program outlives its terminal.
    """
    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM), *also}  # Windows has no SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, old in before.items():
            if old != signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(*_) -> NoReturn:
    raise KeyboardInterrupt  # the others are treated like Ctrl-C


def _say(prog: str, message: str, code: int) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
