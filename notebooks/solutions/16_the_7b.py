"""Solutions of the puzzles in notebook 16."""

import json
from pathlib import Path

import torch

from cli.memory import cache_bytes, needed_bytes


def my_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def my_authors_name(name: str) -> str:
    prefixes = {
        "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "language_model.": "model.",
        "lm_head.": "lm_head.",
    }
    ours, theirs = next(pair for pair in prefixes.items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def my_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    files, used = [], 0
    for name, size in sizes.items():
        if not files or used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def my_longest(model, dtype: torch.dtype, quantize: str | None, memory: int) -> int:
    left = memory - needed_bytes(model, dtype, quantize, 0)
    tokens = left // cache_bytes(model.config, dtype)
    return max(0, min(tokens, 1000))
