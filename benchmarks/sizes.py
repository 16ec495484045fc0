"""How long a checkpoint takes and how much memory, in a process of its own: a row of the README's table.

python benchmarks/sizes.py CHECKPOINT [IMAGE]
"""

import argparse
import itertools
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one answer of 17 tokens, and count the memory.")
    parser.add_argument("checkpoint")
    parser.add_argument("image", nargs="?", default=ROOT / "images" / "cat-and-apple.jpg")
    args = parser.parse_args()
    clock = [time.monotonic()]

    from clip import open_image
    from command import fast_dtype
    from llava import LlavaForConditionalGeneration, LlavaProcessor

    device = "cpu"
    clock.append(time.monotonic())
    processor = LlavaProcessor.from_pretrained(args.checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, fast_dtype(device), device)
    clock.append(time.monotonic())
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=open_image(args.image), text=prompt)
    model.generate(**inputs, max_new_tokens=1)
    clock.append(time.monotonic())
    model.generate(**inputs, max_new_tokens=1)  # once more, to subtract it from the next
    clock.append(time.monotonic())
    model.generate(**inputs, max_new_tokens=17, eos_token_id=-1)
    clock.append(time.monotonic())

    _, load, first, again, answer = (b - a for a, b in itertools.pairwise(clock))
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("| weights | prompt | load | first token | each further token | peak memory |\n|---|---|---|---|---|---|")
    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"| {weights:.3g} GB {dtype} | {inputs.input_ids.shape[1]} tokens | {load:.2f} s | {first:.2f} s "
        f"| {(answer - again) / 16 * 1000:.0f} ms | {peak:.2f} GB |"
    )


if __name__ == "__main__":
    main()
