"""Anybody's conversations about pictures, in the JSON form of LLaVA's training files, as batches.

    [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}, ...]
"""

import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hub.pictures import open_image
from llava import LlavaProcessor
from training.conversations import collate, tokenize_conversation


@lru_cache(maxsize=2)
def shuffled(count: int, epoch: int) -> list[int]:
    """The order of `count` records in an epoch: the same in every process and in a resumed run."""
    return random.Random(epoch).sample(range(count), count)


@dataclass
class Records:
    """The records of a file that can be trained on.

    "image" may be missing from a record without a picture. Records with a mistake are named in `skipped`, one line
    each. Those whose picture cannot be opened, or that are longer than `longest` tokens, are found and printed when
    their turn comes. Raises ValueError if the file is not a list of records or none of them can be used.
    """

    file: Path
    images: Path
    processor: LlavaProcessor
    longest: int
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = []
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
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns or len(turns) % 2:
            return "its conversations are not pairs of a question and an answer"
        for i, turn in enumerate(turns):
            wanted = ("human", "gpt")[i % 2]
            if not isinstance(turn, dict) or turn.get("from") != wanted or not isinstance(turn.get("value"), str):
                return f'turn {i} is not {{"from": "{wanted}", "value": "..."}}'
            if control := self.control_token(turn["value"], is_answer=wanted == "gpt"):
                return f"turn {i} contains {control}"
        image = record.get("image")
        mentioned = sum(turn["value"].count("<image>") for turn in turns)
        if mentioned != (image is not None):
            return f"its questions contain <image> {mentioned} times, but it has {int(image is not None)} pictures"
        try:
            found = image is None or (isinstance(image, str) and (self.images / image).is_file())
        except (OSError, ValueError):  # a name that no file can have
            found = False
        return None if found else f"there is no picture {str(image)[:80]!r} in {self.images}"

    def control_token(self, text: str, is_answer: bool) -> str | None:
        """What in a text the tokenizer would not encode as text, or None."""
        for name in self.processor.tokenizer.special_names.values():
            if name in text and (is_answer or name != "<image>"):
                return f"{name}, which is a control token"
        return "half of a surrogate pair" if any("\ud800" <= letter <= "\udfff" for letter in text) else None

    def read(self, record: dict) -> tuple[list[Tensor], tuple[list[int], list[int]]]:
        """The pixels of a record's picture, if it has one, and its ids and labels."""
        row = tokenize_conversation(record["conversations"], self.processor)
        if len(row[0]) > self.longest:
            raise ValueError(f"its {len(row[0])} tokens are more than the model's {self.longest}")
        pictures = [open_image(self.images / record["image"])] if record.get("image") is not None else []
        return [self.processor.image_processor([picture])[0] for picture in pictures], row

    def conversations(self, numbers: range) -> dict[str, Tensor]:
        """Sample n is record n of the shuffled file. Each epoch, a pass through the file, has another order."""
        pictures, rows = [], []
        for start in numbers:
            for number in range(start, start + len(self.records)):  # the next one replaces one that cannot be used
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


def read_list(file: Path) -> list:
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{file} is not a list of records, as LLaVA's training files are")
    return records
