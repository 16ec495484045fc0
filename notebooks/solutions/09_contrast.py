"""Solutions of the puzzles in notebook 9."""

import torch
import torch.nn.functional as F


def my_gradient(scores):
    N = len(scores)
    return (scores.softmax(1) + scores.softmax(0) - 2 * torch.eye(N)) / (2 * N)


def my_loss_in_pieces(pictures, pieces, scale):
    log_sum, right, start = torch.full((len(pictures),), -torch.inf), [], 0
    for piece in pieces:
        scores = scale * pictures @ piece.T  # (N, n)
        log_sum = torch.logaddexp(log_sum, scores.logsumexp(1))
        right.append(scores[start : start + len(piece)].diagonal())  # of the pictures whose captions are in this piece
        start += len(piece)
    return (log_sum - torch.cat(right)).mean()


def my_siglip_loss(cosines, scale, bias):
    sign = 2 * torch.eye(len(cosines)) - 1
    return -F.logsigmoid(sign * (scale * cosines + bias)).sum() / len(cosines)


def my_position_loss(patches):
    side = round(patches.shape[1] ** 0.5)
    places = torch.arange(side * side).repeat(len(patches))
    rows, columns = loss_module.place(patches).flatten(0, 1).chunk(2, dim=-1)
    return [F.cross_entropy(rows, places // side), F.cross_entropy(columns, places % side)]
