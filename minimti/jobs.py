"""A function of many arguments, called in several processes."""

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from os import cpu_count
from pickle import PicklingError
from typing import Any

import torch

from minimti import signals


def in_processes(function: Callable, arguments: Sequence[tuple], jobs: int) -> Generator[Any]:
    """Yields `function(*each)` of the arguments, in the order in which the results come; each process shares the cores.

    With one job this process calls the function itself. What the function raises is raised here, and ChildProcessError
    where a process was killed. A signal is raised while this waits for a result. All processes end with the generator:
    close it where not all results are taken.
    """
    if jobs < 2:
        yield from (function(*each) for each in arguments)
        return

    def interrupt(number: int, _: object) -> None:
        raise signals.Interrupted(number)

    context, processes = get_context("spawn"), []
    connections: list[Connection] = []
    threads = max((cpu_count() or 1) // jobs, 1)
    left = iter(arguments)
    try:
        for each in islice(left, jobs):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(function, theirs, threads), daemon=True))
            processes[-1].start()
            theirs.close()  # so that an end of the process is an end of the connection
            with _end_explained():
                ours.send(each)
            connections.append(ours)
        while connections:
            with signals.handled(interrupt):
                ready = wait(connections)
            for ours in [connection for connection in connections if connection in ready]:
                with _end_explained():
                    result = ours.recv()
                if isinstance(result, Exception):
                    raise result
                if (following := next(left, None)) is not None:
                    with _end_explained():
                        ours.send(following)
                else:
                    connections.remove(ours)
                yield result
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextmanager
def _end_explained() -> Iterator[None]:
    """The end of the process at the other end of a connection as a ChildProcessError."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise ChildProcessError("a process of --jobs was killed: there may be too little memory") from None


def _work(function: Callable, connection: Connection, threads: int) -> None:
    """What a process does: answers arguments with results, until there are no more or its parent has ended."""
    for number in signals.STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup
            signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError):
        while True:
            each = connection.recv()
            try:
                result = function(*each)
            except Exception as error:
                result = error
            try:
                connection.send(result)
            except (PicklingError, TypeError, AttributeError):  # an exception that cannot be pickled
                connection.send(RuntimeError(repr(result)))
