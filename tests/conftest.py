import os

# Before torch and huggingface_hub are imported, here or in a subprocess. The tensors of most tests are too small for
# two threads to gain anything, and on a busy machine threads that wait for each other lose a lot.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network

import pytest
import torch
from hypothesis import settings

# The cost of an example is a network, not a search: few examples, always the same ones.
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
