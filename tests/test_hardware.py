"""What the machine has."""

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
