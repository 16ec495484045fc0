"""What every kernel needs on each generation of NVIDIA GPUs since 2020: registers, spills, shared memory. Needs no GPU.

    python benchmarks/targets.py                                           the table, as Markdown
    python benchmarks/targets.py --targets 90 --dtypes bfloat16            a part of it

A wrapper is run on tensors of the meta device, which have shapes but no numbers. The launches it would make are
intercepted, and compiled as Triton would compile them for these arguments. A kernel whose registers spill to memory is
slow, and one that needs more shared memory than the GPU has cannot be launched: the command then ends with an error.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from figures import markdown
from kernel_cases import compiled_makers
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# The most shared memory that a program can have, in KiB: CUDA C++ Programming Guide, "Technical specifications".
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.int8: "*i8", torch.int32: "*i32"}  # fmt: skip


def launches(work: Callable, target: int) -> list[tuple]:
    """The kernels that `work` would launch on a GPU of this generation, with arguments and options. Nothing runs."""
    caught = []
    with (
        mock.patch.object(JITFunction, "run", lambda fn, *args, grid, warmup, **how: caught.append((fn, args, how))),
        mock.patch("kernels.checks.runs_kernels", lambda x: True),
        mock.patch("kernels.attention.capability", lambda device: divmod(target, 10)),
    ):
        work()
    return caught


def specialise(kernel: JITFunction, args: tuple) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a launch, as Triton chooses them: None, 1, and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        general = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not general):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (value % 16 == 0 and not general):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes that it spills to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", said)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def compiled(target: int, dtype: torch.dtype, words: list[str]) -> Iterator[dict]:
    """A row for every kernel that the cases with one of `words` in their name compile to; equal ones make one row."""
    seen = []
    for what, make in compiled_makers(dtype).items():
        if not any(word in what for word in words):
            continue
        for kernel, args, how in launches(make().kernel, target):
            source = specialise(kernel, args)
            if (kernel, source, how) in seen:
                continue
            seen.append((kernel, source, how))
            done = triton.compile(ASTSource(kernel, *source), target=GPUTarget("cuda", target, 32), options=how)
            registers, spilled = usage(done.asm["cubin"])
            # wgmma and tcgen05 are the matrix units' instructions on Hopper and on Blackwell
            unit = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in done.asm["ptx"]), "")
            yield {"kernel": kernel.__name__, "what": what, "dtype": str(dtype).removeprefix("torch."),
                   "sm": target, "registers": registers, "spilled bytes": spilled,
                   "shared bytes": done.metadata.shared, "matrix unit": unit}  # fmt: skip


def by_target(rows: list[dict]) -> list[dict]:
    """The rows of one kernel side by side: "registers / KiB of shared memory"."""
    targets = sorted({row["sm"] for row in rows})
    table = {"limit": {"kernel": "the most there is", "": ""} | {f"sm_{sm}": f"255 / {SHARED[sm]}" for sm in targets}}
    for row in rows:
        key = row["kernel"], row["what"], row["dtype"]
        cells = table.setdefault(key, {"kernel": f"`{row['kernel']}`: {row['what']}", "": row["dtype"]})
        cells[f"sm_{row['sm']}"] = f"{row['registers']} / {row['shared bytes'] / 1024:.1f}"
    return [cells | {f"sm_{sm}": cells.get(f"sm_{sm}", "") for sm in targets} for cells in table.values()]


def problems(rows: list[dict]) -> list[str]:
    """A line for each kernel that spills registers or needs more shared memory than there is."""
    found = []
    for row in rows:
        name = f"{row['kernel']} ({row['what']}, {row['dtype']}) for sm_{row['sm']}"
        if row["spilled bytes"]:
            found.append(f"{name} spills {row['spilled bytes']} bytes")
        if row["shared bytes"] > SHARED[row["sm"]] * 1024:
            found.append(f"{name} needs {row['shared bytes']} bytes of shared memory")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for six generations of GPUs, without one.")
    parser.add_argument("--targets", type=int, nargs="+", choices=SHARED, default=list(SHARED), help="default: all")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2], help="default: the two of 16 bits")
    parser.add_argument("--cases", nargs="+", default=[""], metavar="WORD", help="those with a WORD (default: all)")
    parser.add_argument("--json", type=Path, help="also write one row per kernel and target to this file")
    args = parser.parse_args()
    with torch.no_grad():
        kinds = [(sm, getattr(torch, dtype)) for dtype in args.dtypes for sm in args.targets]
        rows = [row for kind in kinds for row in compiled(*kind, args.cases)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    print(markdown(by_target(rows)))
    sys.exit("\n".join(problems(rows)) or None)


if __name__ == "__main__":
    main()
