"""Muon: momentum whose update has equal singular values, for the matrices inside the layers.

The gradient of a matrix is dominated by a few directions, and so is AdamW's update. Muon replaces the momentum U S V^T
by about U V^T, so that all directions are learned at the same speed (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). Updates are scaled to the size of AdamW's (Liu et al. 2025,
https://arxiv.org/abs/2502.16982, section 2.2), so that both learn at one learning rate. Embeddings, norms and biases
stay with AdamW. torch.optim.Muon computes in bfloat16 only, which is slow on a CPU without bfloat16 products.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW for `others`, Muon for `matrices`."""

    def __init__(self, others: Iterable[nn.Parameter], matrices: Iterable[nn.Parameter], lr: float, **adamw):
        super().__init__([{"params": list(others)}, {"params": list(matrices), "muon": True}], lr=lr, **adamw)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group.get("muon"):
                self.update_matrices(group)
        super().step()  # skips the matrices: they have no gradient any more

    def update_matrices(self, group: dict) -> None:
        by_shape = defaultdict(list)  # matrices of one shape are computed together
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[matrix.shape].append(matrix)
        for (rows, columns), matrices in by_shape.items():
            updates = orthogonalize(torch.stack([self.with_momentum(matrix) for matrix in matrices]))
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
                matrix.grad = None

    def with_momentum(self, matrix: nn.Parameter) -> Tensor:
        """Nesterov's momentum of a gradient."""
        state = self.state[matrix]
        state["step"] = torch.zeros(())  # AdamW expects one of every parameter when a saved state is loaded
        momentum = state.setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:  # (N, rows, columns) -> the same
    """U S V^T -> about U V^T, by a Newton-Schulz iteration. It brings most singular values to between 0.7 and 1.2."""
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT  # x @ x.mT is then the smaller of the two products
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.mT if tall else x
