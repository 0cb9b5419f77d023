"""What the fuzz tests of this folder share: seeds, budgets, guards, mutations of bytes, and odd values.

MINIMTI_FUZZ_SECONDS is the budget of each test, MINIMTI_FUZZ_SEED gives other cases. Memory is measured on Linux.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minimti.io.files import InputError

SEED = int(os.environ.get("MINIMTI_FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("MINIMTI_FUZZ_SECONDS", "30"))
CASE_SECONDS, CASE_BYTES = 10, 2**30


class TooSlowError(BaseException):
    """No Exception: loaders turn every one of those into an InputError."""


def fuzz(case: Callable[[random.Random], object]) -> None:
    """Runs cases until the budget is spent and prints how they ended.

    The random numbers of a case follow from the seed and its number. A case is right if it returns, or raises
    InputError with a message of one printable line, within CASE_SECONDS and CASE_BYTES.
    """
    ends: Counter[str] = Counter()
    began, number = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        try:
            with limits():
                case(random.Random(f"{SEED} {number}"))
            ends["valid"] += 1
        except InputError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 1000, f"case {number} of seed {SEED}: {text[:2000]}"
            ends["refused"] += 1
        except BaseException:
            print(f"\ncase {number} of seed {SEED}")
            raise
        number += 1
    print(f"\n{number} cases of seed {SEED} in {time.monotonic() - began:.0f} s: {dict(ends)}")
    assert ends["refused"] > 0 and ends["valid"] > 0  # both kinds are reached


@contextmanager
def limits() -> Iterator[None]:
    """Raises TooSlowError or AssertionError where the block takes too long or too much memory."""

    def late(*_):
        raise TooSlowError

    # Seconds of the processor, so that a busy machine makes no difference; and of the clock, for what waits for ever.
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, CASE_SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, 60)}
    before = {number: signal.signal(number, late) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins again
    resident = memory(status, "VmRSS")
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        grown = memory(status, "VmHWM") - resident
        assert grown < CASE_BYTES, f"{grown / 2**20:.0f} MiB"


def memory(status: Path, field: str) -> int:
    """Bytes, from a line of Linux's status of a process."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1])


INTEGERS = (0, 1, 2, 7, 127, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def mutated(rng: random.Random, data: bytes, times: int = 3) -> bytes:
    """The bytes after one to `times` changes: bits, bytes, integers, parts removed, repeated, moved or inserted."""
    content = bytearray(data)
    for _ in range(rng.randint(1, times)):
        at = rng.randrange(len(content) + 1)
        length = min(rng.choice((1, 2, 4, 8, 64, 1024, len(content))), max(len(content) - at, 1))
        match rng.randrange(8):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(content):
                content[at] = rng.randrange(256)
            case 2:
                number = rng.choice(INTEGERS)
                width = rng.choice([width for width in (1, 2, 4, 8) if number < 256**width])
                content[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length] * rng.choice((1, 1, 2, 16))
            case 5:
                content[at:at] = rng.randbytes(length)
            case 6:
                del content[at:]
            case 7:
                other = rng.randrange(len(content) + 1)
                content[at:at] = content[other : other + length]
    return bytes(content)


def shared_parts(depth: int, part: object = 0) -> tuple:
    """A tuple of 2^depth leaves in depth objects: to walk, compare or hash it takes for ever."""
    whole = (part, part)
    for _ in range(depth):
        whole = (whole, whole)
    return whole


def nested(depth: int) -> list:
    """A list in a list in a list ..."""
    whole: list = []
    for _ in range(depth):
        whole = [whole]
    return whole


def odd_value(rng: random.Random) -> object:
    """A value that JSON can hold, of any type and size."""
    return rng.choice(
        (
            None,
            True,
            False,
            *(sign * number for number in INTEGERS for sign in (1, -1)),
            10**30,
            10**400,
            0.5,
            -0.0,
            1e-320,
            1e300,
            float("nan"),
            float("inf"),
            -float("inf"),
            "",
            "7",
            "tiny",
            "a" * 10**5,
            "/../../../x",
            "http://127.0.0.1:9/x",
            "\x00",
            "\x1b[2J",
            "\udc80",
            [],
            [0],
            [64, 64],
            [64, "64"],
            [1] * 10**4,
            {},
            {"a": 1},
            {"fps_id": 6, "motion_bucket_id": 127, "cond_aug": 0.02},
            nested(50),
        )
    )


def with_odd_parts(rng: random.Random, whole: object, value: Callable[[random.Random], object] = odd_value) -> object:
    """A copy of dicts and lists in which one entry, at any depth, is another, is gone, or is new."""
    if isinstance(whole, dict) and whole and rng.random() < 0.9:
        key = rng.choice(list(whole))
        chance = rng.random()
        if chance < 0.1:
            return {k: v for k, v in whole.items() if k != key}
        if chance < 0.15:
            return whole | {rng.choice(("more", "", "tokens", "config")): value(rng)}
        return whole | {key: with_odd_parts(rng, whole[key], value)}
    if isinstance(whole, list) and whole and rng.random() < 0.7:
        index = rng.randrange(len(whole))
        return [*whole[:index], with_odd_parts(rng, whole[index], value), *whole[index + 1 :]]
    return value(rng)
