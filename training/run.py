"""Whole runs: the tiny model from nothing, or any LLaVA on somebody's conversations."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hub.files import BUNDLED
from hub.writer import check_can_save, save
from llava import LlavaForConditionalGeneration, LlavaProcessor
from training.conversations import IGNORED, tokenize_conversation, tokenize_plain
from training.emoji_world import OUTSIDE, load_sprites
from training.processes import rank, wait_for_all, world_size
from training.progress import plot
from training.recipes import OURS, Recipe, in_force
from training.records import Records
from training.run_stage import Place, run_stage
from training.stage_files import save_stage, snapshot
from training.stages import STAGES, Stage
from training.tiny_model import new_model, new_processor, start_projector, train_tokenizer
from training.validation import Validation
from training.world_data import World


def train_from_nothing(place: Place, quick: bool = False) -> None:
    """All stages of the recipe, each from where an interrupted run had come. `quick`: a few steps of each."""
    stages = [replace(stage, steps=4, batch=4) for stage in STAGES] if quick else STAGES
    for stage in stages:  # fails here, and not after hours, if a stage's samples cannot be divided
        place.steps(stage, None)
    if quick:
        delete_saved(place, stages[:1])  # it starts again each time
    processor = new_processor(train_tokenizer(1000 if quick else 20000))
    digest = hashlib.sha256(processor.tokenizer.sp.serialized_model_proto()).hexdigest()[:12]
    place.source += f", vocabulary {digest}"
    model = new_model(processor.tokenizer).to(place.device)
    world = World(load_sprites(training=True), processor, varied=True)
    after = {}
    for i, stage in enumerate(stages):
        starts = not (place.folder / f"{stage.name}.pt").is_file()
        delete_saved(place, stages[i + 1 :] if starts else [])  # what is saved of them is of an earlier run
        if stage.name == "align":
            start_projector(model, world.pictures(range(64))[0].to(place.device))
            before = snapshot(model)
        run_stage(stage, model, partial(stage.data, world), place)
        after[stage.name] = snapshot(model)
    if rank() == 0:
        model.generation_config["outside"] = OUTSIDE  # so that a program can tell this answer from others
        save(model.to(torch.bfloat16), processor, place.folder)
        save_stage(before, after["tune"], place.folder / "stages" / "before-alignment.safetensors")
        save_stage(after["align"], before, place.folder / "stages" / "after-alignment.safetensors")
        plot(place.folder / "log.csv", place.folder / "log.png")
        print(f"saved to {place.folder}: python llava.py --model {place.folder} --image images/cat-and-apple.jpg")
        if quick:
            print("(after so few steps an empty or senseless answer is to be expected)")


def delete_saved(place: Place, stages: list[Stage]) -> None:
    if rank() == 0:
        for stage in stages:
            (place.folder / f"{stage.name}.pt").unlink(missing_ok=True)
    wait_for_all()


def train_on_records(
    place: Place,
    data: Path,
    images: Path | None = None,
    checkpoint: str | Path = BUNDLED,
    steps: int | None = None,
    batch: int = 16,
    lr: float = 2e-5,
    adapter: Path | None = None,
    recipe: Recipe = OURS,
) -> None:
    """LLaVA's second stage, or the one of `recipe`, on a file of records, from a checkpoint or one with an adapter."""
    dtype = None if place.shard and adapter is None else torch.float32  # None: stays in its file until it is divided
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype, place.start, kernels="torch", adapter=adapter
    )
    model.vision_tower.float()
    processor = LlavaProcessor.from_pretrained(checkpoint)
    check_can_save(model, processor)  # fails here, and not after hours
    stage = next(stage for stage in STAGES if stage.name == recipe.stage)
    saves_frozen = recipe.stage != "align"  # in which nearly all is frozen
    stage = replace(stage, steps=steps or 0, batch=batch, lr=lr, saves_frozen=saves_frozen)
    start = f"on {checkpoint}" + (f" with {adapter}" if adapter else "")
    run_on_records(place, stage, model, processor, data, images, start, recipe=recipe)
    if rank() == 0:
        for parameter in model.parameters():  # not by model.to, which fails on a model that was divided
            parameter.data = parameter.data.to(torch.bfloat16)
        is_plain = recipe.template == "plain"  # in which nobody asks a question
        save(model, processor if is_plain else recipe.processor(processor), place.folder)
        print(f"saved to {place.folder}")


def run_on_records(
    place: Place,
    stage: Stage,  # with steps=0: once through the file
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    data: Path,
    images: Path | None,
    start: str,  # what the run starts from: it is resumed only from the same
    batches: Callable = lambda conversations, samples: conversations(samples),
    recipe: Recipe = OURS,
) -> None:
    """One stage on a file of conversations. With `place.shard` only process 0 has the result."""
    model.config.ignore_index = IGNORED
    records = read_records(recipe, model, processor, data, images or data.parent, stage.batch)
    held = records.hold_back(recipe.validate, recipe.seed) if recipe.validate is not None else None
    for part in (records, held) if held else (records,):
        part.conversations(range(1))  # fails here if no picture can be opened
    place.source = f"{data} (sha256 {hashlib.sha256(data.read_bytes()).hexdigest()[:12]}), {start}{recipe.source()}"
    steps = stage.steps or -(-len(records.records) // stage.batch)
    stage = replace(stage, steps=steps, warm_up=recipe.warm_up, betas=recipe.betas)
    if rank() == 0:
        rates = {"batch": stage.batch, "lr": stage.lr, "projector_lr": stage.projector_lr}
        print(in_force(replace(recipe, **rates), records.processor, records.longest))
        for line in records.skipped:
            print(f"skipped: {line}")
        beside = f" ({len(held.records)} more are held back)" if held else ""
        print(f"{len(records.records)} conversations{beside}, {stage.steps} steps of {stage.batch}")
    pieces = world_size() * place.accumulate
    validation = held and Validation(
        stage, partial(batches, held.conversations), len(held.records), stage.batch // pieces
    )
    run_stage(stage, model, partial(batches, records.conversations), place, validation)
    if held and rank() == 0:
        plot(place.folder / "log.csv", place.folder / "log.png")
    if place.shard:
        from training.shard import make_whole

        make_whole(model, frozen=stage.saves_frozen)


def read_records(recipe: Recipe, model, processor: LlavaProcessor, data: Path, images: Path, batch: int) -> Records:
    """The records of a file as the recipe reads them."""
    context = model.config.text_config.max_position_embeddings
    return Records(
        *(data, images, recipe.processor(processor), min(context, recipe.max_length or context)),
        tokenize=tokenize_plain if recipe.template == "plain" else tokenize_conversation,
        cuts=recipe.max_length is not None,
        group=batch if recipe.group else 0,
    )
