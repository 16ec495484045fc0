"""Which of PyTorch's products of a matrix with a few or many rows is fastest on this processor.

    python benchmarks/products.py            prints the measurements for the rules in kernels/cpu.py; takes minutes

Milliseconds, medians. Matrices are used in turn, so that none is still in the cache when used again, as in decoding.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from kernels.cpu import TWINS, float32_linear
from quantize import quantize_linear

SHAPES = [(768, 768), (2048, 768), (4096, 4096), (11008, 4096), (4096, 11008)]
ROWS = (1, 4, 64, 600)
CACHE = 150e6  # bytes of matrices that are used in turn


def processor() -> str:
    """The processor, its features, the threads and the version of PyTorch, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = {"amx": torch.cpu._is_amx_tile_supported(), "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    has = " ".join(name for name, there in features.items() if there) or "no products in bfloat16"
    words = *names[:1], torch.backends.cpu.get_cpu_capability(), has, f"{torch.get_num_threads()} threads"
    return ", ".join((*words, f"torch {torch.__version__}"))


def milliseconds(product: Callable[[object, Tensor], Tensor], matrices: list, x: Tensor, seconds: float) -> float:
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 2 * len(matrices) or (time.perf_counter() < stop and len(times) < 300):
        matrix = matrices[len(times) % len(matrices)]
        start = time.perf_counter()
        product(matrix, x)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[len(matrices) :])  # without the first round


def ways(dtype: torch.dtype) -> dict[str, tuple[Callable, Callable[[Tensor], object]]]:
    """Name -> the product, and the function that prepares a matrix for it."""
    def quantized(bits: int) -> Callable:
        def make(weight: Tensor) -> nn.Module:
            linear = quantize_linear(weight, None, bits, 128).to(dtype)
            return TWINS[type(linear)](linear)

        return make

    def as_it_is(weight: Tensor) -> Tensor:
        return weight.to(dtype)

    def call(matrix: nn.Module, x: Tensor) -> Tensor:
        return matrix(x)

    return {
        "F.linear": (lambda w, x: F.linear(x, w), as_it_is),
        "torch.mv": (lambda w, x: torch.mv(w, x[0]), as_it_is),
        "(W @ x.T).T": (lambda w, x: (w @ x.T).T, as_it_is),
        "in float32": (lambda w, x: float32_linear(x, w), as_it_is),
        "int8": (call, quantized(8)),
        "int4": (call, quantized(4)),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure (default: 0.3)")
    args = parser.parse_args()
    print(processor())
    for dtype in (getattr(torch, name) for name in args.dtypes):
        print(f"\n{dtype}".replace("torch.", ""))
        table = ways(dtype)
        print(f"| out x in | rows | {' | '.join(table)} |\n|---|---|{'---|' * len(table)}")
        for out, width in SHAPES:
            whole = torch.randn(out, width) / width**0.5
            found = {rows: {} for rows in ROWS}
            for name, (product, make) in table.items():
                count = int(CACHE / (whole.numel() * dtype.itemsize))
                matrices = [make(whole) for _ in range(min(max(2, count), 24))]
                for rows in ROWS:
                    if (name == "torch.mv" and rows > 1) or (name == "in float32" and dtype == torch.float32):
                        continue
                    x = torch.randn(rows, width).to(dtype)
                    found[rows][name] = milliseconds(product, matrices if rows < 64 else matrices[:2], x, args.seconds)
            for rows, times in found.items():
                best = min(time for name, time in times.items() if "int" not in name)
                texts = {name: f"**{time:.2f}**" if time == best else f"{time:.2f}" for name, time in times.items()}
                cells = [texts.get(name, "") for name in table]
                print(f"| {out} x {width} | {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
