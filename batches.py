"""What the stages of train.py learn from, as tensors: scenes of the emoji world, or anybody's LLaVA-format JSON file.

Every source is asked for the samples of a range of numbers and always gives the same ones for it, so a run that goes
on after a stop, and one that is split over several processes, sees exactly what it would have seen.

    B batch    T tokens    P patches
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import emoji_world
from clip import open_image
from emoji_world import wording
from llava import LlavaProcessor

TURNS = 3  # questions and answers in a conversation about a scene
NAME_TOKENS = 4  # that spell a patch: a shorter name is said again, a longer one is cut
PARTS, PART_BYTES = 5, 24  # of a scene: four things and the ground; room for the words of each
ROLES = {"human": "user", "gpt": "assistant"}


# --- From turns to ids and labels ------------------------------------------------------------------------------------


def messages(turns: list[dict]) -> list[dict]:
    """LLaVA's JSON turns, {"from": "human", "value": "<image>\\n..."}, as the messages a prompt template takes."""
    result = []
    for turn in turns:
        text = turn["value"]
        pictures = [{"type": "image"}] * text.count("<image>")
        text = text.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", "")
        result.append({"role": ROLES[turn["from"]], "content": pictures + [{"type": "text", "text": text}]})
    return result


def tokenize_conversation(turns: list[dict], processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """A conversation as ids and labels: only the assistant's words and the </s> behind them are to be learnt."""
    tokenizer, ids, labels = processor.tokenizer, [], []
    template = processor.template
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        prompt = template.render(messages([question])).replace("<image>", "<image>" * processor.image_seq_length)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=not ids)
        answer_ids = [*tokenizer.encode(answer["value"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += prompt_ids + answer_ids
        labels += [-100] * len(prompt_ids) + answer_ids
        template = replace(template, system="")  # it opens a conversation only once
    return ids, labels


def tokenize_caption(caption: str, processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """<image>, line feed, caption, </s> (LLaVA's form is <image>, caption, line feed); caption and </s> are learnt."""
    turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": caption}]
    return tokenize_conversation(turns, LlavaProcessor(None, processor.tokenizer, processor.image_seq_length, "plain"))


def collate(rows: Iterable[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Ids and labels of B rows, filled up on the right. No mask: a token never sees what comes after it."""
    rows = list(rows)
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    return {"input_ids": input_ids, "labels": labels}


# --- The emoji world -------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Sample n is the scene with seed n; the tower's scenes are fuller (see parts)."""

    sprites: dict
    processor: LlavaProcessor

    @property
    def side(self) -> int:
        return self.processor.image_processor.crop_size["height"]

    @property
    def pad(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def pictures(self, seeds: range, full: bool = False) -> tuple[Tensor, list[dict]]:  # -> (B, 3, side, side), truths
        fewest = {n: 4 if full and n % 4 else 0 for n in seeds}  # of full pictures three in four have four things
        drawn = [emoji_world.make_scene(self.sprites, n, self.side, at_least=fewest[n]) for n in seeds]
        return self.processor.image_processor([picture for picture, _ in drawn]), [truth for _, truth in drawn]

    def parts(self, seeds: range) -> dict[str, Tensor]:
        """Pictures, and for each of up to PARTS parts the share of each patch in it and the bytes of its words.

        pixel_values (B, 3, side, side), where (B, PARTS, P), words (B, PARTS, PART_BYTES); unused parts are zeros.
        Most pictures are full: one costs the same, and teaches the tower as much as it shows.
        """
        pixel_values, truths = self.pictures(seeds, full=True)
        columns = round(self.processor.image_seq_length**0.5)
        centres = (torch.arange(columns) + 0.5) / columns
        y, x = (grid.flatten() for grid in torch.meshgrid(centres, centres, indexing="ij"))
        where = torch.zeros(len(truths), PARTS, len(x))
        words = torch.zeros(len(truths), PARTS, PART_BYTES, dtype=torch.long)
        for i, truth in enumerate(truths):
            said, free = [thing["name"] for thing in truth["things"]], torch.ones_like(x)
            for j, thing in enumerate(truth["things"]):
                away = torch.maximum((x - thing["x"]).abs(), (y - thing["y"]).abs()) / thing["size"]  # 0.5 at its edge
                where[i, j] = (0.6 - away).clamp(min=0)  # the patches in its middle say most about it
                free *= away > 0.55
            if free.any():
                where[i, len(said)] = free
                said.append(f"{truth['ground']} background")
            for j, text in enumerate(said):
                words[i, j, : len(text)] = torch.tensor(list(text.encode()))
        where /= where.sum(-1, keepdim=True).clamp(min=1e-6)
        return {"pixel_values": pixel_values, "where": where, "words": words}

    def caption(self, truth: dict, seed: int) -> tuple[list[int], list[int]]:
        return tokenize_caption(emoji_world.caption(truth, wording(seed)), self.processor)

    def talk(self, truth: dict, seed: int) -> tuple[list[int], list[int]]:
        return tokenize_conversation(emoji_world.conversation(truth, wording(seed), TURNS), self.processor)

    def captions(self, seeds: range) -> dict[str, Tensor]:
        """Pictures with one caption each."""
        pixel_values, truths = self.pictures(seeds)
        return {"pixel_values": pixel_values, **collate(map(self.caption, truths, seeds), self.pad)}

    def conversations(self, seeds: range) -> dict[str, Tensor]:
        """Pictures with several questions and answers each."""
        pixel_values, truths = self.pictures(seeds)
        return {"pixel_values": pixel_values, **collate(map(self.talk, truths, seeds), self.pad)}

    def spelt_out(self, truth: dict) -> list[list[int]]:  # -> P of NAME_TOKENS ids
        """A picture in words: for each patch the name of the thing that is there, or the colour of the ground."""
        tokenizer, columns = self.processor.tokenizer, round(self.processor.image_seq_length**0.5)
        said = []
        for patch in range(columns * columns):
            y, x = ((place + 0.5) / columns for place in divmod(patch, columns))
            here = [t for t in truth["things"] if max(abs(x - t["x"]), abs(y - t["y"])) < t["size"] / 2]
            ids = tokenizer.encode(here[-1]["name"] if here else truth["ground"], add_special_tokens=False)
            said.append((ids * NAME_TOKENS)[:NAME_TOKENS])
        return said

    def text(self, seeds: range) -> dict[str, Tensor]:
        """Captions (one in four) and conversations, their pictures spelt out in words: `spelt` (B, P, NAME_TOKENS)."""
        truths = [emoji_world.make_truth(seed) for seed in seeds]
        rows = [(self.talk if seed % 4 else self.caption)(t, seed) for t, seed in zip(truths, seeds, strict=True)]
        return {"spelt": torch.tensor([self.spelt_out(truth) for truth in truths]), **collate(rows, self.pad)}


# --- Anybody's conversations -----------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def shuffled(count: int, epoch: int) -> list[int]:
    return random.Random(epoch).sample(range(count), count)


@dataclass
class Records:
    """A LLaVA-format JSON file: a list of {"image": "a.jpg", "conversations": [{"from": "human", "value": ...}, ...]}.

    "image" may be missing where no picture is spoken of. Records that cannot be used are named in `skipped`, a line
    each; those whose picture turns out not to open, or that are longer than `longest` tokens, are named when it is
    their turn. Raises ValueError when the file is not such a list or nothing in it is of use.
    """

    file: Path
    images: Path
    processor: LlavaProcessor
    longest: int
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            records = json.loads(Path(self.file).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.file} cannot be read as JSON: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{self.file} is not a list of records, as LLaVA's training files are")
        self.records = []
        for i, record in enumerate(records):
            name = f"record {i}" + (f" ({record['id']!r})" if isinstance(record, dict) and record.get("id") else "")
            if trouble := self.trouble(record):
                self.skipped.append(f"{name}: {trouble}")
            else:
                self.records.append((name, record))
        if not self.records:
            because = f" (the first, {self.skipped[0]})" if self.skipped else ""
            raise ValueError(f"{self.file} has no record that can be trained on{because}")

    def trouble(self, record: object) -> str | None:
        """What is wrong with a record, or None."""
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns or len(turns) % 2:
            return "its conversations are not pairs of a question and an answer"
        for i, turn in enumerate(turns):
            wanted = ("human", "gpt")[i % 2]
            if not isinstance(turn, dict) or turn.get("from") != wanted or not isinstance(turn.get("value"), str):
                return f'turn {i} is not {{"from": "{wanted}", "value": "..."}}'
            if control := self.control_token(turn["value"], answer=wanted == "gpt"):
                return f"turn {i} holds {control}"
        image = record.get("image")
        spoken_of = sum(turn["value"].count("<image>") for turn in turns)
        if spoken_of != (image is not None):
            return f"<image> stands {spoken_of} times in its questions, for {int(image is not None)} pictures"
        try:
            found = image is None or (isinstance(image, str) and (self.images / image).is_file())
        except (OSError, ValueError):  # a name that no file can have
            found = False
        return None if found else f"there is no picture {str(image)[:80]!r} in {self.images}"

    def control_token(self, text: str, answer: bool) -> str | None:
        """What in a text the tokenizer would not take as text."""
        for name in self.processor.tokenizer.special_names.values():
            if name in text and (answer or name != "<image>"):
                return f"{name}, which is a control token"
        return "half of a surrogate pair" if any("\ud800" <= letter <= "\udfff" for letter in text) else None

    def read(self, record: dict) -> tuple[list[Tensor], tuple[list[int], list[int]]]:
        row = tokenize_conversation(record["conversations"], self.processor)
        if len(row[0]) > self.longest:
            raise ValueError(f"{len(row[0])} tokens are more than the model holds, {self.longest}")
        pictures = [open_image(self.images / record["image"])] if record.get("image") is not None else []
        return [self.processor.image_processor([picture])[0] for picture in pictures], row

    def conversations(self, numbers: range) -> dict[str, Tensor]:
        """Pictures and conversations in a shuffled order; past the file's end it begins again, in another one."""
        pictures, rows = [], []
        for start in numbers:
            for number in range(start, start + len(self.records)):  # where one is of no use, the next takes its place
                epoch, i = divmod(number, len(self.records))
                name, record = self.records[shuffled(len(self.records), epoch)[i]]
                try:
                    picture, row = self.read(record)
                except (OSError, ValueError) as error:
                    print(f"skipped: {name}: {error}", flush=True)
                    continue
                pictures += picture
                rows.append(row)
                break
        if not rows:
            raise ValueError(f"none of the conversations in {self.file} can be trained on")
        batch = collate(rows, self.processor.tokenizer.pad_token_id)
        return {"pixel_values": torch.stack(pictures), **batch} if pictures else batch


# --- Steps -----------------------------------------------------------------------------------------------------------


@dataclass
class Steps(Dataset):
    """Item i is what process `rank` of `world_size` learns from in step first + i: its share of the step's samples,
    in `pieces` batches one after the other."""

    data: Callable[[range], dict[str, Tensor]]
    batch: int  # samples in a step, over all processes
    first: int
    end: int
    rank: int = 0
    world_size: int = 1
    pieces: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.world_size * self.pieces):
            pieces = f", in {self.pieces} pieces each" if self.pieces > 1 else ""
            raise ValueError(f"{self.batch} samples cannot be shared by {self.world_size} processes{pieces}")

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, i: int) -> list[dict[str, Tensor]]:
        if i >= len(self):
            raise IndexError(i)
        samples = range((self.first + i) * self.batch, (self.first + i + 1) * self.batch)
        share = len(samples) // (self.world_size * self.pieces)
        starts = range(self.rank * share * self.pieces, (self.rank + 1) * share * self.pieces, share)
        return [self.data(samples[start : start + share]) for start in starts]

    def loader(self, workers: int) -> DataLoader:
        """Batches are drawn by other processes while this one learns."""
        return DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=3 if workers else None)
