"""Conversations about pictures, from a file in the JSON form of LLaVA's training files, as batches.

    [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}, ...]

"image" may be missing, or be a list of pictures: one for each <image> in the questions, in their order. A first turn
that is not the human's is left out.
"""

import json
import random
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hub.pictures import open_image
from llava import LlavaProcessor
from training.conversations import collate, cut, tokenize_conversation, tokenize_plain
from training.grouping import grouped_order, words


def shuffled(count: int, epoch: int) -> list[int]:
    """The order of `count` records in an epoch: the same in every process and in a resumed run."""
    return random.Random(epoch).sample(range(count), count)


@dataclass
class Records:
    """The records of a file that can be trained on.

    Records with a mistake are named in `skipped`, one line each. Those whose picture cannot be opened, or that are
    longer than `longest` tokens, are found and printed when their turn comes. Raises ValueError if the file is not a
    list of records or none of them can be used.
    """

    file: Path
    images: Path
    processor: LlavaProcessor
    longest: int
    skipped: list[str] = field(default_factory=list)
    tokenize: Callable = tokenize_conversation  # or tokenize_plain, for records of one question and one answer
    cuts: bool = False  # cut what is longer than `longest`, instead of skipping it
    group: int = 0  # samples in a step, to group them by modality and length

    def __post_init__(self) -> None:
        self.records, self.orders, self.printed = [], {}, set()
        for i, record in enumerate(read_list(self.file)):
            name = f"record {i}" + (f" ({record['id']!r})" if isinstance(record, dict) and record.get("id") else "")
            if mistake := self.mistake(record):
                self.skipped.append(f"{name}: {mistake}")
            else:
                self.records.append((name, record))
        if not self.records:
            because = f" (the first, {self.skipped[0]})" if self.skipped else ""
            raise ValueError(f"{self.file} has no record that can be trained on{because}")

    def mistake(self, record: object) -> str | None:
        """What is wrong with a record, or None."""
        turns = dialogue(record) if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns or len(turns) % 2:
            return "its conversations are not pairs of a question and an answer"
        for i, turn in enumerate(turns):
            wanted = ("human", "gpt")[i % 2]
            if not isinstance(turn, dict) or turn.get("from") != wanted or not isinstance(turn.get("value"), str):
                return f'turn {i} is not {{"from": "{wanted}", "value": "..."}}'
            if control := self.control_token(turn["value"], is_answer=wanted == "gpt"):
                return f"turn {i} contains {control}"
        images, mentioned = pictures_of(record), sum(turn["value"].count("<image>") for turn in turns)
        if self.tokenize is tokenize_plain and (len(turns) > 2 or not images):
            return "it is not a picture with one caption, as the template plain needs"
        if mentioned != len(images):
            return f"its questions contain <image> {mentioned} times, but it has {len(images)} pictures"
        for image in images:
            try:
                found = isinstance(image, str) and (self.images / image).is_file()
            except (OSError, ValueError):  # a name that no file can have
                found = False
            if not found:
                return f"there is no picture {str(image)[:80]!r} in {self.images}"
        return None

    def control_token(self, text: str, is_answer: bool) -> str | None:
        """The part of a text that the tokenizer would not encode as text, or None."""
        for name in self.processor.tokenizer.special_names.values():
            if name in text and (is_answer or name != "<image>"):
                return f"{name}, which is a control token"
        return "half of a surrogate pair" if any("\ud800" <= letter <= "\udfff" for letter in text) else None

    def read(self, record: dict) -> tuple[list[Tensor], tuple[list[int], list[int]]]:
        """The pixels of a record's pictures, and its ids and labels."""
        images, row = self.read_text(record)
        pictures = [open_image(self.images / image) for image in images]
        return [self.processor.image_processor([picture])[0] for picture in pictures], row

    def read_text(self, record: dict) -> tuple[list[str], tuple[list[int], list[int]]]:
        """The names of a record's pictures, and its ids and labels. Raises ValueError if the ids are too many."""
        row, images = self.tokenize(dialogue(record), self.processor), pictures_of(record)
        if len(row[0]) > self.longest:
            if not self.cuts:
                raise ValueError(f"its {len(row[0])} tokens are more than the model's {self.longest}")
            row, remaining = cut(row, self.longest, self.processor)
            images = images[:remaining]
        return images, row

    def order(self, epoch: int) -> list[int]:
        """The numbers of the records in the order of an epoch."""
        if epoch not in self.orders:
            before = {n: order for n, order in self.orders.items() if n == epoch - 1}  # a step may be in both
            if self.group:
                lengths = [words(record) for _, record in self.records]
                self.orders = before | {epoch: grouped_order(lengths, self.group, epoch)}
            else:
                self.orders = before | {epoch: shuffled(len(self.records), epoch)}
        return self.orders[epoch]

    def hold_back(self, share: float, seed: int) -> "Records":
        """Remove and return a share of the records, chosen by the seed. ValueError if it is none or all of them."""
        count = round(share * len(self.records))
        if not 0 < count < len(self.records):
            many = f"{count} of {len(self.records)} records"
            raise ValueError(f"--validate {share:g} would hold back {many}: it must leave some on both sides")
        chosen = set(random.Random(seed).sample(range(len(self.records)), count))
        held = copy(self)
        held.records = [self.records[i] for i in sorted(chosen)]
        held.orders, held.group = {}, 0
        self.records = [record for i, record in enumerate(self.records) if i not in chosen]
        return held

    def conversations(self, numbers: range) -> dict[str, Tensor]:
        """Sample n is record n of the shuffled file. Each epoch, a pass through the file, has another order."""
        pictures, rows, length = [], [], len(self.order(0))
        for start in numbers:
            for number in range(start, start + length):  # the next one replaces one that cannot be used
                epoch, i = divmod(number, length)
                name, record = self.records[self.order(epoch)[i]]
                try:
                    picture, row = self.read(record)
                except (OSError, ValueError) as error:
                    self.print_once(f"skipped: {name}: {error}")
                    continue
                pictures += picture
                rows.append(row)
                break
        if not rows:
            raise ValueError(f"none of the conversations in {self.file} can be trained on")
        batch = collate(rows, self.processor.tokenizer.pad_token_id)
        return {"pixel_values": torch.stack(pictures), **batch} if pictures else batch

    def print_once(self, line: str) -> None:
        if line not in self.printed:
            self.printed.add(line)
            print(line, flush=True)


def dialogue(record: dict) -> object:
    """The turns of a record that LLaVA trains on: from the human's first."""
    turns = record.get("conversations")
    starts_late = isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") == "gpt"
    return turns[1:] if starts_late else turns


def pictures_of(record: dict) -> list:
    image = record.get("image")
    return image if isinstance(image, list) else [] if image is None else [image]


def read_list(file: Path) -> list:
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{file} is not a list of records, as LLaVA's training files are")
    return records
