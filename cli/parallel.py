"""`torchrun --nproc-per-node=N llava.py ...`: one model on N devices, or with --images N models that divide the list.

A model that one device cannot hold is divided inside its layers (tensor parallelism: Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053, section 3). Each process has a part of the heads, of their cache, and of the MLP:

    q, k, v, gate, up    its rows: the outputs are its own heads, and its own part of the MLP's width
    o, down              its columns: the outputs are terms of a sum over the processes, two sums per layer

Tower, projector, embedding and head are whole in each process, and all compute the same. So that all choose the same
tokens too, process 0 sends its scores to the others. The sums make it slower than one device that is large enough.
"""

import gc
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hub.tensors import no_weights

ROWS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
COLUMNS = ("self_attn.o_proj", "mlp.down_proj")


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_divided(args: Namespace) -> bool:
    """Whether the model is divided, and not the list of --images."""
    return processes() > 1 and args.images is None


def check_flags(args: Namespace) -> None:
    """Raise ValueError for flags that do not work in several processes."""
    if processes() == 1:
        return
    if "-" in (str(args.images), args.prompt):
        raise ValueError("several processes cannot read standard input: give --images or --prompt without -")
    wrong = {"chat": args.chat, "explain": args.explain, "quantize": args.quantize, "kernels": args.kernels == "triton"}
    for name, is_given in wrong.items():
        if is_given and is_divided(args):
            raise ValueError(f"--{name} does not work with a model divided over processes: start it without torchrun")


def own_device(device: str) -> str:
    """The GPU of this process, for "cuda"."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and processes() > 1 else device


@contextmanager
def connected() -> Iterator[None]:
    """Connects this process to the others that torchrun started, if it did. Only process 0 prints."""
    if processes() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with ExitStack() as silence:
        if not is_first():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        yield
    gc.collect()  # DTensors that outlive the connection can abort the process when it ends
    dist.barrier()
    dist.destroy_process_group()


def share_list(items: list, work: Callable[[list], list]) -> list:
    """work(items): each process does its share, in the order of the processes, and gets the results of all."""
    if processes() == 1:
        return work(items)
    size, first = -(-len(items) // processes()), dist.get_rank()
    own, parts = items[first * size : (first + 1) * size], [[]] * processes()
    dist.all_gather_object(parts, work(own) if own else [])
    return [result for part in parts for result in part]


# --- One model on several devices ------------------------------------------------------------------------------------


def keep_share(model: nn.Module, settings: dict) -> None:
    """Shrink the decoder of a model on the meta device to one process's share, to estimate the memory.

    Raises ValueError for a model that cannot be divided.
    """
    text, n = model.config.text_config, processes()
    if settings.get("quantization_config"):
        raise ValueError("a quantized model cannot be divided over processes: start it without torchrun")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(text, name)) % n:
            raise ValueError(f"{n} processes cannot share {name} {size} equally: choose another --nproc-per-node")
    model.config.text_config = share_of(text)
    with no_weights():
        model.language_model = type(model.language_model)(share_of(text))


def share_of(text):  # a LlamaConfig
    n = processes()
    heads = {"num_attention_heads": text.num_attention_heads // n, "num_key_value_heads": text.num_key_value_heads // n}
    return replace(text, **heads, intermediate_size=text.intermediate_size // n)


def divide(model: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Divide a plain model's layers over the devices of all processes. Matrices mapped from a file move one by one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(torch.device(device).type, (processes(),))
    plan = {name: ColwiseParallel() for name in ROWS} | {name: RowwiseParallel() for name in COLUMNS}
    for layer in model.language_model.layers:
        parallelize_module(layer, mesh, plan, src_data_rank=None)  # None: each process reads its part by itself
        layer.to(device, dtype)
    model.language_model.config = share_of(model.config.text_config)  # its cache has this process's heads
    model.lm_head.register_forward_hook(send_scores)
    seed = torch.tensor(torch.initial_seed() % 2**63)
    dist.broadcast(seed, 0)
    torch.manual_seed(int(seed))  # for sampling
    return model.to(device, dtype)


def send_scores(head: nn.Module, args: tuple, scores: Tensor) -> None:
    dist.broadcast(scores, 0)  # in place
