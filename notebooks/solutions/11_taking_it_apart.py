"""Solutions of the puzzles in notebook 11."""

import torch


def my_cut(T, queries, keys):
    sees = torch.ones(T, T, dtype=torch.bool).tril()
    sees[torch.tensor(queries)[:, None], torch.tensor(keys)] = False
    return sees | torch.eye(T, dtype=torch.bool)


def my_weight(weight, heads, d):
    kept = torch.ones(weight.shape[1] // d)
    kept[heads] = 0
    return weight * kept.repeat_interleave(d)  # the columns of a head are the numbers that it writes


def my_muted(heads, rate, floor):
    muted = []
    while left := [head for head in heads if head not in muted]:
        best = max(left, key=lambda head: rate([*muted, head]))
        if rate([*muted, best]) < floor:
            break
        muted.append(best)
    return muted


def my_choice(features, n):
    """The longest vectors are often on the same thing. Take each patch as far as possible from those taken before."""
    distances = torch.cdist(features, features)  # (scenes, P, P)
    scenes = torch.arange(len(features))
    chosen = [features.norm(dim=-1).argmax(1)]
    nearest = distances[scenes, chosen[0]]  # (scenes, P): how far each patch is from the nearest chosen one
    while len(chosen) < n:
        chosen.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distances[scenes, chosen[-1]])
    return torch.stack(chosen, 1).sort(1).values
