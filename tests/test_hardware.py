"""What the machine has."""

import os
import time
from pathlib import Path

import pytest
import torch

from minimti import hardware


def test_the_limit_of_a_container_bounds_the_memory_of_a_cpu(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("missing", "unlimited", "limit")]
    paths[1].write_text("max\n")
    monkeypatch.setattr(hardware, "LIMITS", paths)
    free = hardware.available_memory(torch.device("cpu"))
    assert free is None or free > 2**27
    paths[2].write_text(f"{2**27}\n")
    assert hardware.available_memory(torch.device("cpu")) in (None, 2**27)


def test_a_process_can_use_what_is_free_and_what_it_holds(monkeypatch):
    """It holds its resident pages, not all that it has reserved."""
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n", "/proc/self/statm": "700 30 2 1 0 6 0\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    monkeypatch.setattr(hardware, "LIMITS", ())
    expected = 5000 * 1024 + 30 * os.sysconf("SC_PAGE_SIZE")
    assert hardware.available_memory(torch.device("cpu")) == expected


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_speed_of_bf16_is_above_1_where_fp32_is_slower(monkeypatch, slow):
    class Matrix:
        def __init__(self, *_, dtype):
            self.seconds = 0.002 if dtype == slow else 0.0005

        def __matmul__(self, _):
            time.sleep(self.seconds)

    monkeypatch.setattr(torch, "ones", Matrix)
    speedup = hardware.bf16_speedup()
    assert speedup > 1.5 if slow == torch.float32 else speedup < 0.7
