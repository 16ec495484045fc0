"""Whole runs with adapters: `train.py --lora` trains one, and `train.py --merge` merges one into its base."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hub.adapter import LLAVA_WHOLE, read_adapter, write_adapter
from hub.device import fast_dtype
from hub.files import find_checkpoint, read_json
from hub.settings import read_config
from hub.writer import check_finite, hub_name, replaced_files, save, write_json, write_processor, write_shards
from llava import LlavaForConditionalGeneration, LlavaProcessor
from load_weights import our_name
from training.lora import Lora, LoraLoss, add_lora, multiply_in_float32
from training.processes import rank
from training.recipes import OURS, Recipe
from training.run import run_on_records
from training.run_stage import Place
from training.stages import STAGES

PROCESSOR = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")  # what write_processor writes
COPIED = {".json", ".model", ".jinja", ".txt", ".md"}  # suffixes of a checkpoint's other files


def train_adapter(
    place: Place,
    data: Path,
    images: Path | None,
    checkpoint: str | Path,
    steps: int | None,
    batch: int,
    lr: float,
    projector_lr: float,
    lora: Lora,
    quantize: str | None = None,
    adapter: Path | None = None,  # to continue
    recipe: Recipe = OURS,
) -> None:
    """LLaVA's finetune_lora on a file of conversations. Writes PEFT's two files to the folder of `place`."""
    processor = check(checkpoint, place.folder)  # fails before the model is loaded
    before = None if adapter is None else read_adapter(adapter, our_name)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, torch.bfloat16, place.start, quantize, kernels="torch"
    )
    masks = add_lora(model, lora, before)
    if fast_dtype(place.device) != torch.bfloat16:
        multiply_in_float32(model)
    stage = replace(
        STAGES[-1], name="lora", trainable=("multi_modal_projector", ".lora_"), loss=partial(LoraLoss, masks=masks),
        steps=steps or 0, batch=batch, lr=lr, projector_lr=projector_lr, saves_frozen=False,
    )  # fmt: skip
    how = f"on {checkpoint} in {quantize or 'bfloat16'} from {adapter or 'new matrices'}, {lora}, {projector_lr}"
    run_on_records(place, stage, model, processor, data, images, how, numbered, recipe)
    if rank() == 0:
        base = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else str(checkpoint)
        write_adapter(model, place.folder, lora, base)
        if (recipe.template, recipe.pad) != (None, None):  # for `merge`
            write_processor(recipe.processor(processor), model.config, place.folder)
        flags = f"--model {checkpoint} --adapter {place.folder}" + (f" --quantize {quantize}" if quantize else "")
        print(f"saved to {place.folder}: python llava.py {flags} --image x.jpg")


def check(checkpoint: str | Path, out: Path) -> LlavaProcessor:
    """The processor of a checkpoint, if --lora can train it and `out` can hold the adapter. Else ValueError."""
    if (out / LLAVA_WHOLE).is_file():
        raise ValueError(f"{out} has a {LLAVA_WHOLE}, which would be read with the new adapter: choose another --out")
    processor = LlavaProcessor.from_pretrained(checkpoint)
    if not hasattr(processor.template, "system"):
        raise ValueError("--lora needs a checkpoint with LLaVA-1.5's prompt template")
    if read_config(find_checkpoint(checkpoint))["image_grid_pinpoints"]:
        raise ValueError("--lora cannot train LLaVA-1.6, whose pictures are cut into tiles: give a LLaVA-1.5")
    return processor


def numbered(data: Callable[[range], dict[str, Tensor]], samples: range) -> dict[str, Tensor]:
    return data(samples) | {"samples": torch.tensor(samples)}


def merge(checkpoint: str | Path, adapter: str | Path, out: Path) -> None:
    """Write a plain checkpoint, in the dtype of the base's: the base with the adapter merged into its matrices.

    It gets the template and the treatment of pictures that the adapter was trained with, if they are in its folder.
    """
    folder = find_checkpoint(checkpoint)
    if read_config(folder).get("quantization_config"):
        raise ValueError(f"the adapter cannot be merged into {folder}, which is quantized: give the base it came from")
    model = LlavaForConditionalGeneration.from_pretrained(folder, kernels="torch", adapter=adapter)
    config = read_json(folder / "config.json")
    if "mm_vision_tower" in config:  # the layout of LLaVA's authors
        return save(model, LlavaProcessor.from_pretrained(folder), out)
    check_finite(dict(model.named_parameters()))
    tied = {"tie_word_embeddings": model.config.tie_word_embeddings}  # no longer, if the adapter changes the head
    config |= tied | {"text_config": config["text_config"] | tied}
    with replaced_files(out) as scratch:
        own = [file for name in PROCESSOR if (file := Path(adapter) / name).is_file()]
        for file in [*sorted(folder.iterdir()), *own]:
            if file.suffix in COPIED and not file.name.endswith(".index.json"):
                shutil.copyfile(file, scratch / file.name)
        if own:  # it would take precedence over chat_template.jinja
            (scratch / "chat_template.json").unlink(missing_ok=True)
        write_json(scratch / "config.json", config)
        write_shards([((hub_name(name), p) for name, p in model.named_parameters())], scratch, 5e9)
