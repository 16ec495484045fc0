"""Dropout for LoRA, with masks that are computed by a hash instead of sampled.

    B batch    T tokens
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOW_32 = 2**32 - 1


@dataclass
class Masks:
    """Dropout that depends on only the seed, sample number, matrix, token and feature.

    So a resumed run, another number of processes or other padding give the same masks, on every device.
    """

    dropout: float
    seed: int
    samples: Tensor | None = None  # (B,): the numbers of the batch's samples, counted through all steps

    def keep(self, x: Tensor, matrix: int) -> Tensor:  # (B, T, in) -> bool (B, T, in)
        if self.samples is None or len(self.samples) != len(x):
            raise RuntimeError("dropout needs the batch's sample numbers: train through LoraLoss, or call model.eval()")
        T, width = (torch.arange(n, device=x.device) for n in x.shape[1:])
        keys = mixed(mixed(mixed(self.samples + (self.seed & LOW_32)) + matrix)[:, None] + T)  # (B, T)
        limit = self.dropout * 2**32
        # One sample at a time: the hashes are in int64, four times the size of x in bfloat16.
        return torch.stack([mixed(key[:, None] + width) >= limit for key in keys])


def mixed(x: Tensor) -> Tensor:
    """A hash of whole numbers to 32 bits in int64: neighbours get unrelated results (Mueller's integer hash)."""
    for _ in range(2):
        x = x & LOW_32
        x = ((x >> 16) ^ x) * 0x45D9F3B & LOW_32  # below 2^59, so that the product does not overflow
    return (x >> 16) ^ x
