"""The commands: ask about a picture, describe a checkpoint; and `run`, which ends every command of the project.

    python llava.py --image x.jpg
    python load_weights.py checkpoints/tiny-llava

What a person can mend ends in one sentence on stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import explain
from checkpoint import find_checkpoint, read_config
from clip import open_image
from llava import LlavaForConditionalGeneration, LlavaProcessor
from load_weights import survey

BUNDLED = Path(__file__).parent / "checkpoints" / "tiny-llava"


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it, else float16 on a GPU and float32 on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if kind == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask LLaVA about a picture.")
    add = parser.add_argument
    add("--image", help="the picture; without one the prompt is answered by itself")
    add("--prompt", default="Describe the picture.", help="what to ask (default: %(default)s)")
    add("--model", default=BUNDLED, help="a checkpoint folder or hub id (default: the bundled tiny model)")
    add("--max-new-tokens", type=int, default=256, help="the longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest word each time, 1 samples (default: 0)")
    add(
        "--top-p", type=float, default=1.0, help="when sampling: among words that together are this likely (default: 1)"
    )
    add("--seed", type=int, help="when sampling: the same seed gives the same answer")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="precision (default: the fastest that is safe)")
    add("--explain", metavar="FILE", help="also write an HTML page that shows where each word of the answer looked")
    add("--quantize", choices=["int8"], help="keep the decoder's weights in a byte each: half the memory of bfloat16")
    add("--kernels", choices=["auto", "triton", "torch"], default="auto", help="on a GPU: Triton's or plain PyTorch's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    return parser.parse_args(argv)


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no such name, or no such hardware
        raise ValueError(f"there is no device {name!r} here: use --device cpu") from error


def answer(args: argparse.Namespace) -> None:
    check_device(args.device)
    if "<image>" in args.prompt:
        raise ValueError("the prompt must not hold <image>: the picture of --image gets its place by itself")
    image = None if args.image is None else open_image(args.image)
    if args.explain is not None:
        explain.check_place(args.explain, image)
    if image is None:
        print("No picture given: the prompt is answered by itself.", file=sys.stderr)
    if args.model == BUNDLED:
        print(
            "The bundled tiny model knows only its small world: emoji on plain grounds. "
            "For photographs use --model llava-hf/llava-1.5-7b-hf (14 GB).",
            file=sys.stderr,
        )
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(args.device)
    processor = LlavaProcessor.from_pretrained(args.model)
    from_pretrained = LlavaForConditionalGeneration.from_pretrained
    model = from_pretrained(args.model, dtype, args.device, args.quantize, args.kernels)
    model = explain.Recorder(model) if args.explain is not None else model
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": args.prompt}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    model.generate(
        **processor(text=prompt, images=image).to(args.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature != 0,
        temperature=args.temperature or None,
        top_p=args.top_p,
        seed=args.seed,
        tokenizer=processor.tokenizer,
        streamer=lambda text: print(text, end="", flush=True),
    )
    print()
    if args.explain is not None:
        explain.write(args.explain, model, processor, image, (Path(args.image).name, Path(args.model).name))


def run(work: Callable[[], None]) -> int:
    """Do the work of a command; an error that the user can mend becomes one sentence and exit code 2."""
    try:
        work()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        print(
            "error: the memory is not enough: try --dtype bfloat16, a smaller model or another device", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """`python llava.py ...`"""
    args = parse_arguments(argv)
    return run(lambda: answer(args))


# --- What is in a checkpoint -----------------------------------------------------------------------------------------


def describe_checkpoint(argv: list[str] | None = None) -> int:
    """`python load_weights.py PATH`"""
    parser = argparse.ArgumentParser(description="Say what a checkpoint is, without reading its weights.")
    parser.add_argument("path", help="a checkpoint folder or hub id")
    path = parser.parse_args(argv).path
    return run(lambda: print(describe(find_checkpoint(path))))


def describe(folder: Path) -> str:
    """What a checkpoint is: family, sizes, dtype, memory, and what does not match."""
    model = LlavaForConditionalGeneration.without_weights(read_config(folder))
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    found, misfits = survey(model, folder)
    n = sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # keys and values, two bytes each
    return f"""\
family    LLaVA: {vision.model_type} and {text.model_type}
tower     {vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.num_attention_heads} heads, \
{vision.image_size} pixels in patches of {vision.patch_size}: {config.image_seq_length} tokens a picture
decoder   {text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads \
on {text.num_key_value_heads} key/value heads, a vocabulary of {text.vocab_size}
weights   {len(found)} tensors, {n:,} numbers, {" ".join(sorted({t.dtype for t in found.values()}))}
memory    {4 * n / 1e9:.3g} GB in fp32, {2 * n / 1e9:.3g} GB in bf16 or fp16, {cache / 1e3:.3g} kB a token of context
misfits   {", ".join(misfits) or "none"}"""
