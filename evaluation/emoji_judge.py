"""How many questions about unseen scenes of the emoji world a model answers correctly, by kind of question.

`python evaluate.py` prints the table for a model after each stage of its training whose weights are kept (see
training/stage_files.py): in stages/ inside the model's folder, or next to it for the bundled model.
"""

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from hub.files import BUNDLED
from hub.settings import read_config
from llava import LlavaForConditionalGeneration, LlavaProcessor
from training import emoji_world
from training.conversations import messages
from training.stage_files import STAGE_FILES, load_stage, snapshot

# The first seeds of two sets of scenes that training never uses.
UNSEEN = 10**9  # for decisions about the recipe
FINAL = 2 * 10**9  # for published tables: no decision may depend on these
BATCH = 64  # questions
Score = tuple[int, int]  # right answers, questions


def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: list, asked: list[str]
) -> list[str]:
    """Greedy answers to one question per picture, as a batch."""
    turns = [messages([{"from": "human", "value": "<image>\n" + question}]) for question in asked]
    prompts = [processor.template.render(turn, add_generation_prompt=True) for turn in turns]
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
) -> dict[str, Score]:
    """Kind of question -> score over `n_scenes` scenes, from seed `first` on. About half of the questions ask for a
    word or phrase.

    `sprites` may be another artist's. With `apart`, each scene shows a pair of things that training never shows.
    """
    model.eval()
    tally, todo = defaultdict(lambda: [0, 0]), questions(processor, range(first, first + n_scenes), sprites, apart)
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
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


def evaluate_outside(model: LlavaForConditionalGeneration, processor: LlavaProcessor, n: int, first: int) -> Score:
    """How many of `n` crops of photographs that training never used get the answer OUTSIDE."""
    photographs, side = emoji_world.load_photographs(judged=True), processor.image_processor.crop_size["height"]
    crops, asked, said = [], [], []
    for i, seed in enumerate(range(first, first + n)):
        crops.append(emoji_world.make_outside(photographs, seed, side))
        scene = emoji_world.make_truth(seed)  # only for its questions
        asked.append(emoji_world.questions(scene, emoji_world.wording(i))[i % 3][1])
    for start in range(0, n, BATCH):
        said += answers(model, processor, crops[start : start + BATCH], asked[start : start + BATCH])
    return sum(answer == emoji_world.OUTSIDE for answer in said), n


def questions(processor: LlavaProcessor, seeds: range, sprites: dict | None, apart: bool) -> list[tuple]:
    """(picture, truth, kind, question, answer) for each question, sorted by length to keep padding small."""
    sprites, side, found = sprites or emoji_world.load_sprites(), processor.image_processor.crop_size["height"], []
    for seed in seeds:
        picture, truth = emoji_world.make_scene(sprites, seed, side, apart)
        found += [(picture, truth, *turn) for turn in emoji_world.questions(truth, emoji_world.wording(seed))]
    return sorted(found, key=lambda turn: len(turn[3]))


def evaluate_all(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, n_scenes: int, first: int
) -> dict[str, Score]:
    """`evaluate`, with rows for scenes with a pair that training never shows, and for crops of photographs."""
    apart = evaluate(model, processor, n_scenes, apart=True, first=first)["all"]
    found = evaluate(model, processor, n_scenes, first=first) | {"all, on pairs never shown together": apart}
    return found | {"photographs": evaluate_outside(model, processor, n_scenes, first)}


def evaluate_stages(
    folder: Path, n_scenes: int, device: str = "cpu", first: int = UNSEEN, adapter: Path | None = None
) -> None:
    """Print a model's table: a column for each stage whose weights are kept, and the model in 8 and 4 bits.

    With `adapter`, a LoRA's folder, every column is with it, and there are none for earlier stages. A quantized folder
    has no columns for other bits.
    """
    load = partial(
        LlavaForConditionalGeneration.from_pretrained, folder, torch.float32, device, kernels="torch", adapter=adapter
    )
    model, processor = load(), LlavaProcessor.from_pretrained(folder)
    kept = (folder.parent if folder.resolve() == BUNDLED.resolve() else folder) / "stages"
    columns, final = {}, snapshot(model)
    for title, name in ({"with the adapter": None} if adapter else STAGE_FILES).items():
        if name and not (kept / f"{name}.safetensors").is_file():
            continue
        load_stage(model, final, kept, name)
        columns[title] = evaluate_all(model, processor, n_scenes, first)
    for bits in () if read_config(folder).get("quantization_config") else ("int8", "int4"):
        columns[f"in {bits}"] = evaluate_all(load(quantize=bits), processor, n_scenes, first)
    print(table(columns))


def table(columns: dict[str, dict[str, Score]]) -> str:
    """Markdown: a row for each kind of question, the sums last, and the number of questions in the last column."""
    rows = sorted(next(iter(columns.values())), key=lambda row: (row.startswith("all"), row == "all"))
    lines = [f"| question | {' | '.join(columns)} | asked |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [column[row] for column in columns.values()]
        lines.append(f"| {row} | {' | '.join(f'{right / n:.1%}' for right, n in cells)} | {cells[0][1]} |")
    return "\n".join(lines)
