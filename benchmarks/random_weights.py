"""A checkpoint of the real size without the real weights: random ones beside a checkpoint's own small files.

    python benchmarks/random_weights.py SOURCE OUT

SOURCE holds config.json, tokenizer and settings, as `hf download llava-hf/llava-1.5-7b-hf --exclude "*.safetensors"`
gets them. OUT becomes a folder that loads like the real one, and as fast, and talks nonsense.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import read_config
from llava import LlavaForConditionalGeneration
from save_checkpoint import hub_name, write_json

SHARD_BYTES = 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights in bfloat16.")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.without_weights(read_config(args.source))
    ignore = shutil.ignore_patterns("*.safetensors*", "*.bin*")
    shutil.copytree(args.source, args.out, ignore=ignore, copy_function=shutil.copyfile)
    args.out.chmod(0o755)
    places, shard = {}, {}
    parameters = list(model.named_parameters())
    for i, (name, parameter) in enumerate(parameters):
        value = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02)
        shard[hub_name(name)] = value.add_(1) if "norm" in name and name.endswith("weight") else value
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES or i == len(parameters) - 1:
            file = f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(shard, args.out / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
            print(f"{file} written, {i + 1} of {len(parameters)} tensors done", flush=True)
    write_json(args.out / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


if __name__ == "__main__":
    main()
