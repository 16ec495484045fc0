"""Solutions of the puzzles in notebook 10."""

import math

import torch


def my_learning_rate(step, stage):
    warm_up = max(1, round(0.03 * stage.steps))
    if step < warm_up:
        return stage.lr * (step + 1) / warm_up
    progress = (step - warm_up) / (stage.steps - warm_up)  # 0 to 1
    return stage.lr * (1 + math.cos(math.pi * progress)) / 2


def my_batch(conversations, pad):
    longest = max(sum(len(prompt) + len(answer) for prompt, answer in turns) for turns in conversations)
    ids = torch.full((len(conversations), longest), pad)
    labels = torch.full_like(ids, -100)
    for row, turns in enumerate(conversations):
        end = 0
        for prompt, answer in turns:
            start, end = end + len(prompt), end + len(prompt) + len(answer)
            ids[row, start - len(prompt) : end] = torch.tensor(prompt + answer)
            labels[row, start:end] = torch.tensor(answer)
    return [ids, labels]


def my_backward(objective, pieces):
    labels = sum(objective.count(piece) for piece in pieces)  # of all pieces, before the first backward pass
    mean = 0
    for piece in pieces:
        loss = objective(piece) / labels
        loss.backward()  # frees the activations of this piece
        mean = mean + loss.detach()
    return mean


def my_operations(chain):
    total, learns_before = 0, False
    for numbers_in, numbers_out, learns in chain:
        products = 1 + learns + learns_before  # forward, gradient of the matrix, gradient of its input
        total += 2 * numbers_in * numbers_out * products
        learns_before |= learns
    return total
