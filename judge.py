"""How good a model is at the emoji world: questions about unseen scenes, and the share of right answers as a table.

`python train.py --evaluate` judges a model after each stage of its training. In its folder (of the bundled one, beside
it) small files keep the tensors that were other then: stages/before-alignment.safetensors and after-alignment.
"""

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import emoji_world
from arguments import BUNDLED
from batches import messages
from llava import LlavaForConditionalGeneration, LlavaProcessor
from save_checkpoint import check_finite, replaced_files, write_tensors

# The first seeds of two sets of scenes that training never draws.
UNSEEN = 10**9  # for decisions about the recipe
FINAL = 2 * 10**9  # for published tables: no decision may depend on these
KEPT = {"before alignment": "before-alignment", "after alignment": "after-alignment", "after tuning": None}


def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: list, asked: list[str]
) -> list[str]:
    """Greedy answers to one question per picture, as a batch."""
    prompts = [processor.template.render(messages([{"from": "human", "value": "<image>\n" + q}])) for q in asked]
    inputs = processor(images=pictures, text=prompts, padding=True).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=60)
    return processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    n_scenes: int,
    sprites: dict | None = None,
    apart: bool = False,
    first: int = UNSEEN,
) -> dict[str, tuple[int, int]]:
    """Kind of question -> (right, asked), over the scenes from seed `first` on; about half of the questions ask for a
    word or phrase.

    `sprites` may be of another artist; with `apart`, every scene shows two things that training never shows together.
    """
    model.eval()
    sprites, tally, todo = sprites or emoji_world.load_sprites(), defaultdict(lambda: [0, 0]), []
    side = processor.image_processor.crop_size["height"]
    for seed in range(first, first + n_scenes):
        picture, truth = emoji_world.make_scene(sprites, seed, side, apart)
        todo += [(picture, truth, *turn) for turn in emoji_world.questions(truth, emoji_world.wording(seed))]
    todo.sort(key=lambda turn: len(turn[3]))  # questions of one length waste no padding
    for start in range(0, len(todo), 64):
        part = todo[start : start + 64]
        said = answers(model, processor, [picture for picture, *_ in part], [question for *_, question, _ in part])
        for (_, truth, kind, question, _), answer in zip(part, said, strict=True):
            form = "word" if question.endswith(emoji_world.SHORT) else "sentence"
            for row in (kind.partition(":")[0], f"all, in a {form}", "all"):
                tally[row][0] += emoji_world.score(kind, answer, truth)
                tally[row][1] += 1
        if sys.stderr.isatty():
            end = "\n" if start + len(part) == len(todo) else ""
            print(f"\r{start + len(part)} of {len(todo)} questions", end=end, file=sys.stderr)
    return {row: (right, n) for row, (right, n) in tally.items()}


def evaluate_stages(folder: Path, n_scenes: int, device: str = "cpu", first: int = UNSEEN) -> None:
    """Print the table of a model: a column for each of its stages that is kept, and one for its weights in int8."""
    load = partial(LlavaForConditionalGeneration.from_pretrained, folder, torch.float32, device)
    model, processor = load(), LlavaProcessor.from_pretrained(folder)
    kept = (folder.parent if folder.resolve() == BUNDLED.resolve() else folder) / "stages"
    columns, final = {}, snapshot(model)
    for title, name in KEPT.items():
        if name and not (kept / f"{name}.safetensors").is_file():
            continue
        load_stage(model, final, kept, name)
        columns[title] = evaluate_all(model, processor, n_scenes, first)
    columns["in int8"] = evaluate_all(load(quantize="int8"), processor, n_scenes, first)
    print(table(columns))


def evaluate_all(model, processor, n_scenes: int, first: int) -> dict[str, tuple[int, int]]:
    apart = evaluate(model, processor, n_scenes, apart=True, first=first)["all"]
    return evaluate(model, processor, n_scenes, first=first) | {"all, on pairs never shown together": apart}


def load_stage(model: nn.Module, final: dict[str, Tensor], kept: Path, name: str | None) -> None:
    """Make the model what it was after a stage: one of KEPT's files, or the final one for None."""
    model.load_state_dict(final)
    for file in dict.fromkeys(("before-alignment", name)) if name else ():  # the second on top of the first
        model.load_state_dict(load_file(kept / f"{file}.safetensors"), strict=False)


def table(columns: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Markdown: a row for each kind of question, the sums last, and how many were asked in the last column."""
    rows = sorted(next(iter(columns.values())), key=lambda row: (row.startswith("all"), row == "all"))
    lines = [f"| question | {' | '.join(columns)} | asked |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [column[row] for column in columns.values()]
        lines.append(f"| {row} | {' | '.join(f'{right / n:.1%}' for right, n in cells)} | {cells[0][1]} |")
    return "\n".join(lines)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def save_stage(then: dict[str, Tensor], other: dict[str, Tensor], file: Path) -> None:
    """Write the tensors of `then` that differ from those of `other`, in bfloat16."""
    changed = {name: tensor for name, tensor in then.items() if not torch.equal(tensor, other[name])}
    changed = {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in changed.items()}
    check_finite(changed)
    with replaced_files(file.parent) as scratch:
        write_tensors(changed, scratch / file.name)
