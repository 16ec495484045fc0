"""Conversations in LLaVA's format as batches, and which files are refused."""

import json
import random

import pytest
import torch

from tiny_world import tiny_world, write_records
from training import emoji_world
from training.conversations import collate, tokenize_conversation
from training.records import Records

pytestmark = pytest.mark.quick


def test_records_are_what_the_world_says(tmp_path):
    processor = tiny_world().processor
    (tmp_path / "my.json").write_text(json.dumps(write_records(tmp_path, 3)))
    found = Records(tmp_path / "my.json", tmp_path, processor, 2048)
    batch = found.conversations(range(3))
    said = [emoji_world.conversation(emoji_world.make_truth(i), random.Random(i), 2) for i in range(3)]
    rows = collate([tokenize_conversation(turns, processor) for turns in said], 0)
    assert not found.skipped and sorted(batch["labels"].tolist()) == sorted(rows["labels"].tolist())
    assert batch["pixel_values"].shape == (3, 3, 112, 112)
    assert all(torch.equal(tensor, found.conversations(range(3))[name]) for name, tensor in batch.items())
    later = [found.conversations(range(n, n + 3))["labels"].tolist() for n in range(3, 15, 3)]  # the next epochs
    assert all(sorted(labels) == sorted(batch["labels"].tolist()) for labels in later)
    assert any(labels != batch["labels"].tolist() for labels in later)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '["a"]', "[1]", "\xff"])
def test_a_file_without_records_is_refused(tmp_path, content):
    (tmp_path / "my.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"my\.json"):
        Records(tmp_path / "my.json", tmp_path, tiny_world().processor, 2048)
