"""Solutions of the puzzles of notebook 5."""

import torch


def my_single_layer(W1, b1, W2, b2):
    return W2 @ W1, W2 @ b1 + b2


def my_merge(table, input_ids, vectors, image_id):
    is_image = input_ids == image_id
    x = table[input_ids.masked_fill(is_image, 0)]
    x[is_image] = vectors
    return x


def my_ids(merged, table, image_id):
    distance, nearest = torch.cdist(merged, table).min(-1)
    return nearest.masked_fill(distance > 1e-3, image_id).tolist()


def my_halves(first, second):
    left = torch.arange(len(first)) % 8 < 4  # of each patch, row by row
    return torch.where(left[:, None], first, second)
