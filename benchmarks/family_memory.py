"""The peak memory of the checkpoints of `python llava.py --models`, with random weights, compared with its table.

    python benchmarks/family_memory.py llava-hf/llava-interleave-qwen-0.5b-hf bczhou/tiny-llava-v1-hf
    python benchmarks/family_memory.py --grid xtuner/llava-phi-3-mini-hf      a picture that fills LLaVA-1.6's grid

Each checkpoint is written to a temporary folder with its own shapes in bfloat16; then the command answers one question
about one picture. One that would leave less than SPARE bytes free is not run.

    RssAnon    the process's own memory, at its peak: caches, activations, and copies of the matrices that are fused
    VmHWM      the peak of that and of all mapped files, also of matrices that were fused and are no longer read
    in use     RssAnon, and the mapped weights that were not copied: what must stay in memory for a fast answer
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from cli import models
from cli.memory import free_bytes
from clip import ImageProcessor
from hub.files import BUNDLED
from hub.writer import config_json, hub_name, write_json, write_processor, write_shards, write_tokenizer
from kernels.cpu import LARGEST_FUSED
from llava import LlavaForConditionalGeneration, LlavaProcessor

ROOT = Path(__file__).parent.parent
SPARE = 8e9  # bytes to leave to others


def random_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, for a model on the meta device."""
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
        yield hub_name(name), tensor.normal_(float("norm" in name and name.endswith("weight")), 0.02)


def write(name: str, folder: Path) -> None:
    """A checkpoint with the shapes of one in the table, and the tiny model's tokenizer and prompts."""
    settings, processor = models.config_of(name), LlavaProcessor.from_pretrained(BUNDLED)
    settings["image_token_index"] = processor.tokenizer.image_token_id
    model = LlavaForConditionalGeneration.without_weights(settings)
    write_shards([random_tensors(model)], folder, 1e9)
    config = config_json(model.config) | {"torch_dtype": "bfloat16"}
    if model.config.image_grid_pinpoints:
        config |= {"model_type": "llava_next", "image_grid_pinpoints": model.config.image_grid_pinpoints}
    config["text_config"]["max_position_embeddings"] = 4096
    write_json(folder / "config.json", config)
    side = model.config.vision_config.image_size
    processor.image_processor = ImageProcessor({"height": side, "width": side}, {"height": side, "width": side})
    write_processor(processor, model.config, folder)
    write_tokenizer(processor.tokenizer, folder)


def mapped_bytes(model: nn.Module) -> int:
    """The weights in bfloat16 that stay in the mapped file: not those of small matrices, which are copied and fused."""
    fused = 0
    for layer in model.language_model.layers:
        for linears in ([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
                        [layer.mlp.gate_proj, layer.mlp.up_proj]):  # fmt: skip
            size = sum(2 * parameter.numel() for linear in linears for parameter in linear.parameters())
            fused += size if size <= LARGEST_FUSED else 0
    return sum(2 * parameter.numel() for parameter in model.parameters()) - fused


def measure(folder: Path, picture: Path) -> dict[str, float]:
    """The peaks of a process that answers, read every 20 ms."""
    command = [sys.executable, ROOT / "llava.py", "--model", folder, "--image", picture, "--json"]
    command += ["--dtype", "bfloat16", "--max-new-tokens", "8"]
    start, peaks = time.monotonic(), {"RssAnon": 0, "VmHWM": 0}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        lines = map(str.split, Path(f"/proc/{process.pid}/status").read_text().splitlines())
        for line in (line for line in lines if line and line[0].rstrip(":") in peaks):
            peaks[line[0].rstrip(":")] = max(peaks[line[0].rstrip(":")], int(line[1]) * 1024)
        time.sleep(0.02)
    answer = json.loads(process.stdout.read())
    return peaks | {"tokens": answer["prompt_tokens"], "seconds": time.monotonic() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of checkpoints with random weights.")
    parser.add_argument("names", nargs="+", choices=[name for name, *_ in models.MODELS], metavar="NAME")
    parser.add_argument("--grid", action="store_true", help="a picture of 672 x 672 pixels")
    args = parser.parse_args()
    columns = ["checkpoint", "--models says", "in use", "RssAnon", "VmHWM", "prompt tokens", "seconds"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in args.names:
        config = models.config_of(name)
        needed = models.memory(LlavaForConditionalGeneration, config)
        if needed + SPARE > free_bytes("cpu"):
            print(f"| {name} | {needed / 1e9:.2f} GB | does not fit here | | | | |")
            continue
        with tempfile.TemporaryDirectory(prefix="family-") as scratch:
            picture = Path(scratch) / "picture.png"
            Image.radial_gradient("L").resize((672, 672) if args.grid else (640, 480)).save(picture)
            folder = Path(scratch) / name.rpartition("/")[2]
            folder.mkdir()
            write(name, folder)
            found = measure(folder, picture)
        in_use = found["RssAnon"] + mapped_bytes(LlavaForConditionalGeneration.without_weights(config))
        sizes = " | ".join(f"{size / 1e9:.2f} GB" for size in (needed, in_use, found["RssAnon"], found["VmHWM"]))
        print(f"| {name} | {sizes} | {found['tokens']} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
