"""Find the first module whose output differs from that of transformers, for those who port a model.

    python tests/first_difference.py MODEL [--image FILE] [--prompt TEXT] [--tolerance X] [--all]

Both models answer the same prompt about the same picture, in float32. The output of every module that both have is
compared in the order of execution: tokens, pixels, the tower's layers, the projector, the merged embeddings, each
decoder layer's attention and MLP, and the scores. The first one that differs by more than the tolerance, relative to
its largest number, is named. Exit code 0 if there is none, else 2.

A module's difference can come from its input: look at the first name only.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers  # before our folder is in sys.path: it would mistake our kernels/ for Hugging Face's package
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from cli import run
from cli.answer import render
from hub.files import BUNDLED, find_checkpoint
from hub.pictures import open_image
from llava import LlavaForConditionalGeneration, LlavaProcessor

PICTURE = Path(__file__).parent.parent / "images" / "cat-and-apple.jpg"
MERGED = "language_model.layers.0.input"  # the prompt's embeddings with the patches in it


def by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by our names: transformers puts all but the head into `model`."""
    return {name.removeprefix("model."): module for name, module in model.named_modules() if name}


@torch.no_grad()
def trace(model: nn.Module, names: set[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output of each named module, in the order in which they run."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output) -> None:
            found.setdefault(name, output[0] if isinstance(output, tuple) else output)

        return hook

    def keep_merged(module: nn.Module, args: tuple) -> None:
        found.setdefault(MERGED, args[0])

    with ExitStack() as hooks:
        modules = by_name(model)
        hooks.callback(modules["language_model.layers.0"].register_forward_pre_hook(keep_merged).remove)
        for name in names:
            hooks.callback(modules[name].register_forward_hook(keep(name)).remove)
        model(**inputs, use_cache=False)
    return {name: output for name, output in found.items() if isinstance(output, Tensor)}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite for other shapes and for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    apart = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-12)
    return apart.item() if apart.isfinite() else float("inf")


def differences(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor]) -> dict[str, float]:
    """The distance of each output that both models have, in the order in which ours computes them."""
    names = by_name(ours).keys() & by_name(theirs).keys()
    names -= {"language_model.embed_tokens"}  # its output at <image> is arbitrary: MERGED is compared instead
    mine, other = trace(ours, names, inputs), trace(theirs, names, inputs)
    return {name: distance(mine[name], other[name]) for name in mine if name in other}


def first_difference(found: dict[str, float], tolerance: float) -> tuple[str, float] | None:
    return next(((name, apart) for name, apart in found.items() if apart > tolerance), None)


def compare(model: str | Path, image: str | Path, prompt: str, tolerance: float) -> dict[str, float]:
    """The distances of tokens, pixels and all outputs for a checkpoint, in the prompt template that it has."""
    folder = find_checkpoint(model)
    processor, image = LlavaProcessor.from_pretrained(folder), open_image(image)
    prompt = render(processor, prompt, 1, None)
    inputs = processor(text=prompt, images=image)
    reference = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    named = prompt.replace("<image>", reference.image_token)  # JoyCaption's has another name
    expected = reference(text=named, images=image, return_tensors="pt")
    found = {name: distance(inputs[name], expected[name]) for name in inputs}
    if first_difference(found, tolerance):  # the models would get different inputs
        return found
    ours = LlavaForConditionalGeneration.from_pretrained(folder, torch.float32, kernels="torch")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return found | differences(ours, theirs, dict(inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Name the first module that differs from transformers.")
    parser.add_argument("model", nargs="?", default=BUNDLED, help="a checkpoint (default: the bundled one)")
    parser.add_argument("--image", default=PICTURE)
    parser.add_argument("--prompt", default="Describe the picture.")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative (default: 1e-4)")
    parser.add_argument("--all", action="store_true", help="print every module's difference")
    args = parser.parse_args()
    found = compare(args.model, args.image, args.prompt, args.tolerance)
    if args.all:
        print("\n".join(f"{apart:9.2e}  {name}" for name, apart in found.items()))
    if differs := first_difference(found, args.tolerance):
        raise ValueError(f"{differs[0]} is the first of {len(found)} outputs that differs, by {differs[1]:.2g}")
    print(f"{len(found)} outputs are equal, up to {max(found.values()):.2g} of the largest number")


if __name__ == "__main__":
    raise SystemExit(run(main))
