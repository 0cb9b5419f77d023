"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP (a terminal that closes) do to a program.

Mostly they end it at once, in one line. An exception would not do: raised while a module is imported, in a destructor
or in a callback from C, it becomes a traceback or is lost. Nothing has to be tidied up: locks end with the process, and
what must be whole is written under `held`.

This module imports nothing slow: the programs install `end` before they import anything else.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: no HUP


class Interrupted(KeyboardInterrupt):
    """A signal that came within `held`."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


def program() -> str:
    """The name of the program that runs, such as train.py; of a package, such as evaluate, its own."""
    folder, name = os.path.split(sys.argv[0])
    return os.path.basename(folder) if name == "__main__.py" else name


def end(number: int, _: Any = None) -> NoReturn:
    """A handler: ends the process with one line on stderr and the exit code 128 + number."""
    with suppress(Exception):  # also where the signal came amid a write to the same stream
        sys.stdout.flush()
    ignore()
    start = "\n" if os.isatty(2) else ""  # the cursor may be behind a progress bar or behind ^C
    with suppress(OSError):
        os.write(2, os.fsencode(f"{start}{program()}: error: interrupted\n"))
    os._exit(128 + number)


def ignore() -> None:
    """From here on no signal has an effect."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def install(handler: Callable[[int, Any], Any]) -> None:
    """Calls the handler on each of the signals that is not ignored: under nohup a program outlives its terminal.

    A handler that was not installed from Python (None) stays too, since it could not be given back.
    """
    for number in STOPS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, handler)


@contextmanager
def handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """`install` within a block, and what was there before after it.

    Only the main thread receives signals and may install handlers; in another one the block is all there is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        install(handler)
        yield
    finally:
        for number, old in reversed(before.items()):  # SIGINT last: Python's handler raises, which ends this loop
            if old is not None:
                signal.signal(number, old)


@contextmanager
def held(agree: Callable[[bool], bool] = bool) -> Iterator[Callable[[], None]]:
    """Holds signals back within the block. The yielded function raises Interrupted if one has come.

    At the end of the block those that came are raised again, but not after an error: its message must not be lost.
    Where several processes work together, `agree` (Ranks.any) makes a signal to one of them stop all at the same call.
    """
    came: list[int] = []

    def check() -> None:
        if agree(bool(came)):
            raise Interrupted(came[0] if came else signal.SIGTERM)

    with handled(lambda number, _: came.append(number)):
        yield check
    for number in came:
        signal.raise_signal(number)
