"""What the programs share: arguments and their types, progress bars, and how an error ends a program.

Nothing here imports PyTorch, which takes seconds: `--help` and a misspelt option are answered at once.
"""

import argparse
import atexit
import os
import re
import signal
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from minimti import __version__, signals
from minimti.config import DTYPES, FITS, MEMORY_MODES, MODELS, printable
from minimti.io.files import DiskFull, InputError

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from minimti.checkpoint.load import Checkpoint
    from minimti.config import SVDConfig
    from minimti.motion import Motion
    from minimti.pipeline import Progress
    from minimti.svd import SVD


class Parser(argparse.ArgumentParser):
    """argparse, except that an error is one line that points to --help; every program has --version."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--version", action="version", version=f"minimti {__version__}")

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, _line(self.prog, "error", f"{message} (see {self.prog} --help)") + "\n")


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

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse puts the name into its error message
    return parse


def name(text: str) -> str:
    """An argument type: the name of a file or folder, which the empty text of an unset variable is not."""
    if not text:
        raise argparse.ArgumentTypeError("a name is empty")
    return text


def arguments() -> list[str]:
    """The arguments of the command line without "--"; names behind it that begin with a hyphen get "./" in front.

    `parse_intermixed_args` does not take "--", and no option could be appended to a command that has it.
    """
    given = sys.argv[1:]
    if "--" not in given:
        return given
    at = given.index("--")
    return given[:at] + [as_file(name) for name in given[at + 1 :]]


def as_file(name: str) -> str:
    """A name of a file that does not look like an option."""
    return f"./{name}" if name.startswith("-") else name


def size(text: str) -> tuple[int, int]:
    """An argument type: WIDTHxHEIGHT."""
    width, height = text.lower().split("x")
    return int(width), int(height)


def seconds(text: str) -> float:
    """An argument type: a time as 3.5, 0:03.5 or 1:02:03.5, at most a million seconds."""
    *whole, last = text.split(":")
    if len(whole) > 2 or not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", last) or not all(map(str.isdecimal, whole)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 3.5, 0:03.5 or 1:02:03.5")
    total = 0.0
    for part in (*whole, last):
        total = 60 * total + float(part)
    if total > 1e6:
        raise argparse.ArgumentTypeError(f"{text} is more than a million seconds")
    return total


def add_fit_arguments(add: Callable, size_help: str) -> None:
    """The arguments --size, --fit and --crop-center, for clips and images alike."""
    how = "crop: cut off what sticks out; pad: add bars, which results do not show; stretch (default: crop)"
    add("--size", type=size, metavar="WxH", help=size_help)
    add("--fit", choices=FITS, default="crop", help=how)
    center = "which part a crop takes: 0 0 is the top left, 1 1 the bottom right (default: 0.5 0.5)"
    add("--crop-center", type=number(0, 1), nargs=2, default=(0.5, 0.5), metavar=("X", "Y"), help=center)


def add_seed(group: "argparse._ArgumentGroup") -> None:
    """The argument --seed."""
    group.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="for all random draws (default: 0)")


def add_model_arguments(parser: argparse.ArgumentParser, default_model: str) -> None:
    """The group "model and machine"."""
    group = parser.add_argument_group("model and machine")
    add = group.add_argument
    auto = "auto (official weights that are here, svd on cuda, else tiny)"
    models = f"{auto}, {', '.join(MODELS)}, a .safetensors file, or a diffusers folder"
    add("--model", metavar="NAME|PATH", help=f"{models} (default: {default_model})")
    revision = "commit, branch or tag of an official model; weights/ is then not searched (default: main)"
    add("--revision", metavar="NAME", help=revision)
    add("--device", help="cuda, mps, cpu, ... (default: cuda or mps where there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="precision of UNet and image encoder (default: bfloat16 on cuda, else float32)")
    memory = "how much to take; more is faster, the result is the same (default: auto, the fastest way that fits)"
    add("--memory", choices=("auto", *MEMORY_MODES), default="auto", help=memory)


def add_advanced_arguments(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """The group "advanced". Returns it, for the program's own arguments of the kind."""
    group = parser.add_argument_group("advanced")
    add = group.add_argument
    add("--vae-dtype", choices=DTYPES, default="float32", help="precision of the autoencoder (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the UNet's transformers: most of a minute at first")
    return group


def overridden(settings: Any, **values: Any) -> Any:
    """A dataclass in which the values that are not None take the place of its own."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def choose_model(args: argparse.Namespace, model: str | None) -> "tuple[str, SVDConfig, torch.device]":
    """The name or path of a model (None: "auto"), its configuration, and the device of --device. Raises InputError.

    Downloads nothing, so unsuitable arguments are refused before a download.
    """
    import torch

    from minimti import pipeline
    from minimti.checkpoint.load import configuration

    device = pipeline.check_device(args.device or pipeline.default_device())
    if device.type == "cuda":  # the memory that the bars show is that of the current one
        torch.cuda.set_device(device)
    model = pipeline.automatic(device) if model is None or model == "auto" else model
    return model, configuration(model, args.revision), device


def find_model(args: argparse.Namespace, model: str) -> "Checkpoint":
    """The checkpoint of a model that was chosen, downloaded where it is not here; prints its revision and its note."""
    from minimti.checkpoint.load import open_checkpoint

    checkpoint = open_checkpoint(model, args.revision)
    if checkpoint.revision:
        print(f"revision   {checkpoint.revision}")
    if checkpoint.config.note:
        print(f"note       {checkpoint.config.note}")
    return checkpoint


def model_of(args: argparse.Namespace, emb: str, motion: "Motion") -> str:
    """The model of --model, else the one that the embedding `emb` names. Raises InputError for an unknown name."""
    if args.model is None and motion.model not in MODELS:
        raise InputError(f"{emb}: made with a model called {motion.model!r}; pass its file or folder as --model")
    return motion.model if args.model is None else args.model


def note_unfinished(emb: str, motion: "Motion") -> None:
    """Prints a note about the embedding `emb` where its run has not taken all of its steps."""
    if motion.unfinished:
        print(f"note       {printable(emb)}: is unfinished, after {motion.unfinished} steps")


def load_model(
    args: argparse.Namespace, checkpoint: "Checkpoint", device: "torch.device", image_encoder: bool = True
) -> "SVD":
    """Loads a model as --dtype, --vae-dtype and --compile say, and prints a line; `image_encoder` as for `load`."""
    import torch

    from minimti import pipeline

    dtype = args.dtype and getattr(torch, args.dtype)
    dtypes = {"dtype": dtype, "vae_dtype": getattr(torch, args.vae_dtype)}
    began = time.perf_counter()
    svd = pipeline.load(checkpoint, device=device, image_encoder=image_encoder, **dtypes)
    seconds = time.perf_counter() - began
    if args.compile:
        pipeline.compile_unet(svd.unet)
    _loaded.append(weakref.ref(svd))
    print(f"model      {svd.config.name} from {checkpoint.path}, {svd.dtype} on {device}, {seconds:.1f} s")
    return svd


_loaded: deque["weakref.ref[SVD]"] = deque(maxlen=1)  # the last model: its budget says what to try when memory runs out


class Bars:
    """The `progress` of `learn` and `animate`: a bar with step, mean of the last losses, s/it, time left, peak memory.

    Where stderr is no terminal, such as a log, it is a line every few percent instead.
    """

    LABELS = {"encode": "encoding", "learn": "inversion"}
    TEXT = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"
    LINES = 20  # lines of a stage in a log, at most
    SECONDS = 2.0  # between two lines of "sample", which a score is too, at least; the last line always comes

    def __init__(self, label: str = ""):
        self.label, self.stage = label, ""  # the label of stages that have none of their own
        self.first, self.step, self.began = 0, 0, 0.0  # in this stage: steps done before, steps done, time
        self.printed = 0.0  # the time of the last line
        self.called = time.perf_counter()  # the time of the last call
        self.bar: tqdm | None = None
        self.losses: deque[float] = deque(maxlen=50)

    def __call__(self, progress: "Progress") -> None:
        """Moves the bar of the stage, or begins it."""
        if progress.stage != self.stage:
            self._begin(progress)
        assert self.bar is not None
        before, self.step = self.step, progress.step
        if progress.loss is not None:
            self.losses.append(progress.loss)
        if not self.bar.disable:
            self.bar.set_postfix_str(self._postfix(), refresh=False)
            self.bar.update(self.step - before)
        elif self._is_due(before, progress.steps):
            print(self._line(progress.steps), file=sys.stderr, flush=True)
            self.printed = time.perf_counter()
        self.called = time.perf_counter()

    def close(self) -> None:
        """Ends the bar of the current stage."""
        if self.bar is not None:
            self.bar.close()

    def _begin(self, progress: "Progress") -> None:
        from tqdm import tqdm

        self.close()
        # "learn" reports where it starts, which is not 0 where a run is resumed; the others report a step done
        reports_start = progress.stage == "learn"
        self.stage, self.began = progress.stage, time.perf_counter() if reports_start else self.called
        self.printed = self.began
        self.first = self.step = progress.step - (not reports_start)
        self.bar = tqdm(
            total=progress.steps,
            initial=self.first,
            desc=self._label(),
            bar_format="{l_bar}{bar}| " + self.TEXT,
            leave=self.stage != "encode",
            disable=None,  # where stderr is no terminal
            **_screen(),
        )
        if not self.bar.disable:
            self.bar.start_t -= time.perf_counter() - self.began

    def _is_due(self, before: int, steps: int) -> bool:
        """Whether a log gets a line after the step, of `steps`, that followed `before`."""
        passed = self.LINES * self.step // max(steps, 1) > self.LINES * before // max(steps, 1)
        is_time = self.stage != "sample" or time.perf_counter() - self.printed >= self.SECONDS
        return passed and (is_time or self.step == steps)

    def _label(self) -> str:
        return self.LABELS.get(self.stage, self.label)

    def _line(self, steps: int) -> str:
        from tqdm import tqdm

        elapsed, text = time.perf_counter() - self.began, "{desc}: " + self.TEXT
        numbers = {"initial": self.first, "prefix": self._label(), "postfix": self._postfix()}
        return tqdm.format_meter(self.step, steps, elapsed, bar_format=text, **numbers)

    def _postfix(self) -> str:
        loss = [f"loss={sum(self.losses) / len(self.losses):.4f}"] if self.losses else []
        peak = peak_memory()
        return ", ".join(loss + ([f"peak {peak / 2**30:.1f} GiB"] if peak else []))


def _screen() -> dict[str, int]:
    """The columns and rows that a bar supposes where the terminal gives none, as in some containers, for tqdm."""
    try:
        return {} if all(os.get_terminal_size(sys.stderr.fileno())) else {"ncols": 80, "nrows": 24}
    except (OSError, ValueError):  # no terminal
        return {}


def peak_memory() -> int | None:
    """The most memory in bytes that this process has held so far: on the GPU where it has used one, else its own.

    On a GPU since a step was recorded, if one was (networks/graph.py). None where the system does not tell (Windows).
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a program. Unusable input exits with 2, a failure with 1, a signal with 128 + its number, each in a line.

    The program goes on when the reader of its output has gone.
    """
    # At exit Python restores the default handlers, which kill without a line. Ignored signals stay ignored.
    atexit.register(signals.ignore)
    with _lasting_output():
        sys.exit(_exit_code(main))


def _exit_code(main: Callable[[], None]) -> int:
    warnings.showwarning = lambda message, *_: _print_line("warning", str(message))
    try:
        with signals.handled(signals.end):
            main()
    except InputError as error:
        _print_line("error", str(error))
        return 1 if isinstance(error, DiskFull) else 2
    except (FloatingPointError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = _is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _print_line("error", f"out of memory: try {_smaller()} ({reason})" if out_of_memory else reason)
        return 1
    except KeyboardInterrupt as stop:
        signals.end(getattr(stop, "number", signal.SIGINT))
    return 0


class _Lasting:
    """A text stream that drops what nobody can read any more, and writes what its encoding lacks as escapes."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # None where the descriptor was closed before the start

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        with suppress(OSError, ValueError):  # a pipe's reader has ended, a disk is full, the stream was closed
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _lasting_output() -> Iterator[None]:
    out, error = (cast(TextIO, _Lasting(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(error):
        try:
            yield
        finally:
            out.flush()
            error.flush()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a card, Apple's GPU, the CPU's allocator or Python has no more memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in words)


def _smaller() -> str:
    """The next smaller settings of the program that runs."""
    others = {"pretrain": "a smaller --batch", "evaluate": "fewer --jobs", "bench": "other --cases"}
    if (program := signals.program()) in others:
        return others[program]
    svd = _loaded[0]() if _loaded else None
    modes = MEMORY_MODES[MEMORY_MODES.index(svd.budget.memory) + 1 :] if svd else MEMORY_MODES[-1:]
    sizes = ["a smaller --size", "fewer --frames"]
    sizes = {"sample.py": sizes[:1], "score.py": []}.get(program, sizes)  # an embedding gives the others
    return " or ".join([*(f"--memory {mode}" for mode in modes[:1]), *sizes] or ["--device cpu"])


def _print_line(kind: str, message: str) -> None:
    print(_line(signals.program(), kind, message), file=sys.stderr)


def _line(prog: str, kind: str, message: str) -> str:
    return printable(f"{prog}: {kind}: {' '.join(message.split())}")
