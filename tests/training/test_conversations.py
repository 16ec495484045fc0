"""Conversations and captions as ids and labels."""

import pytest

from tiny_world import TURNS, tiny_world
from training.conversations import collate, messages, tokenize_caption, tokenize_conversation

pytestmark = pytest.mark.quick
PROCESSOR = tiny_world().processor


def test_a_conversation_is_tokenized_as_its_prompt_will_be():
    ids, labels = tokenize_conversation(TURNS, PROCESSOR)
    text = PROCESSOR.template.render(messages(TURNS), add_generation_prompt=False)
    assert ids == PROCESSOR.tokenizer.encode(text.replace("<image>", "<image>" * 64))
    learnt = [i for i in labels if i != -100]
    assert PROCESSOR.decode(learnt) == "There is a cat on the left.</s> No.</s>"
    assert all(label in (-100, i) for label, i in zip(labels, ids, strict=True))


def test_only_the_caption_has_labels_in_alignment():
    ids, labels = tokenize_caption("a cat on a blue background", PROCESSOR)
    assert PROCESSOR.decode(ids).replace("<image>", "") == "<s> \n a cat on a blue background</s>"
    assert PROCESSOR.decode([i for i in labels if i != -100]) == "a cat on a blue background</s>"


def test_messages_of_a_llava_json_file():
    said = messages(TURNS)
    assert said[0] == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on the left?"}]}
    assert [message["role"] for message in said] == ["user", "assistant"] * 2


def test_rows_are_padded_on_the_right_and_padding_has_no_label():
    batch = collate([([1, 5, 6], [-100, 5, 6]), ([1, 7], [-100, 7])], pad=9)
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, 7, 9]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, 7, -100]]
