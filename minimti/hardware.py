"""What this machine can do: the device to compute on, and the speed of bf16 on its CPU."""

import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

# Bytes that the processes of a container may take, by version 2 and 1 of Linux's control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def default_device() -> torch.device:
    """The first of cuda, mps and cpu that is available."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can use on a device, including what it already holds; None where unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # resident pages
    except (OSError, StopIteration, AttributeError):  # not Linux
        return None
    limit = sys.maxsize
    for path in LIMITS:
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limit = min(limit, int(path.read_text()))
    return min(free + held, limit)


def bf16_speedup() -> float:
    """How many times faster this CPU multiplies matrices in bf16 than in fp32, measured.

    Far below 1 on a CPU that only emulates bf16 (without AMX or AVX-512).
    """
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            runs.append(time.perf_counter() - start)
        seconds.append(min(runs))
    return seconds[0] / seconds[1]


def describe(dtype: torch.dtype, device: torch.device) -> str:
    """The processor and a precision, such as "AMD EPYC, 2 threads, bfloat16" with PyTorch's number of threads."""
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another operating system, or a processor without a model name
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {precision}"
