"""Solutions of the puzzles in notebook 12."""

import math

import torch

from training.emoji_score import named_things


def wilson(k, n, z):
    middle, half = (k + z**2 / 2) / (n + z**2), z * (k * (n - k) / n + z**2 / 4) ** 0.5 / (n + z**2)
    return middle - half, middle + half


def mcnemar(first, second):
    wins, losses = int((first & ~second).sum()), int((~first & second).sum())
    fewer, m = min(wins, losses), wins + losses
    return min(1.0, 2 * sum(math.comb(m, k) for k in range(fewer + 1)) / 2**m)


def chair(descriptions, truths):
    named = [named_things(text.lower()) for text in descriptions]
    extra = [each - Counter(emoji_world.names_of(truth)) for each, truth in zip(named, truths, strict=True)]
    share = sum(each.total() for each in extra) / sum(each.total() for each in named)
    return share, sum(map(bool, extra)) / len(extra)


def contrastive(seen, unseen, alpha, beta):
    probabilities = seen.softmax(-1)
    scores = (1 + alpha) * seen - alpha * unseen
    return scores.masked_fill(probabilities < beta * probabilities.max(), -torch.inf)
