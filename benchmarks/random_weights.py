"""Make a checkpoint of a real size with random weights and the tiny model's tokenizer.

    python benchmarks/random_weights.py 161M OUT
    python benchmarks/random_weights.py 7B OUT

The folder OUT loads like a real checkpoint and runs as fast; its answers are meaningless. 7B has the shapes of
LLaVA-1.5 7B and takes 14 GB of memory and of disk.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from clip import CLIPVisionConfig, ImageProcessor
from hub.files import BUNDLED
from hub.tensors import no_weights
from hub.writer import save
from llama import LlamaConfig
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

SIZES = {
    "161M": (
        CLIPVisionConfig(512, 2048, 512, 8, 8, image_size=336, patch_size=14),
        LlamaConfig(32064, 768, 2048, num_hidden_layers=12, num_attention_heads=12),
    ),
    "7B": (LlavaConfig().vision_config, LlamaConfig(32064)),
}


def random_model(config: LlavaConfig, device: str) -> LlavaForConditionalGeneration:
    """A plain model in bfloat16, with weights sampled on the device."""
    with no_weights():
        model = LlavaForConditionalGeneration(config)
    model.to(torch.bfloat16).to_empty(device=device)
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
    main()
