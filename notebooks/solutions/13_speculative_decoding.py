"""Solutions of the puzzles in notebook 13."""

import torch


def verify(proposed, logits):
    chosen = logits.argmax(-1)
    accepted = (proposed == chosen[:, :-1]).int().cumprod(1).sum(1)
    return accepted, chosen.gather(1, accepted[:, None])[:, 0]


def best_k(alpha, c):
    speed = [sum(alpha**i for i in range(k + 1)) / (k * c + 1) for k in range(21)]
    return max(range(21), key=speed.__getitem__)


def lookup(ids, k):
    for i in range(len(ids) - 3, -1, -1):
        if ids[i : i + 2] == ids[-2:]:
            return ids[i + 2 : i + 2 + k]
    return []


def speculative_sample(p, q, proposed, generator):
    N, residual = len(proposed), (p - q).clamp(min=0)
    if residual.sum() == 0:  # p and q are equal: everything is accepted
        return proposed
    accept = torch.rand(N, generator=generator) < (p / q)[proposed]
    return torch.where(accept, proposed, torch.multinomial(residual, N, replacement=True, generator=generator))
