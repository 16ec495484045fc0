"""Solutions of the puzzles in notebook 19."""

import re

import torch


def my_kind(truth):
    wanted = {thing["color"] for thing in truth["things"]}

    def score(text):
        words = set(re.findall(r"\w+", text.lower()))
        return words & set(GROUNDS) == wanted and not words & {"no", "not"}

    return "Which colors do the things have?", score


def my_balanced(asked):
    kept = []
    for word in {word for word, _ in asked}:
        yes, no = ([i for i, turn in enumerate(asked) if turn == (word, answer)] for answer in ("yes", "no"))
        for pair in zip(yes, no, strict=False):  # ends with the shorter list
            kept += pair
    return sorted(kept)


def my_interval(right, picture):
    n, away = len(right), right - right.mean()
    sums = torch.zeros(int(picture.max()) + 1).index_add(0, picture, away)  # the pairs of a picture sum to a square
    half = 1.96 * (sums.square().sum() / n**2).sqrt()
    return (right.mean() - half).item(), (right.mean() + half).item()
