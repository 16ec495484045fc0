"""The recipe: a tiny LLaVA from nothing, stage by stage, on pictures and conversations of the emoji world.

    stage     what learns             from                            in LLaVA-1.5
    tower     the vision tower        parts of pictures, with words   CLIP, trained by others
    decoder   decoder and head        text, pictures spelt in words   Vicuna, trained by others
    align     only the projector      pictures with captions          558,000 captions, lr 1e-3
    tune      projector and decoder   conversations about pictures    665,000 conversations, lr 2e-5

    python train.py                   all stages; a stopped run goes on where it was
    python train.py --quick           all stages in a minute, to see the machinery (it learns next to nothing)
    python train.py --evaluate        how often the bundled model is right, by kind of question
    python train.py --evaluate FOLDER how often another one is, after each stage that is kept with it
    python train.py --data my.json --images DIR --out DIR      tune the bundled model on your own conversations
    torchrun --nproc-per-node=2 train.py                       the same steps, each shared between two processes

The pictures are drawn as they are needed: picture n is the scene with seed n, so no picture is seen twice in a stage,
and a run that resumes at a step sees what it would have seen. Seeds from judge.UNSEEN up are for judging only: those
from judge.FINAL up (--final) for published tables, the others for decisions about the recipe.
"""

import argparse
import csv
import hashlib
import io
import logging
import math
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import sentencepiece

# Every batch has new shapes, and oneDNN keeps what it has made ready for 1,024 of them: that came to 12 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import emoji_world
from batches import Records, Steps, World, messages
from clip import CLIPVisionConfig, ImageProcessor
from command import BUNDLED, check_device, fast_dtype, run
from judge import FINAL, UNSEEN, evaluate_stages, save_stage, snapshot
from llama import LlamaConfig
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from losses import ContrastiveLoss, NextTokenLoss, SpeltOutLoss, init_weights, world_size
from save_checkpoint import save
from tokenizer import TEMPLATES, Tokenizer

SIDE = 112  # pixels
KEEP_EVERY, REPORT_EVERY = 100, 20  # steps
VISION = CLIPVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=3,
    image_size=SIDE,
    patch_size=14,
    hidden_act="gelu",
)
TEXT = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    tie_word_embeddings=True,  # one table to read and to say: a decoder that can repeat one word can repeat them all
)


# --- What is trained -------------------------------------------------------------------------------------------------


def train_tokenizer(scenes: int = 20000) -> Tokenizer:
    """A vocabulary from the world's text, with Llama's settings: with others the reference's ids would differ."""
    rng = random.Random(0)
    text = []
    for i in range(scenes):
        truth = emoji_world.make_truth(i)
        said = messages(emoji_world.conversation(truth, rng, turns=9))
        text += [emoji_world.caption(truth, rng), TEMPLATES["v1"].render(said)]
    text = [line for part in text for line in part.replace("<image>", "\n").replace("</s>", "\n").split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=1300,  # enough for every word of a thing's name to be a token
        byte_fallback=True,  # what is not in the vocabulary is spelt in bytes
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        required_chars="".join(map(chr, range(33, 127))),
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def new_model(tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
    size = max(tokenizer.special_names) + 1
    text = replace(TEXT, vocab_size=-(-size // 64) * 64)  # rounded up, as the hub's checkpoints do
    model = LlavaForConditionalGeneration(
        # LLaVA reads CLIP's layer -2: the last one has learnt to serve the class token, which CLIP's contrast looks
        # at. Our contrast looks at patches, so the last layer is the best.
        LlavaConfig(VISION, text, image_token_index=tokenizer.image_token_id, vision_feature_layer=-1)
    )
    init_weights(model)
    # Words large enough to outlast what the layers add to them, or repeating a word is learnt late.
    nn.init.normal_(model.language_model.embed_tokens.weight, std=0.05)
    # The more layers, the less each adds: GPT-2's way.
    for layer in model.language_model.layers:
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            matrix.data /= (2 * text.num_hidden_layers) ** 0.5
    return model


@torch.no_grad()
def start_projector(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> None:
    """Give every feature of the tower the same say, and the projected patches the size of words.

    A tower lets a few features grow a hundred times larger than the others, the same for all patches. Behind a plain
    random projector they would drown what tells a cat from a dog.
    """
    first, second = model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2
    features = model.vision_tower(pixel_values)[-1][:, 1:].flatten(0, 1)  # (B * P, D), of the layer that is read
    nn.init.normal_(first.weight, std=features.shape[1] ** -0.5)
    first.weight /= features.std(0)
    first.bias.copy_(-first.weight @ features.mean(0))
    words, patches = model.language_model.embed_tokens.weight, model.multi_modal_projector(features)
    second.weight *= words.std() / patches.std()


# --- The stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    name: str
    trainable: tuple[str, ...]  # the model's parts that change; all others are frozen
    data: Callable[[World, range], dict[str, Tensor]]
    loss: Callable[[LlavaForConditionalGeneration], nn.Module]
    steps: int
    batch: int  # pictures (or texts) a step
    lr: float  # the highest, after warming up


STAGES = [
    Stage("tower", ("vision_tower",), World.parts, ContrastiveLoss, steps=4500, batch=256, lr=1.5e-3),
    Stage("decoder", ("language_model", "lm_head"), World.text, SpeltOutLoss, steps=10000, batch=16, lr=5e-4),
    Stage("align", ("multi_modal_projector",), World.captions, NextTokenLoss, steps=3000, batch=16, lr=1e-3),
    Stage(
        "tune",
        ("multi_modal_projector", "language_model", "lm_head"),
        World.conversations,
        NextTokenLoss,
        steps=8000,
        batch=16,
        lr=3e-4,
    ),
]


def learning_rate(step: int, stage: Stage) -> float:
    """Up in a straight line over the first 3 % of the steps, then down along a cosine to zero."""
    warm_up = max(1, round(0.03 * stage.steps))
    if step < warm_up:
        return stage.lr * (step + 1) / warm_up
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, stage.steps - warm_up)))


# --- The loop --------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where and how a run happens: its folder, its device, its share of the work."""

    folder: Path
    device: str = "cpu"
    rank: int = 0
    source: str = "the emoji world"  # what it learns from: a stopped run goes on with the same or not at all
    accumulate: int = 1  # batches that one step is learnt from, one after the other, to save memory
    workers: int = 0  # processes that draw
    compile: bool = False  # let PyTorch write faster code, which takes it a minute a stage

    def autocast(self):
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if fast_dtype(self.device) == torch.bfloat16 else nullcontext()

    def pieces(self, stage: Stage) -> int:
        return 1 if stage.loss is ContrastiveLoss else self.accumulate  # contrast is with all of a batch, or it is less


def run_stage(
    stage: Stage, model: LlavaForConditionalGeneration, data: Callable[[range], dict[str, Tensor]], place: Place
) -> None:
    """Train one stage, or what is left of it: NAME.pt every 100 steps, a row of log.csv every 20."""
    objective = stage.loss(model).to(place.device).train()
    for name, parameter in objective.named_parameters():
        helper = not name.startswith("model.")  # like CLIP's text side, which only the loss has
        parameter.requires_grad_(helper or name.removeprefix("model.").startswith(stage.trainable))
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    place.folder.mkdir(parents=True, exist_ok=True)
    first = resume(stage, objective, optimizer, place)
    log = Log(stage, place, first)
    if first == stage.steps:
        return
    if place.compile:
        torch._logging.set_logs(dynamo=logging.ERROR)  # or it would tell at length that it cannot compile int(sum)
        objective.compile(dynamic=True)
    parallel = DistributedDataParallel(objective) if dist.is_initialized() else objective
    steps = Steps(data, stage.batch, first, stage.steps, place.rank, world_size(), place.pieces(stage))
    for step, batches in enumerate(steps.loader(place.workers), first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        optimizer.zero_grad()
        loss = backward(parallel, objective.count, batches, place)
        norm = nn.utils.clip_grad_norm_(learning, 1.0)
        done = step + 1
        stop_if_diverged(stage, done, "loss", [torch.tensor(loss)], place)
        stop_if_diverged(stage, done, "norm of the gradients", [norm], place)
        optimizer.step()
        if done % KEEP_EVERY == 0 or done == stage.steps:
            keep(stage, done, objective, optimizer, place)
        log.add(done, loss)


def settings(stage: Stage, place: Place) -> str:
    """What must be the same for a run to resume."""
    return f"{stage.steps} steps of {stage.batch} at {stage.lr}, from {place.source}"


def resume(stage: Stage, objective: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> int:
    """Load what an earlier run of this stage kept and return how many steps it took, 0 if there was none."""
    kept = place.folder / f"{stage.name}.pt"
    if not kept.is_file():
        return 0
    state = torch.load(kept, map_location=place.device, weights_only=True)
    if state["settings"] != settings(stage, place):
        raise ValueError(f"{kept} is of another run ({state['settings']}): delete it, or choose another --out")
    objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    if place.rank == 0:
        print(f"{stage.name}: resumes after step {state['step']} of {stage.steps}, from {kept}")
    return state["step"]


def keep(stage: Stage, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> None:
    """Write what `resume` reads, if all of its numbers are finite."""
    kept = place.folder / f"{stage.name}.pt"
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    stop_if_diverged(stage, step, "result", [*objective.state_dict().values(), *moments], place)
    if place.rank == 0:
        state = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({"step": step, "settings": settings(stage, place), **state}, kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)


def stop_if_diverged(stage: Stage, step: int, what: str, tensors: list[Tensor], place: Place) -> None:
    """Raise ValueError, in all processes together, if a number of these tensors is not finite in one of them."""
    finite = torch.tensor(float(all(tensor.isfinite().all() for tensor in tensors)), device=place.device)
    if dist.is_initialized():
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise ValueError(
            f"{stage.name} diverged: the {what} of step {step} is not finite, so no model is written. Choose a lower "
            "learning rate (--lr with --data, else in train.STAGES) and another --out"
        )


def backward(objective: nn.Module, count: Callable[[dict], Tensor], batches: list[dict], place: Place) -> float:
    """Gradients of the mean loss over all that one step learns from, on all processes; returns that loss."""
    batches = [{name: tensor.to(place.device) for name, tensor in batch.items()} for batch in batches]
    total = torch.stack([count(batch).float() for batch in batches]).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    whole = torch.zeros((), device=place.device)
    for batch in batches:
        with place.autocast():
            loss = objective(batch) / total
        # DistributedDataParallel takes the mean of the processes' gradients, where the sum is wanted. It does so after
        # every batch; what was a mean before stays what it is, so a step in pieces comes out the same.
        (loss * world_size()).backward()
        whole += loss.detach()
    if dist.is_initialized():
        dist.all_reduce(whole)
    return whole.item()


@dataclass
class Log:
    """log.csv and what the terminal shows. Rows of steps that a stopped run did not keep are taken out again."""

    stage: Stage
    place: Place
    first: int

    def __post_init__(self) -> None:
        self.file, self.losses, self.started = self.place.folder / "log.csv", [], time.monotonic()
        if self.place.rank == 0 and self.file.is_file():
            with open(self.file, newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 4]  # a kill may have cut the last one
            rows = [row for row in rows if row[0] != self.stage.name or int(row[1]) <= self.first]
            with open(self.file.with_suffix(".new"), "w", newline="") as file:
                csv.writer(file).writerows(rows)
            self.file.with_suffix(".new").replace(self.file)

    def add(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if self.place.rank or (step % REPORT_EVERY and step != self.stage.steps):
            return
        stage, mean = self.stage, sum(self.losses) / len(self.losses)
        self.losses.clear()
        seconds = (time.monotonic() - self.started) / (step - self.first)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (stage.steps - step)))
        speed = f"{stage.batch / seconds:4.0f} {'texts' if stage.data is World.text else 'pictures'}/s"
        end = "\r" if sys.stdout.isatty() and step < stage.steps else "\n"
        print(f"{stage.name:8} {step:5}/{stage.steps}  loss {mean:7.4f}  {speed}  {left} left ", end=end, flush=True)
        with open(self.file, "a", newline="") as file:
            csv.writer(file).writerow([stage.name, step, f"{mean:.5f}", f"{learning_rate(step - 1, stage):.3e}"])


def plot(log: Path, picture: Path) -> None:
    """The loss of every stage over its steps, as a picture beside the log."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {picture.name}: pip install matplotlib draws the losses in {log}")
        return
    curves = defaultdict(list)
    for name, step, loss, _ in csv.reader(log.read_text().splitlines()):
        curves[name].append((int(step), float(loss)))
    figure = Figure(figsize=(3 * len(curves), 2.6), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set(title=name, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.supylabel("loss", fontsize="medium")
    figure.savefig(picture, dpi=110)


# --- The runs --------------------------------------------------------------------------------------------------------


def train_from_nothing(args: argparse.Namespace, place: Place) -> None:
    stages = [replace(stage, steps=4, batch=4) for stage in STAGES] if args.quick else STAGES
    for stage in stages:  # fails here, and not after hours, if its samples cannot be shared
        Steps(None, stage.batch, 0, stage.steps, 0, world_size(), place.pieces(stage))
    if args.quick and place.rank == 0:  # nothing to resume, everything to see
        (place.folder / f"{stages[0].name}.pt").unlink(missing_ok=True)
    wait_for_all()
    tokenizer = train_tokenizer(1000 if args.quick else 20000)
    place.source += f", vocabulary {hashlib.sha256(tokenizer.sp.serialized_model_proto()).hexdigest()[:12]}"
    side = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(ImageProcessor({"shortest_edge": SIDE}, side), tokenizer, VISION.num_patches, "v1")
    model, world = new_model(tokenizer).to(place.device), World(emoji_world.load_sprites(), processor)
    after = {}
    for i, stage in enumerate(stages):
        if place.rank == 0 and not (place.folder / f"{stage.name}.pt").is_file():  # later ones are of another run
            for later in stages[i + 1 :]:
                (place.folder / f"{later.name}.pt").unlink(missing_ok=True)
        wait_for_all()
        if stage.name == "align":
            start_projector(model, world.pictures(range(64))[0].to(place.device))
            start = snapshot(model)
        run_stage(stage, model, partial(stage.data, world), place)
        after[stage.name] = snapshot(model)
    if place.rank == 0:
        save(model.to(torch.bfloat16), processor, place.folder)
        save_stage(start, after["tune"], place.folder / "stages" / "before-alignment.safetensors")
        save_stage(after["align"], start, place.folder / "stages" / "after-alignment.safetensors")
        plot(place.folder / "log.csv", place.folder / "log.png")
        print(f"saved to {place.folder}: python llava.py --model {place.folder} --image images/cat-and-apple.jpg")
        if args.quick:
            print("(it has learnt next to nothing: an empty or senseless answer is what to expect)")


def train_on_records(args: argparse.Namespace, place: Place) -> None:
    """LLaVA's second stage on a file of conversations, starting from any checkpoint in the hub's layout."""
    checkpoint, batch = args.model or BUNDLED, args.batch or 16
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, torch.float32, place.device)
    model.config.ignore_index = -100  # as batches.py writes it
    processor = LlavaProcessor.from_pretrained(checkpoint)
    longest = model.config.text_config.max_position_embeddings
    records = Records(args.data, args.images or args.data.parent, processor, longest)
    records.conversations(range(1))  # fails here, in a sentence, if nothing can be opened
    digest = hashlib.sha256(args.data.read_bytes()).hexdigest()[:12]
    place.source = f"{args.data} (sha256 {digest}), on {checkpoint}"
    steps = args.steps or -(-len(records.records) // batch)
    stage = replace(STAGES[-1], steps=steps, batch=batch, lr=2e-5 if args.lr is None else args.lr)
    if place.rank == 0:
        for line in records.skipped:
            print(f"skipped: {line}")
        print(f"{len(records.records)} conversations, {steps} steps of {stage.batch}")
    run_stage(stage, model, records.conversations, place)
    if place.rank == 0:
        save(model.to(torch.bfloat16), processor, place.folder)
        print(f"saved to {place.folder}")


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def find_place(args: argparse.Namespace) -> Place:
    """One process's place; those that torchrun started find each other first."""
    name = "quick" if args.quick else "my-llava" if args.data else "tiny-llava"
    place = Place(args.out or Path("runs") / name, args.device, accumulate=args.accumulate)
    place.source = f"the emoji world, seed {args.seed}"
    place.compile = args.compile
    together = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place.workers = 0 if args.quick else max(1, min(12, (os.cpu_count() or 2) // together - 1))
    if "WORLD_SIZE" not in os.environ:
        return place
    dist.init_process_group("nccl" if torch.device(args.device).type == "cuda" else "gloo")
    place.rank = dist.get_rank()
    if torch.device(args.device).type == "cuda":
        place.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(place.device)
    return place


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)


def rate(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a learning rate")
    return number


# What a command takes besides the flag that chooses it; None is the recipe from nothing.
TAKES = {
    None: ("out", "quick", "accumulate", "compile", "seed", "device"),
    "data": ("out", "images", "model", "steps", "batch", "lr", "accumulate", "compile", "device"),
    "evaluate": ("scenes", "final", "device"),
}
DEFAULTS = {
    **dict.fromkeys(("out", "evaluate", "data", "images", "model", "steps", "batch", "lr")),
    **{"quick": False, "compile": False, "final": False, "scenes": 300, "accumulate": 1, "seed": 0},
}


def parse_arguments() -> argparse.Namespace:
    """The flags of one command. Raises ValueError for flags that do not go together and for files that do not exist."""
    parser = argparse.ArgumentParser(
        description="Train the tiny LLaVA, tune one, or judge it.", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--out", type=Path, help="where the model is written (default: a folder under runs/)")
    parser.add_argument("--quick", action="store_true", help="a few steps of every stage")
    parser.add_argument("--evaluate", type=Path, nargs="?", const=BUNDLED, metavar="FOLDER", help="judge a model")
    parser.add_argument("--scenes", type=positive, help="with --evaluate: how many unseen scenes (default: 300)")
    parser.add_argument("--final", action="store_true", help="with --evaluate: the scenes kept for published tables")
    parser.add_argument("--data", type=Path, help="a LLaVA-format JSON file to tune on")
    parser.add_argument("--images", type=Path, help="with --data: the folder of its pictures (default: the file's own)")
    parser.add_argument("--model", type=Path, help="with --data: the checkpoint it starts from (default: the bundled)")
    parser.add_argument("--steps", type=positive, help="with --data (default: once through the file)")
    parser.add_argument("--batch", type=positive, help="with --data: conversations a step (default: 16)")
    parser.add_argument("--lr", type=rate, help="with --data: the highest learning rate (default: 2e-5)")
    parser.add_argument("--accumulate", type=positive, help="pieces of a step, to save memory (default: 1)")
    parser.add_argument("--compile", action="store_true", help="faster by half, after a minute's work")
    parser.add_argument("--seed", type=int, help="of the recipe's first weights (default: 0)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    given = vars(parser.parse_args())
    check_together(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = argparse.Namespace(**DEFAULTS | {"device": device} | given)
    if args.images and not args.images.is_dir():
        raise ValueError(f"there is no folder {args.images}: --images is the folder of the pictures that --data names")
    if args.data and not args.data.is_file():
        raise ValueError(f"there is no file {args.data}: --data is a JSON file of conversations")
    return args


def check_together(given: dict) -> None:
    command = next((name for name in TAKES if name in given), None)
    for flag in given:
        if flag != command and flag not in TAKES[command]:
            needed = next((name for name, flags in TAKES.items() if flag in flags), None)
            if command:
                raise ValueError(f"--{flag} does not go with --{command}")
            recipe = ": what the recipe itself takes is in train.STAGES" if needed == "data" else ""
            raise ValueError(f"--{flag} goes with --{needed}{recipe}")


def main() -> None:
    args = parse_arguments()
    check_device(args.device)
    if args.evaluate:
        evaluate_stages(args.evaluate, args.scenes, args.device, FINAL if args.final else UNSEEN)
        return
    torch.manual_seed(args.seed)
    place = find_place(args)
    (train_on_records if args.data else train_from_nothing)(args, place)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run(main))
