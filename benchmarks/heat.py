"""How often the heat map of --explain highlights the thing that a word names.

    python benchmarks/heat.py [CHECKPOINT] [--scenes 200]

The model describes scenes of the emoji world with two different things, from seeds that training does not use. The
heat of a name is the attention over the patches when its tokens were chosen, for each name in the answer that is
correct. Two measures: is the mean heat per patch higher on the named thing than on the other one (chance: one half)?
Is the hottest patch on the named thing (chance: its share of the picture)?
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.emoji_judge import UNSEEN
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor
from playground.explain import Recorder, study
from training import emoji_world

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]


def scenes(n: int, side: int):
    """n pairs (picture, truth) with two things of different names."""
    sprites = emoji_world.load_sprites()
    seeds = (seed for seed in itertools.count(UNSEEN) if has_two(emoji_world.make_truth(seed)))
    return (emoji_world.make_scene(sprites, seed, side) for seed in itertools.islice(seeds, n))


def has_two(truth: dict) -> bool:
    return len(truth["things"]) == len({thing["name"] for thing in truth["things"]}) == 2


def tokens_of(name: str, ids: list[int], tokenizer) -> list[int]:
    """The indices of the tokens that spell `name` where an answer first contains it; [] if it does not."""
    ends = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
    spoken_of = emoji_world.A_THING.finditer(tokenizer.decode(ids, skip_special_tokens=True).lower())
    found = next((match for match in spoken_of if emoji_world.SINGULAR[match[2]] == name), None)
    starts = [0, *ends]
    return [i for i, end in enumerate(ends) if found and starts[i] < found.end(2) and end > found.start(2)]


def covered(thing: dict, side: int) -> Tensor:  # -> (P,) booleans
    """Which patches have their centre inside the square that a thing is drawn in."""
    middles = (torch.arange(side) + 0.5) / side
    across, down = ((middles - thing[axis]).abs() <= thing["size"] / 2 for axis in "xy")
    return (down[:, None] & across).flatten()


@torch.no_grad()
def measure(model, processor, n: int) -> tuple[list[Tensor], list[float]]:
    """For each correct name: the two measures (2, 1 + L), of all layers and of each, and the thing's area."""
    vision, prompt = model.config.vision_config, processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    hits, areas = [], []
    for picture, truth in scenes(n, vision.image_size):
        watch = Recorder(model)
        inputs = processor(text=prompt, images=picture)
        ids = watch.generate(**inputs, max_new_tokens=60, do_sample=False)
        answer = ids[0, inputs.input_ids.shape[1] :].tolist()
        found = study(watch)
        heat = found.attentions[..., found.patches].float().mean(1)  # (L, N, P)
        heat = torch.cat([heat.mean(0, keepdim=True), heat])
        side = vision.image_size // vision.patch_size
        for thing, other in (truth["things"], truth["things"][::-1]):
            if tokens := tokens_of(thing["name"], answer, processor.tokenizer):
                on, off = covered(thing, side), covered(other, side)
                of_name = heat[:, tokens].mean(1)  # (1 + L, P)
                more = of_name[:, on].mean(-1) > of_name[:, off].mean(-1)
                hits.append(torch.stack([more, on[of_name.argmax(-1)]]))
                areas.append(on.float().mean().item())
    return hits, areas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=BUNDLED, help="a folder (default: the bundled tiny model)")
    parser.add_argument("--scenes", type=int, default=200, help="how many (default: %(default)s)")
    args = parser.parse_args()
    if args.scenes < 1:
        parser.error("--scenes must be at least 1")
    try:
        model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, torch.float32, kernels="torch")
        processor = LlavaProcessor.from_pretrained(args.checkpoint)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    hits, areas = measure(model, processor, args.scenes)
    if not hits:
        sys.exit(f"the model named nothing correctly in {args.scenes} scenes, so there is no heat to measure")
    print(f"{args.scenes} scenes with two things, {len(hits)} correct names\n")
    print("| heat | more on the named thing than on the other | hottest patch on the named thing |\n|---|---|---|")
    more, hottest = torch.stack(hits).float().mean(0)
    for layer, (x, y) in enumerate(zip(more, hottest, strict=True)):
        print(f"| {f'layer {layer}' if layer else 'mean of all layers'} | {x:.1%} | {y:.1%} |")
    print(f"| chance | 50.0% | {sum(areas) / len(areas):.1%} |")


if __name__ == "__main__":
    main()
