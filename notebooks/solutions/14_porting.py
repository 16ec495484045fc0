"""Solutions of the puzzles in notebook 14."""

import torch
from torch import Tensor


def my_half_order(weight: Tensor, heads: int) -> Tensor:
    in_pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, d / 2, 2, D)
    return in_pairs.transpose(1, 2).flatten(0, 2)


def my_eps(x: Tensor, y: Tensor, weight: Tensor) -> float:
    x, y, weight = x.double(), y.double(), weight.double()
    mean_square = x.square().mean(-1)
    token = mean_square.argmin()  # the smaller the numbers, the more eps counts
    factor = (y[token] / (x[token] * weight)).mean()  # 1 / sqrt(mean square + eps)
    return (1 / factor**2 - mean_square[token]).item()


def my_diagnosis(x: Tensor, expected: Tensor, weight: Tensor) -> str:
    y = x @ weight.T
    if distance(y, expected) < 1e-4:
        return "equal"
    if distance(x @ weight, expected) < 1e-4:
        return "transposed"
    if distance(y.sort(-1).values, expected.sort(-1).values) < 1e-4:
        return "order"
    factor = (y * expected).sum() / y.square().sum()  # of least squared error
    return "scaled" if distance(factor * y, expected) < 1e-4 else "other"


def my_first_wrong(model, ids: Tensor, pieces: list[int]) -> int:
    whole = model(ids).logits[0]
    cache, parts = model.language_model.new_cache(1, ids.shape[1]), []
    for piece in ids.split(pieces, dim=1):
        parts.append(model(piece, past_key_values=cache).logits[0])
    apart = (torch.cat(parts) - whole).abs().amax(-1) > 1e-3 * whole.abs().max()
    return int(apart.nonzero()[0]) if apart.any() else -1
