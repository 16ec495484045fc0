"""Solutions of the puzzles in notebook 1."""

import torch
import torch.nn.functional as F


def my_patch(width, height, x, y):
    short = min(width, height)  # the crop keeps a square of this side, in pixels of the file
    x, y = x - (width - short) / 2, y - (height - short) / 2
    if not (0 <= x < short and 0 <= y < short):
        return -1
    return int(y / short * side) * side + int(x / short * side)


def my_picture(rows):
    n = round(rows.shape[1] ** 0.5)
    squares = rows.unflatten(2, (3, size, size)).unflatten(1, (n, n))  # (B, row, column, channel, y, x)
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def my_positions(table, side):
    old = round((len(table) - 1) ** 0.5)
    grid = table[1:].T.unflatten(1, (old, old))[None]  # (1, D, rows, columns)
    resized = F.interpolate(grid, (side, side), mode="bilinear", align_corners=True)
    return torch.cat([table[:1], resized[0].flatten(1).T])


def my_grid(width, height):
    def quality(grid):
        rows, columns = grid
        scale = min(336 * columns / width, 336 * rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -rows * columns

    return max(GRIDS, key=quality)
