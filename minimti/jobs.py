"""A function of many arguments, called in several processes."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from os import cpu_count
from typing import Any

import torch

from minimti import signals


def in_processes(function: Callable, arguments: Sequence[tuple], jobs: int) -> Iterator[Any]:
    """Yields `function(*each)` of the arguments, in the order in which the results come; each process shares the cores.

    With one job this process calls the function itself. What the function raises is raised here, and RuntimeError where
    a process was killed. All processes end with the generator.
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
    with signals.handled(interrupt):
        try:
            for each in islice(left, jobs):
                ours, theirs = context.Pipe()
                processes.append(context.Process(target=_work, args=(function, theirs, threads), daemon=True))
                processes[-1].start()
                theirs.close()  # so that an end of the process is an end of the connection
                ours.send(each)
                connections.append(ours)
            while connections:
                ready = wait(connections)
                for ours in [connection for connection in connections if connection in ready]:
                    try:
                        result = ours.recv()
                    except (EOFError, ConnectionError):
                        raise RuntimeError("a process of --jobs was killed: there may be too little memory") from None
                    if isinstance(result, Exception):
                        raise result
                    if (following := next(left, None)) is not None:
                        ours.send(following)
                    else:
                        connections.remove(ours)
                    yield result
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()


def _work(function: Callable, connection: Connection, threads: int) -> None:
    """What a process does: answers arguments with results, until there are no more or its parent has ended."""
    for number in signals.STOPS:
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError):
        while True:
            each = connection.recv()
            try:
                result = function(*each)
            except Exception as error:
                result = error
            connection.send(result)
