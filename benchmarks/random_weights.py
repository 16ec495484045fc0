"""A checkpoint of a real size without real weights: random ones, with the tiny model's tokenizer and prompt.

    python benchmarks/random_weights.py 161M OUT
    python benchmarks/random_weights.py 7B OUT

OUT becomes a folder that loads like the real one, and runs as fast, and talks nonsense. 7B has the shapes of LLaVA-1.5
7B and takes 14 GB of memory and of disk.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import NoInit, take_memory
from clip import CLIPVisionConfig, ImageProcessor
from command import BUNDLED, run
from llama import LlamaConfig
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from save_checkpoint import save

SIZES = {
    "161M": (
        CLIPVisionConfig(512, 2048, 512, 8, 8, image_size=336, patch_size=14),
        LlamaConfig(32064, 768, 2048, num_hidden_layers=12, num_attention_heads=12),
    ),
    "7B": (LlavaConfig().vision_config, LlamaConfig(32064)),
}


def random_model(config: LlavaConfig, device: str) -> LlavaForConditionalGeneration:
    """A model in bfloat16, its weights drawn on the device."""
    with torch.device("meta"), NoInit():
        model = LlavaForConditionalGeneration(config)
    take_memory(model.to(torch.bfloat16), device)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.02)
    return model.eval()


def make(size: str, folder: Path) -> None:
    tokenizer = LlavaProcessor.from_pretrained(BUNDLED).tokenizer
    config = LlavaConfig(*SIZES[size], image_token_index=tokenizer.image_token_id)
    model = random_model(config, "cpu")
    side = config.vision_config.image_size
    image_processor = ImageProcessor({"shortest_edge": side}, {"height": side, "width": side})
    save(model, LlavaProcessor(image_processor, tokenizer, config.image_seq_length, "v1"), folder, shard_bytes=2e9)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights in bfloat16.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    make(args.size, args.out)


if __name__ == "__main__":
    sys.exit(run(main))
