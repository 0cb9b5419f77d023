"""A few numbers that tell one set of UNet weights from another.

An embedding fits the weights it was optimised on. The name of the model does not identify them: a fine-tune has the
same name and the same sizes as the official file.
"""

import torch
from torch import Tensor, nn

NUM_WEIGHTS = 8

# Independent errors of relative size e in the weights move a number, which is a sum over its norm, by about e. Rounding
# to bfloat16 has e = 0.0016: over all 343 weights of `tiny` it moves the numbers by 0.0017 in the root mean square and
# by at most 0.008; float16 is eight times finer. Training that changes the weights by 2 % moves the 32 numbers by about
# 0.02, and the largest of these differences is about 0.04. A fine-tune that changes them by less than 1 % passes
# unnoticed. Whether svd-xt and svd-xt-1-1 differ by more has not been measured.
TOLERANCE = 0.015


def fingerprint(unet: nn.Module) -> dict[str, list[float]]:
    """Four numbers for each of eight matrices and convolutions, evenly spread over the UNet, by parameter name.

    They are the sums of every fourth element w[i::4] (i = 0..3), over the norm of these elements (rms * sqrt(count)):
    about N(0, 1) for random weights. The names and the order of the elements are those of the module, so neither the
    file layout that it was loaded from nor the memory format of its convolutions makes a difference. The weights may be
    of any precision, on any device.
    """
    weights = [(name, weight.detach()) for name, weight in unet.named_parameters() if weight.ndim > 1]
    last = len(weights) - 1
    chosen = dict(weights[round(k * last / (NUM_WEIGHTS - 1))] for k in range(NUM_WEIGHTS))
    numbers = torch.stack([_normalised_sums(weight) for weight in chosen.values()])  # [8, 4], one transfer to the CPU
    return dict(zip(chosen, numbers.tolist()))


def _normalised_sums(weight: Tensor) -> Tensor:
    """[4], in fp32, which every device has. A remainder of up to three elements is left out."""
    flat = weight.float().flatten()
    quarters = flat[: flat.numel() // 4 * 4].view(-1, 4).T.contiguous()  # [4, count]; sums along rows are exact to 1e-5
    norms = quarters.square().sum(dim=1).sqrt()  # [4]
    return quarters.sum(dim=1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # zero weights give zeros


def differs(a: dict[str, list[float]], b: dict[str, list[float]]) -> bool:
    """Whether two fingerprints are of different weights: of other names, or a number apart by more than the tolerance.

    An empty one, as in embeddings of version 0.1.0, is of unknown weights and never differs.
    """
    if not a or not b:
        return False
    if {name: len(a[name]) for name in a} != {name: len(b[name]) for name in b}:
        return True
    return any(not abs(x - y) <= TOLERANCE for name in a for x, y in zip(a[name], b[name]))  # NaN differs
