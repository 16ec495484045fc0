"""Training in several processes: each takes a share of every step. With one process these functions change nothing.

torchrun starts the processes and tells each its number, the rank, in environment variables.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor


def join(device: str) -> str:
    """Connect to the processes that torchrun started, if it did; returns this one's device."""
    if "WORLD_SIZE" not in os.environ:
        return device
    on_gpus = torch.device(device).type == "cuda"
    dist.init_process_group("nccl" if on_gpus else "gloo")
    if on_gpus:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


def leave() -> None:
    """Disconnect, after the run has dropped its model and its optimizer."""
    if dist.is_initialized():
        gc.collect()  # DTensors that outlive the connection can abort the process when it ends
        dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_all(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, in place. It has no gradient."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_agree(fact: bool, device: str | torch.device) -> bool:
    """Whether `fact` is true in every process."""
    fact = torch.tensor(float(fact), device=device)
    if dist.is_initialized():
        dist.all_reduce(fact, dist.ReduceOp.MIN)
    return bool(fact)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)  # the loss of every process depends on these rows
        return grad.chunk(world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:  # (B, ...) -> (N, ...)
    """The rows of all processes, in the order of their ranks. Gradients go back to the process of each row."""
    return _Gather.apply(x) if dist.is_initialized() else x
