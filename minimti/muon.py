"""Muon (Jordan et al. 2024): steps along the gradient's momentum, but equally far in all directions of a matrix.

Adam's steps are long in the few directions that dominate and short in the many others. torch.optim.Muon takes matrices
only, no convolutions, and computes in bfloat16, which a CPU without instructions for it does hundreds of times slower.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

SIDE = 16  # rows and columns from which a weight counts as a matrix
RMS = 0.2  # of an update's elements over the learning rate, about Adam's: both share a rate (Liu et al. 2025)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # bring singular values near 1 within ITERATIONS, rather than exactly to it
ITERATIONS = 5


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix to multiply with; a convolution's weight [out, in, ...] is one of out rows."""
    return name.endswith("weight") and p.ndim > 1 and min(len(p), p[0].numel()) >= SIDE


def orthogonalised(matrix: Tensor) -> Tensor:
    """[rows, columns] -> the same singular vectors, with singular values between about 0.7 and 1.2.

    The Newton-Schulz iteration X <- p(X X^T) X with an odd polynomial. It goes on within the smaller of the two Gram
    matrices, all powers of which commute, and touches the matrix itself only at the end.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalised(matrix.T).T
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-12)
    gram, product = x @ x.T, None
    identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        polynomial = a * identity + b * gram + c * gram @ gram
        product = polynomial if product is None else polynomial @ product
        gram = polynomial @ gram @ polynomial
    return product @ x


class Muon(torch.optim.Optimizer):
    """For matrices, with decoupled weight decay and Nesterov's momentum."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:  # as a single token needs no keys, not every batch concerns every matrix
                    continue
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                mean = self.state[p]["momentum"]
                mean.lerp_(p.grad, 1 - group["momentum"])
                # Rows as they lie in memory: channels may be innermost.
                ahead = p.grad.lerp(mean, group["momentum"]).movedim(1, -1)
                matrix = ahead.flatten(1)
                update = orthogonalised(matrix) * (RMS * max(matrix.shape) ** 0.5)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(ahead.shape).movedim(-1, 1), alpha=-group["lr"])
