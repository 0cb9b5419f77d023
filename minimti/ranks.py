"""The processes of torchrun. Each of them, a rank, runs the whole program; the methods here synchronise them.

They exchange numbers by gloo through the CPU's memory: on every device alike, a few hundred kB in a step.
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from minimti.io.files import InputError


@dataclass(frozen=True)
class Ranks:
    """One of the processes of torchrun, the current one; by default there is no other."""

    rank: int = 0  # its number
    count: int = 1  # processes
    local: int = 0  # its number on this machine

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, and writes what all have made together."""
        return self.rank == 0

    def device(self, asked: str | None) -> str | None:
        """The device to compute on; under torchrun, where cuda is named or the default, a GPU for each process."""
        if self.count > 1 and asked in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return asked

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within the block only the first process prints to stdout and shows warnings."""
        if self.is_first:
            yield
            return
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Connects the processes within the block. The methods below need it where there are several.

        They return when every process has called them, and raise OSError where another one has ended.
        """
        if self.count == 1:
            yield
            return
        with _explained():  # some may have much more to do than others before they meet
            distributed.init_process_group("gloo", timeout=timedelta(days=7))
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def mean(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The means of fp32 tensors over the processes, by one all-reduce; NaN where one process has NaN.

        The call waits for the device.
        """
        if self.count == 1:
            return tensors
        numbers = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
        with _explained():
            distributed.all_reduce(numbers)
        parts = (numbers / self.count).split([tensor.numel() for tensor in tensors])
        return tuple(part.to(tensor.device).view_as(tensor) for part, tensor in zip(parts, tensors))

    def any(self, flag: bool) -> bool:
        """Whether the flag of any process is set."""
        if self.count == 1:
            return flag
        number = torch.tensor(float(flag))
        with _explained():
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return bool(number)

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.any(False)


ALONE = Ranks()


def of_torchrun(environment: Mapping[str, str]) -> Ranks:
    """What RANK, WORLD_SIZE and LOCAL_RANK say; ALONE where they are missing. Raises InputError for other texts."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in environment for name in names):
        return ALONE
    texts = [environment[name] for name in names]
    if not all(text.isdecimal() and len(text) < 8 for text in texts) or not int(texts[0]) < int(texts[1]):
        said = ", ".join(f"{name}={text}" for name, text in zip(names, texts))
        raise InputError(f"{said}: are not those of torchrun; unset them to run one process")
    return Ranks(*map(int, texts))


@contextmanager
def _explained() -> Iterator[None]:
    """An error of the connection as one line: it follows from an error of another process, which prints its own."""
    try:
        yield
    except RuntimeError as error:
        raise OSError("another process of torchrun has ended; its message gives the reason") from error
