"""LLaVA-1.5's recipes: one step of each beside transformers, what is cut and grouped, validation, and resuming."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import peft
import pytest
import sentencepiece
import torch
import transformers
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil

import train
from hub.adapter import write_adapter
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration
from load_weights import our_name
from tiny_world import TURNS, logged_losses, tiny_world, write_records
from training import progress, run_stage, tune_adapter
from training.conversations import cut, tokenize_conversation, tokenize_plain
from training.grouping import grouped_order, words
from training.lora import Lora, LoraLoss, add_lora, matrices
from training.recipes import RECIPES
from training.records import Records
from training.run import train_on_records
from training.run_stage import Place
from training.stages import STAGES
from training.tune_adapter import train_adapter
from training.validation import Validation

PATCHES, LONGEST = 64, 200  # of the bundled model; and the length at which the test cuts
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def write(folder, records):
    """The records, with pictures that are not square, as a JSON file."""
    write_records(folder, 4)
    for i in range(4):
        Image.open(folder / f"{i}.png").resize((90 + 20 * i, 120)).save(folder / f"{i}.png")
    (folder / "my.json").write_text(json.dumps(records))
    return folder / "my.json"


CONVERSATIONS = [
    {"image": "0.png", "conversations": TURNS},
    {"image": "1.png", "conversations": [gpt("Hello."), human("What is \n here?  \n<image>"), gpt("A cat.\nA dog.")]},
    {"conversations": [human(" What is a dog? "), gpt("Not a cat."), human("Why?"), gpt("no")]},
    {"image": ["2.png", "3.png"], "conversations": [human("<image>\n<image>\nCompare."), gpt("The left has a cat.")]},
    {"image": "3.png", "conversations": [human("<image>\nWhat?"), gpt("A cat. " * 100), human("And?"), gpt("No.")]},
]
CAPTIONS = [
    {"image": f"{i}.png", "conversations": [human(question), gpt(caption)]}
    for i, (question, caption) in enumerate([("<image>\nDescribe it.", "a cat"), ("Say.\n<image>", "a dog, a cat ")])
] + [{"image": "2.png", "conversations": [human("<image>"), gpt("a cat " * 200)]}]


# --- LLaVA's rules, written from its scripts -------------------------------------------------------------------------


class Llava:
    """llava/train/train.py and llava/mm_utils.py in its repository: texts to ids and labels, pictures to pixels."""

    def __init__(self):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
        tokens = json.loads((BUNDLED / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        self.special = {token["content"]: int(i) for i, token in tokens.items()}

    def encode(self, text: str) -> list[int]:  # without <s>
        ids = []
        for part in re.split("(<image>|</s>)", text):
            patches = PATCHES if part == "<image>" else 1
            ids += [self.special[part]] * patches if part in self.special else self.sp.encode(part) if part else []
        return ids

    def plain(self, turns: list[dict]) -> tuple[list[int], list[int]]:
        before = [self.special["<s>"], *self.encode("<image>")]
        ids = [self.special["<s>"], *self.encode("<image>" + turns[1]["value"] + "\n")]
        return ids, [-100] * len(before) + ids[len(before) :]

    def v1(self, turns: list[dict]) -> tuple[list[int], list[int]]:
        if turns[0]["from"] != "human":
            turns = turns[1:]
        text = SYSTEM
        for turn in turns:
            value = turn["value"]
            if pictures := value.count("<image>"):  # LLaVA has one picture at most
                value = "<image>\n" * pictures + value.replace("<image>", "").strip()
            text += f"USER: {value} " if turn["from"] == "human" else f"ASSISTANT: {value}</s>"
        ids = [self.special["<s>"], *self.encode(text)]
        labels, place = [-100] * len(ids), 1
        for part in text.split("</s>")[:-1]:
            question, _, _ = part.partition("ASSISTANT: ")
            start = place + len(self.encode(question + "ASSISTANT: ")) - 1  # the space is the answer's
            place += len(self.encode(part)) + 1
            labels[start:place] = ids[start:place]
        assert place == len(ids)  # else LLaVA prints "tokenization mismatch" and learns nothing
        return ids, labels

    def pixels(self, file, pad: bool) -> torch.Tensor:
        process, image = CLIPImageProcessorPil.from_pretrained(BUNDLED), Image.open(file).convert("RGB")
        if pad:  # expand2square
            square = Image.new("RGB", [max(image.size)] * 2, tuple(int(255 * mean) for mean in process.image_mean))
            square.paste(image, [(max(image.size) - side) // 2 for side in image.size])
            image = square
        return process(image, return_tensors="pt")["pixel_values"]

    def batch(self, records: list[dict], folder, how: str) -> dict[str, torch.Tensor]:
        rows = [getattr(self, how)(record["conversations"]) for record in records]
        ids, labels = ([torch.tensor(part[:LONGEST]) for part in parts] for parts in zip(*rows, strict=True))
        pad = torch.nn.utils.rnn.pad_sequence
        names = [record.get("image") or [] for record in records]
        names = [name for some in names for name in ([some] if isinstance(some, str) else some)]
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.special["<pad>"]),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "pixel_values": torch.cat([self.pixels(folder / name, pad=how == "v1") for name in names]),
        }


def reference_gradients(name, folder, batch):
    """The loss, and the gradients of what learns, by our names."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    if name == "finetune-lora":
        model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    loss = model(**batch).loss
    loss.backward()
    gradients = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            ours = parameter_name.removeprefix("base_model.model.").replace(".default", "")
            gradients[our_name(ours.replace("modules_to_save.", ""))] = parameter.grad
    return loss.item(), gradients


@pytest.mark.parity
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_each_recipe_is_that_of_transformers(name, tmp_path, monkeypatch):
    """The command takes it, and the other side gets ids, labels and pixels that were made from LLaVA's rules."""
    records = CAPTIONS if name == "pretrain" else CONVERSATIONS
    data, seen = write(tmp_path, records), {}
    real = run_stage.backward

    def spy(objective, *arguments, **options):
        model = objective.model
        if name == "finetune-lora":  # B starts at zero, where A has no gradient
            for i, linear in enumerate(matrices(model).values()):
                linear.lora_B.weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
            write_adapter(model, tmp_path / "adapter", Lora(128, 256), str(BUNDLED))
        seen["loss"] = real(objective, *arguments, **options)
        seen["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return seen["loss"]

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen["optimizer"] = self

    monkeypatch.setattr(run_stage, "backward", spy)
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    for module in (run_stage, tune_adapter):
        monkeypatch.setattr(module, "fast_dtype", lambda device: torch.float32)
    flags = ["--data", data, "--recipe", name, "--out", tmp_path / "out", "--steps", 1, "--device", "cpu"]
    flags += ["--batch", len(records), "--max-length", LONGEST]
    flags += ["--dropout", 0] if name == "finetune-lora" else []
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()
    batch = Llava().batch(records, tmp_path, "plain" if name == "pretrain" else "v1")
    assert batch["input_ids"].shape[1] == LONGEST
    loss, gradients = reference_gradients(name, tmp_path, batch)
    assert seen["loss"].item() == pytest.approx(loss, rel=1e-5)
    parts = {"pretrain": ("multi_modal_projector",), "finetune": ("multi_modal_projector", "language_model", "lm_head")}
    learning = {n for n in gradients if n.startswith(parts.get(name, "")) and (name != "pretrain" or "lora" not in n)}
    assert seen["gradients"].keys() == learning
    for n, gradient in seen["gradients"].items():
        assert_close(gradient, gradients[n], atol=1e-5, rtol=1e-3, msg=lambda text, n=n: f"{n}: {text}")
    groups = seen["optimizer"].param_groups
    rates = {"pretrain": [1e-3], "finetune": [2e-5], "finetune-lora": [2e-4, 2e-5]}[name]
    assert [group["lr"] for group in groups] == rates
    assert all((group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0) for group in groups)


# --- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_what_the_command_says_overrides_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "my.json").write_text("[]")

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tmp_path / "my.json"), *flags])
        return train.parse_arguments()

    args = parse("--recipe", "finetune-lora")
    assert train.find_recipe(args) == RECIPES["finetune-lora"] and train.find_lora(args) == Lora(128, 256, 0.05)
    flags = "--lora 8 --lr 1 --batch 2 --warm-up 0 --template hub --no-pad --no-group --max-length 9 --projector-lr 2"
    args = parse("--recipe", "finetune-lora", *flags.split(), "--seed", "3")
    changed = replace(RECIPES["finetune-lora"], lora=8, lr=1.0, batch=2, warm_up=0.0, template="hub", pad=False)
    assert train.find_recipe(args) == replace(changed, group=False, max_length=9, projector_lr=2.0, seed=3)
    assert train.find_lora(args) == Lora(8, 16, 0.05, seed=3)
    with pytest.raises(ValueError, match="--recipe finetune-lora"):
        parse("--recipe", "finetune", "--lora", "8")


@pytest.mark.quick
def test_a_cut_keeps_whole_pictures_and_every_label_that_fits():
    processor = tiny_world().processor
    turns = [human("<image>\nWhat?"), gpt("A cat."), human("<image>\nAnd here?"), gpt("A dog.")]
    ids, labels = row = tokenize_conversation(turns, processor)
    patch = processor.tokenizer.image_token_id
    second = ids.index(patch, ids.index(patch) + PATCHES)
    for longest in range(len(ids) + 1):
        if not any(label >= 0 for label in labels[1:longest]):
            with pytest.raises(ValueError, match=f"first {longest} of its {len(ids)} tokens"):
                cut(row, longest, processor)
            continue
        (short, learnt), pictures = cut(row, longest, processor)
        end = second if second < longest < second + PATCHES else longest
        assert (short, learnt) == (ids[:end], labels[:end]) and pictures == 1 + (longest >= second + PATCHES)
        assert [x for x in learnt if x >= 0] == [x for x in labels[:longest] if x >= 0]


@pytest.mark.quick
def test_records_that_a_recipe_cannot_use_are_named(tmp_path):
    records = [
        {**CAPTIONS[0], "id": "good"},
        {**CAPTIONS[0], "id": "long", "conversations": TURNS},
        {"id": "words", "conversations": [human("Hello."), gpt("Hello.")]},
    ]
    read = Records(write(tmp_path, records), tmp_path, tiny_world().processor, 2048, tokenize=tokenize_plain)
    assert [name for name, _ in read.records] == ["record 0 ('good')"]
    assert [line.partition(")")[0] for line in read.skipped] == ["record 1 ('long'", "record 2 ('words'"]


@pytest.mark.quick
def test_a_cut_before_the_answer_is_named_and_the_record_replaced(tmp_path, capsys):
    records = [{**CONVERSATIONS[2], "id": "short"}, {**CONVERSATIONS[3], "id": "two pictures"}]
    read = Records(write(tmp_path, records), tmp_path, tiny_world().processor, 130, cuts=True)
    for _ in range(2):
        batch = read.conversations(range(2))
        assert "pixel_values" not in batch and torch.equal(*batch["input_ids"])
    line = "skipped: record 1 ('two pictures'): no answer begins within the first 130 of"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.quick
@pytest.mark.parametrize("pictures, texts, batch", [(13, 11, 4), (8, 4, 4), (9, 0, 4), (1, 2, 16), (0, 5, 2)])
def test_a_step_has_only_pictures_or_only_texts(pictures, texts, batch):
    lengths = [5 + 7 * i % 11 for i in range(pictures)] + [-(5 + 7 * i % 13) for i in range(texts)]
    epochs = [grouped_order(lengths, batch, epoch) for epoch in range(3)]
    for order in epochs:
        steps = [order[i : i + batch] for i in range(0, len(order), batch)]
        assert len(order) == -(-len(lengths) // batch) * batch
        pure = pictures // batch + texts // batch
        assert all(len({lengths[i] > 0 for i in step}) == 1 for step in steps[:pure])
        assert all(sizes == sorted(sizes, reverse=True) for sizes in ([abs(lengths[i]) for i in s] for s in steps))
        seen = Counter(order)
        assert seen.keys() == set(range(len(lengths))) and seen.total() - len(seen) == -len(lengths) % batch
    assert len(set(map(tuple, epochs))) > 1


@pytest.mark.quick
def test_the_length_of_a_record_is_its_words():
    assert words(CAPTIONS[0]) == len(["<image>", "Describe", "it.", "a", "cat"])
    assert words(CONVERSATIONS[2]) == -len(["What", "is", "a", "dog?", "Not", "a", "cat.", "Why?", "no"])


# --- Validation and resuming -----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_seed_chooses_what_is_held_back(tmp_path):
    data = write(tmp_path, [{**CONVERSATIONS[2], "id": i} for i in range(40)])

    def split(seed):
        records = Records(data, tmp_path, tiny_world().processor, 2048, group=4)
        held = records.hold_back(0.1, seed)
        return [{name for name, _ in part.records} for part in (records, held)]

    learnt, held = split(0)
    assert len(held) == 4 and len(learnt | held) == 40 and not learnt & held
    assert split(0) == [learnt, held] and split(1)[1] != held


@pytest.mark.quick
@pytest.mark.parametrize("share", ["0", "1", "-0.5", "nan", "0.01", "0.99"])
def test_a_share_that_holds_back_nothing_or_all_is_one_sentence(tmp_path, monkeypatch, capsys, share):
    import cli

    data = write(tmp_path, CONVERSATIONS)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(data), "--out", "out", "--validate", share])
    monkeypatch.chdir(tmp_path)
    assert cli.run(train.main) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --validate {float(share):g} ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_validation_loss_is_the_mean_over_the_labels_of_what_is_held_back(tmp_path):
    """Whatever the size of its batches, and without dropout; the other side is PEFT on transformers."""
    data, recipe = write(tmp_path, CONVERSATIONS * 2), RECIPES["finetune-lora"]
    records = Records(data, tmp_path, recipe.processor(tiny_world().processor), LONGEST, cuts=True)
    held = records.hold_back(0.5, 0)
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, kernels="torch")
    model.config.ignore_index = -100
    objective = LoraLoss(model, add_lora(model, Lora(4, 8, dropout=0.5))).train()
    for linear in matrices(model).values():
        torch.nn.init.normal_(linear.lora_B.weight, 0, 0.05)
    write_adapter(model, tmp_path / "adapter", Lora(4, 8), str(BUNDLED))
    batches = partial(tune_adapter.numbered, held.conversations)
    ours = [Validation(STAGES[-1], batches, len(held.records), n).loss(objective, Place(tmp_path), 0) for n in (1, 4)]
    assert objective(batches(range(5))) != objective(batches(range(5, 10)))  # in training there is dropout again
    chosen = [json.loads(data.read_text())[int(name.split()[1])] for name, _ in held.records]
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(**Llava().batch(chosen, tmp_path, "v1"))
    assert ours == pytest.approx([theirs.loss.item()] * 2, rel=1e-5)


@pytest.mark.parametrize("name", ["finetune", "finetune-lora"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(tmp_path, monkeypatch, name):
    """With grouping and validation, and with saved states between two rows of the log."""
    monkeypatch.setattr(progress.Log, "every", 3)
    data = write(tmp_path, [*CONVERSATIONS[1:3] * 3])
    recipe = replace(RECIPES[name], validate=0.2, max_length=LONGEST)
    whole, stopped = (Place(tmp_path / name, save_every=2) for name in ("whole", "stopped"))

    def run(place):
        if name == "finetune":
            train_on_records(place, data, None, BUNDLED, 5, 2, 1e-3, recipe=recipe)
        else:
            train_adapter(place, data, None, BUNDLED, 5, 2, 1e-2, 1e-3, Lora(4, 8, dropout=0.2), recipe=recipe)

    run(whole)
    real = Records.conversations
    monkeypatch.setattr(Records, "conversations", lambda self, n: 1 / (n.start != 6) and real(self, n))
    with pytest.raises(ZeroDivisionError):  # in the fourth step
        run(stopped)
    monkeypatch.setattr(Records, "conversations", real)
    run(stopped)
    names = ["log.csv", "adapter_model.safetensors" if name == "finetune-lora" else "model.safetensors"]
    assert all((whole.folder / n).read_bytes() == (stopped.folder / n).read_bytes() for n in names)
    assert [step for _, step in logged_losses(whole.folder)] == [0, 2, 3, 4, 5, 5]
    assert Image.open(whole.folder / "log.png").width > 100
    with pytest.raises(ValueError, match="another run"):
        recipe = replace(recipe, seed=1)
        run(stopped)
