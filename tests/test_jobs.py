"""A function in several processes: every argument once, errors raised, nothing left behind."""

import multiprocessing
import os
import signal

import pytest
import torch

from minimti.jobs import in_processes


def double(number: int) -> tuple[int, int, int]:
    return 2 * number, os.getpid(), torch.get_num_threads()


def fail(number: int) -> None:
    raise ValueError(f"of {number}")


class Odd(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


def fail_oddly(number: int) -> None:
    raise Odd("of 1")


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_job_is_this_process():
    assert [(result, pid) for result, pid, _ in in_processes(double, [(1,), (2,)], 1)] == [
        (2, os.getpid()),
        (4, os.getpid()),
    ]


def test_processes_share_arguments_and_cores():
    results = [*in_processes(double, [(k,) for k in range(5)], 2)]
    assert sorted(result for result, *_ in results) == [0, 2, 4, 6, 8]
    assert os.getpid() not in {pid for _, pid, _ in results}
    assert {threads for *_, threads in results} == {max(os.cpu_count() // 2, 1)}


@pytest.mark.full
@pytest.mark.parametrize(
    "function, error, said",
    [(fail, ValueError, "of 1"), (fail_oddly, RuntimeError, "of 1"), (die, ChildProcessError, "was killed")],
)
def test_what_goes_wrong_in_a_process_is_raised(function, error, said):
    with pytest.raises(error, match=said):
        [*in_processes(function, [(1,), (1,)], 2)]
    assert not multiprocessing.active_children()


def test_no_arguments_are_no_results():
    assert [*in_processes(double, [], 2)] == []
