"""Muon (Jordan et al. 2024): steps along the momentum of the gradient, equally long in all directions of a matrix.

Adam's steps are long in the few directions with large gradients and short in the many others. torch.optim.Muon accepts
matrices only, no convolutions, and computes in bfloat16, which is hundreds of times slower on a CPU that emulates it.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MIN_SIDE = 16  # the fewest rows and columns of a weight that counts as a matrix
UPDATE_RMS = 0.2  # rms of an update is this times the rate, about as in Adam: both can use one rate (Liu et al. 2025)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # move singular values near 1 within ITERATIONS rather than exactly to it
ITERATIONS = 5

TOKEN_MOMENTUM = 0.9
PER_SET_LR_RATIO = 0.25  # the rate of each set's own step over the rate of the step that all sets share


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter multiplies its input as a matrix. A convolution's weight [out, in, ...] has `out` rows."""
    return name.endswith("weight") and p.ndim > 1 and min(len(p), p[0].numel()) >= MIN_SIDE


def orthogonalised(matrix: Tensor) -> Tensor:
    """[..., rows, columns] -> the same singular vectors with singular values between about 0.7 and 1.2.

    The Newton-Schulz iteration X <- p(X X^T) X with an odd polynomial. All powers of the smaller Gram matrix commute,
    so the iteration runs on the Gram matrix and multiplies the matrix itself only once, at the end.
    """
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        return orthogonalised(matrix.mT).mT
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    gram = x @ x.mT  # [..., rows, rows]
    identity = torch.eye(rows, dtype=x.dtype, device=x.device)
    product: Tensor | None = None
    for _ in range(ITERATIONS):
        polynomial = a * identity + b * gram + c * gram @ gram
        product = polynomial if product is None else polynomial @ product
        gram = polynomial @ gram @ polynomial
    assert product is not None
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution weights, with decoupled weight decay and Nesterov momentum."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One step. A parameter without a gradient stays as it is. Closures are not supported: ValueError."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            # Not every batch uses every matrix: a single token needs no keys.
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, means = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            updates = self._updates(torch._foreach_lerp(grads, means, group["momentum"]))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    @staticmethod
    def _updates(ahead: Sequence[Tensor]) -> list[Tensor]:
        """The update of each weight, [out, in, ...] like its gradient; matrices of one shape are computed together."""
        updates = list(ahead)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, gradient in enumerate(ahead):
            by_shape.setdefault(gradient.shape, []).append(i)
        for indices in by_shape.values():
            # Channels may be innermost in memory: with them last, flattening needs no copy.
            rows = [ahead[i].movedim(1, -1) for i in indices]  # [out, ..., in] each
            matrices = torch.stack([matrix.flatten(1) for matrix in rows])  # [n, out, columns]
            scale = UPDATE_RMS * max(matrices.shape[1:]) ** 0.5
            for i, update in zip(indices, orthogonalised(matrices) * scale):
                updates[i] = update.view(rows[0].shape).movedim(-1, 1)  # [out, in, ...]
        return updates


class SharedMuon:
    """Optimises tokens [sets, N, d] in place: one step that all sets share, and a shorter one of each set's own.

    The shared step follows the sum of the sets' gradients. The rate falls from `lr` to 0 along half a cosine of `steps`
    steps, of which `done` have been taken.
    """

    def __init__(self, tokens: Tensor, lr: float, steps: int, done: int = 0):
        self.tokens, self.steps, self.done = tokens, steps, done
        self.rows = tokens.view(-1, tokens.shape[-1])  # [sets N, d], the same memory
        self.shared = torch.zeros_like(tokens[0])  # [N, d]
        self.rates = (lr, PER_SET_LR_RATIO * lr)  # at the cosine's start
        groups: list[dict] = [{"params": [self.shared]}, {"params": [self.rows]}]
        self.torch_optimizer = Muon(groups, lr, momentum=TOKEN_MOMENTUM)

    def step(self, grad: Tensor) -> None:
        """One step along the gradient [sets, N, d]."""
        for group, rate in zip(self.torch_optimizer.param_groups, self.rates):
            group["lr"] = rate * (1 + math.cos(math.pi * self.done / self.steps)) / 2
        self.done += 1
        self.shared.grad = grad.sum(dim=0)
        self.rows.grad = grad.view_as(self.rows)
        self.torch_optimizer.step()
        self.tokens.add_(self.shared)
        self.shared.zero_()
