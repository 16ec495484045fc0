"""The recipe: a tiny LLaVA from nothing, stage by stage, on pictures and conversations of the emoji world.

    stage     what learns          from                            in LLaVA-1.5
    tower     the vision tower     pictures with captions          CLIP, trained by others
    decoder   decoder and head     the world's text, no pictures   Vicuna, trained by others
    align     only the projector   pictures with captions          558,000 captions, lr 1e-3
    tune      the whole model      conversations about pictures    665,000 conversations, lr 2e-5, tower frozen

    python train.py                   all stages; a stopped run goes on where it was
    python train.py --quick           all stages in seconds, to see the machinery (it learns next to nothing)
    python train.py --evaluate        how often the bundled model is right, by kind of question

The pictures are drawn as they are needed: picture n is the scene with seed n, so no picture is seen twice in a stage,
and a run that resumes at a step sees what it would have seen. Seeds from UNSEEN up are for judging only.

    B batch    T tokens    D width
"""

import argparse
import csv
import io
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emoji_world
from clip import CLIPVisionConfig, ImageProcessor
from command import BUNDLED, fast_dtype, run
from llama import Llama, LlamaConfig
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from save_checkpoint import save
from tokenizer import TEMPLATES, Tokenizer

SIDE = 112  # pixels
KEEP_EVERY, REPORT_EVERY = 100, 20  # steps
TURNS = 4  # questions and answers in a conversation
UNSEEN = 10**9  # the first seed of the scenes kept for judging
VISION = CLIPVisionConfig(192, 768, 192, 6, 3, image_size=SIDE, patch_size=14, hidden_act="gelu")
TEXT = LlamaConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4)


# --- Text and vocabulary ---------------------------------------------------------------------------------------------


def messages(turns: list[dict]) -> list[dict]:
    """LLaVA's JSON turns, {"from": "human", "value": "<image>\\n..."}, as the messages a prompt template takes."""
    roles = {"human": "user", "gpt": "assistant"}
    result = []
    for turn in turns:
        text = turn["value"]
        pictures = [{"type": "image"}] * text.count("<image>")
        text = text.replace("<image>\n", "").replace("<image>", "")
        result.append({"role": roles[turn["from"]], "content": pictures + [{"type": "text", "text": text}]})
    return result


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
        vocab_size=800,
        byte_fallback=True,  # what is not in the vocabulary is spelt in bytes
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        required_chars="".join(map(chr, range(33, 127))),
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def tokenize_conversation(turns: list[dict], processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """A conversation as ids and labels: only the assistant's words and the </s> behind them are to be learnt."""
    tokenizer, ids, labels = processor.tokenizer, [], []
    template = processor.template
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        prompt = template.render(messages([question])).replace("<image>", "<image>" * processor.image_seq_length)
        prompt = tokenizer.encode(prompt, add_special_tokens=not ids)
        answer = [*tokenizer.encode(answer["value"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
        template = replace(template, system="")  # it opens a conversation only once
    return ids, labels


def tokenize_caption(caption: str, processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """Picture and caption in the plain form of the alignment stage: only the caption is to be learnt."""
    turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": caption}]
    return tokenize_conversation(turns, LlavaProcessor(None, processor.tokenizer, processor.image_seq_length, "plain"))


# --- Batches: from a range of seeds to what a stage learns from ------------------------------------------------------


@dataclass
class World:
    """What every batch is made of."""

    sprites: dict
    processor: LlavaProcessor

    def pictures(self, seeds: range) -> tuple[Tensor, list[dict]]:  # -> (B, 3, SIDE, SIDE), B truths
        drawn = [emoji_world.make_scene(self.sprites, seed, SIDE) for seed in seeds]
        return self.processor.image_processor([picture for picture, _ in drawn]), [truth for _, truth in drawn]

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Ids and labels of B rows, filled up on the right. No mask: a token never sees what comes after it."""
        longest, pad = max(len(ids) for ids, _ in rows), self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
        return {"input_ids": input_ids, "labels": labels}

    def captions(self, seeds: range) -> dict[str, Tensor]:
        """Pictures with one caption each."""
        pixel_values, truths = self.pictures(seeds)
        texts = [emoji_world.caption(truth, random.Random(seed)) for truth, seed in zip(truths, seeds, strict=True)]
        return {
            "pixel_values": pixel_values,
            **self.collate([tokenize_caption(text, self.processor) for text in texts]),
        }

    def conversations(self, seeds: range) -> dict[str, Tensor]:
        """Pictures with several questions and answers each."""
        pixel_values, truths = self.pictures(seeds)
        said = [emoji_world.conversation(t, random.Random(seed), TURNS) for t, seed in zip(truths, seeds, strict=True)]
        return {
            "pixel_values": pixel_values,
            **self.collate([tokenize_conversation(turns, self.processor) for turns in said]),
        }

    def text(self, seeds: range) -> dict[str, Tensor]:
        """Captions and conversations without their pictures, every word to be learnt."""
        blind = LlavaProcessor(None, self.processor.tokenizer, image_seq_length=0, template="v1")
        rows = []
        for seed in seeds:
            truth, rng = emoji_world.make_truth(seed), random.Random(seed)
            said = emoji_world.conversation(truth, rng, TURNS)
            ids, _ = (
                tokenize_caption(emoji_world.caption(truth, rng), blind)
                if seed % 4 == 0
                else tokenize_conversation(said, blind)
            )
            rows.append((ids, ids))
        return self.collate(rows)


# --- Losses ----------------------------------------------------------------------------------------------------------


class NextTokenLoss(nn.Module):
    """The loss of LLaVA's own stages: the next word, where the labels want one."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss


class ContrastiveLoss(nn.Module):
    """CLIP's loss (Radford et al. 2021, figure 3): among all captions of the batch, find the picture's own, and back.

    The text side is a little Llama that is thrown away afterwards, as LLaVA throws CLIP's away.
    """

    def __init__(self, model: LlavaForConditionalGeneration, width: int = 128):
        super().__init__()
        self.model = model
        vocab_size = model.config.text_config.vocab_size
        self.text = Llama(LlamaConfig(vocab_size, width, 2 * width, num_hidden_layers=2, num_attention_heads=2))
        self.from_text = nn.Linear(width, width, bias=False)
        self.from_picture = nn.Linear(model.config.vision_config.hidden_size, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        init_weights(self.text)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tower, labels = self.model.vision_tower, batch["labels"]
        seen = tower.post_layernorm(tower(batch["pixel_values"])[-1][:, 0])  # (B, D), the class token
        start = int((labels[0] >= 0).long().argmax())  # every caption begins in the same column
        labels = labels[:, start:]
        ids = labels.clamp(min=0)
        last = (labels >= 0).long().cumsum(-1).argmax(-1)  # where </s> stands, which has read it all
        read = self.text(self.text.embed_tokens(ids))[torch.arange(len(ids)), last]  # (B, width)
        seen, read = F.normalize(self.from_picture(seen), dim=-1), F.normalize(self.from_text(read), dim=-1)
        scores = self.log_scale.exp().clamp(max=100) * seen @ read.T  # (B, B), the right pairs on the diagonal
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores.float(), own) + F.cross_entropy(scores.float().T, own)) / 2


# --- The stages and the loop -----------------------------------------------------------------------------------------


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
    Stage("tower", ("vision_tower",), World.captions, ContrastiveLoss, steps=700, batch=256, lr=1e-3),
    Stage("decoder", ("language_model", "lm_head"), World.text, NextTokenLoss, steps=200, batch=64, lr=2e-3),
    Stage("align", ("multi_modal_projector",), World.captions, NextTokenLoss, steps=200, batch=64, lr=2e-3),
    Stage(
        "tune",
        ("vision_tower", "multi_modal_projector", "language_model", "lm_head"),
        World.conversations,
        NextTokenLoss,
        steps=2500,
        batch=64,
        lr=1e-3,
    ),
]


def learning_rate(step: int, stage: Stage) -> float:
    """Up in a straight line over the first 3 % of the steps, then down along a cosine to zero."""
    warm_up = max(1, round(0.03 * stage.steps))
    if step < warm_up:
        return stage.lr * (step + 1) / warm_up
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, stage.steps - warm_up)))


def run_stage(stage: Stage, model: LlavaForConditionalGeneration, world: World, folder: Path, device: str) -> None:
    """Train one stage, or what is left of it, into `folder`: NAME.pt every 100 steps and a row of log.csv every 20."""
    objective = stage.loss(model).to(device).train()
    for name, parameter in objective.named_parameters():  # what is not the model's, like CLIP's text side, learns
        parameter.requires_grad_(
            name.removeprefix("model.").startswith(stage.trainable) or not name.startswith("model.")
        )
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0)
    kept, first = folder / f"{stage.name}.pt", 0
    if kept.is_file():
        state = torch.load(kept, map_location=device, weights_only=True)
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started, losses = time.monotonic(), []
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        seeds = range(step * stage.batch, (step + 1) * stage.batch)
        batch = {name: tensor.to(device) for name, tensor in stage.data(world, seeds).items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16):
            loss = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % REPORT_EVERY == 0 or done == stage.steps:
            report(stage, done, sum(losses) / len(losses), (time.monotonic() - started) / (done - first), folder)
            losses.clear()
        if done % KEEP_EVERY == 0 or done == stage.steps:
            state = {"step": done, "objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)


def report(stage: Stage, step: int, loss: float, seconds: float, folder: Path) -> None:
    left = time.strftime("%H:%M:%S", time.gmtime(seconds * (stage.steps - step)))
    speed = f"{stage.batch / seconds:4.0f} {'texts' if stage.name == 'decoder' else 'pictures'}/s"
    end = "\r" if sys.stdout.isatty() and step < stage.steps else "\n"
    print(f"{stage.name:8} {step:5}/{stage.steps}  loss {loss:7.4f}  {speed}  {left} left ", end=end, flush=True)
    with open(folder / "log.csv", "a", newline="") as file:
        csv.writer(file).writerow([stage.name, step, f"{loss:.5f}", f"{learning_rate(step - 1, stage):.3e}"])


def init_weights(model: nn.Module) -> None:
    """Small random matrices; norms start as they are, biases at zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def new_model(tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
    size = max(tokenizer.special_names) + 1
    text = replace(TEXT, vocab_size=-(-size // 64) * 64)  # rounded up, as the hub's checkpoints do
    model = LlavaForConditionalGeneration(LlavaConfig(VISION, text, image_token_index=tokenizer.image_token_id))
    init_weights(model)
    return model


# --- Judging ---------------------------------------------------------------------------------------------------------


def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: list, asked: list[str]
) -> list[str]:
    """Greedy answers to one question per picture, as a batch."""
    prompts = [processor.template.render(messages([{"from": "human", "value": "<image>\n" + q}])) for q in asked]
    inputs = processor(images=pictures, text=prompts, padding=True).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=60)
    return processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def evaluate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, n_scenes: int
) -> dict[str, tuple[int, int]]:
    """Kind of question -> (right, asked), over unseen scenes, each asked for a sentence or a word."""
    model.eval()
    sprites, tally, todo = emoji_world.load_sprites(), defaultdict(lambda: [0, 0]), []
    for seed in range(UNSEEN, UNSEEN + n_scenes):
        picture, truth = emoji_world.make_scene(sprites, seed, SIDE)
        todo += [(picture, truth, *turn) for turn in emoji_world.questions(truth, random.Random(seed))]
    for start in range(0, len(todo), 64):
        part = todo[start : start + 64]
        said = answers(model, processor, [picture for picture, *_ in part], [question for *_, question, _ in part])
        for (_, truth, kind, question, _), answer in zip(part, said, strict=True):
            form = "word" if question.endswith(emoji_world.SHORT) else "sentence"
            for row in (kind.partition(":")[0], f"all, in a {form}", "all"):
                tally[row][0] += emoji_world.score(kind, answer, truth)
                tally[row][1] += 1
    return {row: (right, n) for row, (right, n) in tally.items()}


def table(tally: dict[str, tuple[int, int]]) -> str:
    sums_last = sorted(tally.items(), key=lambda row: (row[0].startswith("all"), row[0] == "all"))
    rows = [f"| {row} | {right / n:.1%} | {n} |" for row, (right, n) in sums_last]
    return "\n".join(["| question | right | asked |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny LLaVA from nothing, or judge it.")
    parser.add_argument("--out", type=Path, help="where the model is written (default: a folder under runs/)")
    parser.add_argument("--quick", action="store_true", help="a few steps of every stage")
    parser.add_argument("--evaluate", type=Path, nargs="?", const=BUNDLED, metavar="FOLDER", help="judge a model")
    parser.add_argument("--scenes", type=int, default=500, help="how many unseen scenes to judge by")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.evaluate:
        model = LlavaForConditionalGeneration.from_pretrained(args.evaluate, torch.float32, args.device)
        print(table(evaluate(model, LlavaProcessor.from_pretrained(args.evaluate), args.scenes)))
        return
    args.out = args.out or Path("runs/quick" if args.quick else "runs/tiny-llava")
    torch.manual_seed(0)
    stages = [replace(s, steps=4, batch=4) for s in STAGES] if args.quick else STAGES
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:  # nothing to resume, everything to see
        (args.out / f"{stages[0].name}.pt").unlink(missing_ok=True)
    tokenizer = train_tokenizer()
    side = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(ImageProcessor({"shortest_edge": SIDE}, side), tokenizer, VISION.num_patches, "v1")
    model = new_model(tokenizer).to(args.device)
    for i, stage in enumerate(stages):
        if not (args.out / f"{stage.name}.pt").is_file():  # what came after it then is of another run
            for later in stages[i:]:
                (args.out / f"{later.name}.pt").unlink(missing_ok=True)
        run_stage(stage, model, World(emoji_world.load_sprites(), processor), args.out, args.device)
    save(model.to(torch.bfloat16), processor, args.out)
    print(f"saved to {args.out}: python llava.py --model {args.out} --image images/cat-and-apple.jpg")
    if args.quick:
        print("(it has learnt next to nothing: an empty or senseless answer is what to expect)")


if __name__ == "__main__":
    sys.exit(run(main))
