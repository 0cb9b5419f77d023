import gc
import os
import signal

# Before torch and huggingface_hub are imported, here or in a subprocess. The tensors of most tests are too small for
# two threads to gain anything, and on a busy machine threads that wait for each other lose a lot.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before Triton is imported: its interpreter runs kernels on a CPU
    os.environ["TRITON_INTERPRET"] = "1"

gc.set_threshold(100_000, 50, 1000)  # each look through all objects of so many libraries takes 0.2 s
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in a script's background


def pytest_xdist_auto_num_workers(config):
    """All plain tests go in up to four processes; named files, and tests that print or are full or fuzz, in one."""
    is_plain = config.option.markexpr == "not full and not fuzz" and config.option.capture != "no"
    return min(4, os.cpu_count() or 1) if is_plain and config.args == config.getini("testpaths") else 0


# An example costs a network, not a search: few examples, always the same ones.
settings.register_profile("networks", max_examples=6, deadline=None, derandomize=True)
settings.load_profile("networks")


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(0)
    if request.node.get_closest_marker("full"):
        torch.set_num_threads(os.cpu_count())
        yield
        torch.set_num_threads(1)
    else:
        yield


@pytest.fixture(scope="session")
def mini_svd():
    """A model of two levels with random weights. Tests must leave it as it is."""
    from official import MINI, fill_by_name

    from minimti.svd import SVD

    with torch.device("meta"):
        svd = SVD(MINI)
    return fill_by_name(svd, MINI, "").requires_grad_(False)
