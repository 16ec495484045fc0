"""`python llava.py --image x.jpg`: one question about one picture, answered word by word."""

import argparse
import sys
from pathlib import Path

import torch

from clip import open_image
from llava import LlavaForConditionalGeneration, LlavaProcessor

BUNDLED = Path(__file__).parent / "checkpoints" / "tiny-llava"


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it, else float32."""
    has_units = device == "cuda" or (device == "cpu" and torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if has_units else torch.float32


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask LLaVA about a picture.")
    add = parser.add_argument
    add("--image", help="the picture; without one the prompt is answered by itself")
    add("--prompt", default="Describe the picture.", help="what to ask (default: %(default)s)")
    add("--model", default=BUNDLED, help="a checkpoint folder or hub id (default: the bundled tiny model)")
    add("--max-new-tokens", type=int, default=256, help="the longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest word each time, 1 samples (default: 0)")
    add("--top-p", type=float, default=1.0, help="sample among words that together are this likely (default: 1)")
    add("--seed", type=int, help="the same seed samples the same answer")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="precision (default: the fastest that is safe)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    return parser.parse_args(argv)


def answer(args: argparse.Namespace) -> None:
    image = open_image(args.image) if args.image else None
    if args.model == BUNDLED:
        print(
            "The bundled tiny model knows only its small world: emoji on plain grounds. "
            "For photographs use --model llava-hf/llava-1.5-7b-hf (14 GB).",
            file=sys.stderr,
        )
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(args.device)
    processor = LlavaProcessor.from_pretrained(args.model)
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype, args.device)
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": args.prompt}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    model.generate(
        **processor(text=prompt, images=image).to(args.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        top_p=args.top_p,
        seed=args.seed,
        tokenizer=processor.tokenizer,
        streamer=lambda text: print(text, end="", flush=True),
    )
    print()


def main(argv: list[str] | None = None) -> int:
    try:
        answer(parse_arguments(argv))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
