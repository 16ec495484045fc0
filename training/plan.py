"""What memory a run on a file of conversations needs, computed before a weight is read.

    needed = weights + optimizer state + gradients + activations + what the process itself takes

Weights, gradients and AdamW's two moments follow from the shapes and dtypes in config.json and in the headers of the
files. For the activations one step runs on fake tensors: PyTorch's tensors with a shape, a dtype and a device, but no
numbers. The code is that of training, so everything that autograd keeps and every temporary tensor is counted, and
no formula has to be kept up to date by hand. The step has the longest conversations of the file.

Weights that do not change and have their dtype in the file stay mapped from it: they need memory to be fast, but the
system can drop their pages and read them again.

    B batch    T tokens    P patches
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hub.device import fast_dtype, free_bytes, own_bytes, return_freed_memory
from hub.files import find_checkpoint
from hub.settings import read_config
from hub.tensors import no_weights
from hub.writer import check_can_save
from llava import LlavaForConditionalGeneration, LlavaProcessor
from load_weights import stored_tensors
from quantize import expect_packed, quantize_model, unpack
from training.attention import use_training_attention
from training.lora import Lora, LoraLoss, add_lora, multiply_in_float32
from training.losses import NextTokenLoss
from training.processes import rank, world_size
from training.recipes import OURS, Recipe
from training.recompute import recompute_layers
from training.records import Records, dialogue, pictures_of
from training.run import read_records
from training.run_stage import Place, choose_parameters
from training.stages import STAGES, Stage
from training.steps import backward
from training.tune_adapter import check

FILE_NAMES = [(".base.", "."), (".packed", ".weight_packed"), (".scale", ".weight_scale")]  # ours, and a file's
RANK = 16  # of the LoRA that is suggested
UNKNOWN = 300_000_000  # bytes of Python and PyTorch, where the system does not say
STATE = 2  # AdamW's moments: numbers for each one that learns


@dataclass(frozen=True)
class Piece:
    """Conversations that are processed at a time: B of T tokens, `labels` of which count, and their pictures."""

    B: int
    T: int
    labels: int
    pictures: int


def longest_conversations(records: Records, count: int) -> list[tuple[int, int, int]]:
    """Tokens, labels and pictures of each, the longest last. Only what looks long is tokenized."""

    def tokens(record: dict) -> float:  # about: four letters to a token
        letters = sum(len(turn["value"]) for turn in dialogue(record))
        return letters / 4 + len(pictures_of(record)) * records.processor.image_seq_length

    found = []
    for record in sorted((record for _, record in records.records), key=tokens, reverse=True):
        with suppress(ValueError):  # it is too long, and will be skipped
            images, (ids, labels) = records.read_text(record)
            found.append((len(ids), sum(label >= 0 for label in labels[1:]), len(images)))
        if len(found) == 4 * count + 16:
            break
    if not found:
        raise ValueError(f"none of the conversations in {records.file} can be trained on")
    return sorted(found)[-count:]


def largest_piece(longest: list[tuple[int, int, int]], B: int) -> Piece:
    rows = (longest * B)[-B:]  # a file of fewer than B conversations is read several times
    tokens, labels, pictures = zip(*rows, strict=True)
    return Piece(B, max(tokens), sum(labels), sum(pictures))


# --- The model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the memory of a run depends on, besides its conversations."""

    checkpoint: str | Path
    place: Place
    batch: int  # of a step, over all processes
    lora: Lora | None = None
    quantize: str | None = None
    recipe: Recipe = OURS

    @property
    def stage(self) -> Stage:
        return next(stage for stage in STAGES if stage.name == self.recipe.stage)

    @property
    def folder(self) -> Path:
        return find_checkpoint(self.checkpoint)

    @property
    def pieces(self) -> int:
        return self.place.accumulate

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.place.device).type == "cpu"

    @property
    def share(self) -> int:  # conversations in a piece
        return self.batch // (world_size() * self.pieces)


def model_of(run: Run) -> LlavaForConditionalGeneration:
    """The model as it will be loaded, on the meta device."""
    settings = read_config(run.folder)
    model = LlavaForConditionalGeneration.without_weights(settings)
    if settings.get("quantization_config"):
        unpack(model, expect_packed(model, run.folder, settings).bits)
    elif run.quantize:
        quantize_model(model, run.quantize)
    model.tie_weights()
    return model.float() if run.lora is None else model.bfloat16()


def objective_of(run: Run) -> nn.Module:
    """The loss and the model as they will be trained, on the meta device."""
    model = model_of(run)
    if run.lora is None:
        choose_parameters(objective := NextTokenLoss(model), run.stage.trainable)
        return objective
    with no_weights():
        masks = add_lora(model, run.lora)
    if fast_dtype(run.place.device) != torch.bfloat16:
        multiply_in_float32(model)
    return LoraLoss(model, masks)


def weight_bytes(objective: nn.Module, run: Run) -> tuple[int, int]:
    """Bytes of the weights in memory, and of those that stay mapped from the files."""
    dtypes = {name: tensor.dtype for name, _, tensor in stored_tensors(run.folder)}  # of headers: no weight is read
    loaded_in = torch.bfloat16 if run.lora else torch.float32
    held = mapped = 0
    for name, parameter in objective.model.named_parameters():
        in_file = dtypes.get(reduce(lambda name, pair: name.replace(*pair), FILE_NAMES, name))
        unchanged = in_file == loaded_in == parameter.dtype or (in_file is not None and name.endswith(".packed"))
        if run.on_cpu and unchanged and not parameter.requires_grad:
            mapped += parameter.nbytes
        else:
            held += parameter.nbytes
    return held, mapped


# --- One step --------------------------------------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Counts the bytes of the live tensors that were made inside, and their peak."""

    def __init__(self, before: list[Tensor]):
        super().__init__()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:  # no view
                self.known.add(storage)
                weakref.finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return out

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def step_bytes(objective: nn.Module, run: Run, piece: Piece) -> int:
    """The most that gradients and activations take together in a step. `objective`, on the meta device, is changed."""
    device = run.place.device if torch.device(run.place.device).type == "cuda" else "cpu"
    use_training_attention(objective)
    if run.place.recompute:
        recompute_layers(objective.model)
    with FakeTensorMode():
        objective.train()._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device))
        objective.model.tie_weights()
        skip_values(objective, piece)
        with Living(list(objective.parameters())) as living:
            batches = [fake_batch(objective, piece) for _ in range(min(run.pieces, 2))]  # a third is like the second
            backward(objective, objective.count, batches, device, run.place.autocast)
    return living.most


def fake_batch(objective: nn.Module, piece: Piece) -> dict[str, Tensor]:
    vision = objective.model.config.vision_config
    ids = torch.zeros(piece.B, piece.T, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if piece.pictures:
        size = vision.image_size
        batch["pixel_values"] = torch.zeros(piece.pictures, vision.num_channels, size, size)
    return batch | ({"samples": torch.arange(piece.B)} if isinstance(objective, LoraLoss) else {})


def skip_values(objective: nn.Module, piece: Piece) -> None:
    """Replace what depends on the values of ids and labels by operations of the same size that do not."""
    model = objective.model

    def merge(ids: Tensor, features: Tensor) -> Tensor:
        x = model.language_model.embed_tokens(ids)
        return x.masked_scatter((ids > 0)[..., None], features.to(x.dtype))

    def of_labels(x: Tensor, labels: Tensor) -> Tensor:
        rows = torch.arange(piece.labels, device=x.device)
        x = model.language_model(x)[:, :-1].flatten(0, 1)[rows]
        return objective.of_rows(x, labels[:, 1:].flatten()[rows])

    model.merge, model.embed, objective.of_labels = merge, model.language_model.embed_tokens, of_labels


# --- The plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Bytes of one process, on its device."""

    learning: int  # parameters that learn
    weights: int
    mapped: int  # weights in files, which the system can drop and read again
    gradients: int  # with DistributedDataParallel's copy of them
    state: int  # of the optimizer
    activations: int  # what else exists when gradients and activations together are largest
    process: int  # Python and PyTorch

    @property
    def needed(self) -> int:
        return self.weights + self.gradients + self.state + self.activations + self.process


def plan(run: Run, piece: Piece) -> Plan:
    objective = objective_of(run)
    parameters = list(objective.model.parameters())
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    numbers, gradients = sum(p.numel() for p in learning), sum(p.nbytes for p in learning)
    held, mapped = weight_bytes(objective, run)
    activations = step_bytes(objective, run, piece) - gradients
    buckets = gradients * (world_size() > 1)  # DistributedDataParallel's copy of the gradients
    process = (own_bytes() or UNKNOWN) if run.on_cpu else 0
    return Plan(numbers, held, mapped, gradients + buckets, STATE * gradients, activations, process)


def cheaper(run: Run) -> Iterator[tuple[str, Run]]:
    """Flags that make a run need less memory, each added to those before it, the least costly first."""
    most, flags = run.batch // world_size(), []
    if run.pieces < most:
        flags, run = [f"--accumulate {most}"], replace(run, place=replace(run.place, accumulate=most))
        yield flags[0], run
    if not run.place.recompute and not run.place.compile:
        flags, run = [*flags, "--recompute"], replace(run, place=replace(run.place, recompute=True))
        yield " ".join(flags), run
    packed = bool(read_config(run.folder).get("quantization_config"))
    if run.lora is None and not packed:
        flags, run = [*flags, f"--lora {RANK}"], replace(run, lora=Lora(RANK, 2 * RANK))
        yield " ".join(flags), run
    if run.quantize != "int4" and not packed:
        flags, run = [*flags, "--quantize int4"], replace(run, quantize="int4")
        yield " ".join(flags), run


def table(piece: Piece, needs: Plan, free: int | None) -> str:
    """The plan as text, a row for each kind of memory."""
    rows = [("weights", needs.weights), ("gradients", needs.gradients), ("optimizer state", needs.state)]
    rows += [("activations", needs.activations), ("Python and PyTorch", needs.process), ("together", needs.needed)]
    rows += [("mapped from files", needs.mapped)] * bool(needs.mapped)
    rows += [("free", free)] * (free is not None)
    batch = f"{piece.B} x {piece.T} tokens and {piece.pictures} pictures at a time"
    head = f"{needs.learning:,} numbers learn from up to {batch}. Each process needs"
    return "\n".join([head, *(f"{name:>20} {size / 1e9:8.2f} GB" for name, size in rows)])


def read_longest(run: Run, data: Path, images: Path | None = None) -> list[tuple[int, int, int]]:
    """longest_conversations of the file `data`: as many as the run takes at a time without --accumulate."""
    processor = LlavaProcessor.from_pretrained(run.folder)
    records = read_records(run.recipe, model_of(run), processor, data, images or data.parent, run.batch)
    return longest_conversations(records, run.batch // world_size())


def check_memory(run: Run, data: Path, images: Path | None, show: bool) -> None:
    """Raise ValueError, after printing the plan, if a run on the file `data` cannot fit. `show`: print it always.

    Where a run takes more than half of a computer's free memory, freed memory is given back at once from now on.
    """
    check_trainable(run)
    run.place.steps(replace(run.stage, batch=run.batch), None)  # ValueError if the samples cannot be divided
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if run.on_cpu else 1  # processes that share the free memory
    free, longest = free_bytes(run.place.device), read_longest(run, data, images)

    def fits(needs: Plan) -> bool:  # `free` is what is left besides this process
        return free is None or copies * (needs.needed - needs.process) <= free

    needs = plan(run, piece := largest_piece(longest, run.share))
    if run.on_cpu and free is not None and 2 * copies * needs.needed > free:
        return_freed_memory()
    if fits(needs) and not show:
        return
    lines, remedy = [table(piece, needs, free)], "try a smaller model"
    for flags, other in reversed([*cheaper(run)]):
        with suppress(ValueError):  # --lora or --quantize is not for this model
            check_trainable(other)
            less = plan(other, largest_piece(longest, other.share))
            lines.insert(1, f"with {flags}: {less.needed / 1e9:.2f} GB" + ", which fits" * fits(less))
            remedy = f"{flags} makes it fit" if fits(less) else remedy
    if rank() == 0:
        print(*lines, sep="\n")
    if not fits(needs):
        each = f" in each of {copies} processes" * (copies > 1)
        raise ValueError(f"the run needs {needs.needed / 1e9:.2f} GB{each}, and {free / 1e9:.2f} are free: {remedy}")


def check_trainable(run: Run) -> None:
    """Raise ValueError for a model that cannot be trained this way, before it is loaded."""
    if run.lora:
        check(run.checkpoint, run.place.folder)
    else:
        check_can_save(model_of(run), LlavaProcessor.from_pretrained(run.folder))
