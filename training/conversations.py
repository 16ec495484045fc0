"""Conversations in LLaVA's JSON form as token ids and labels, and a batch of them as tensors.

    B batch    T tokens
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from llava import LlavaProcessor

IGNORED = -100  # the label of a token that does not count in the loss
ROLES = {"human": "user", "gpt": "assistant"}


def messages(turns: list[dict]) -> list[dict]:
    """LLaVA's JSON turns, {"from": "human", "value": "<image>\\n..."}, as the messages that a prompt template takes."""
    result = []
    for turn in turns:
        text = turn["value"]
        pictures = [{"type": "image"}] * text.count("<image>")
        if pictures:  # the template writes them in front of the text
            text = text.replace("<image>", "").strip()
        result.append({"role": ROLES[turn["from"]], "content": pictures + [{"type": "text", "text": text}]})
    return result


def tokenize_conversation(turns: list[dict], processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """A conversation as ids and labels. Only the answers and the </s> after each of them have labels."""
    tokenizer, ids, labels = processor.tokenizer, [], []
    template = processor.template
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        prompt = template.render(messages([question]), add_generation_prompt=True)
        prompt = prompt.replace("<image>", "<image>" * processor.image_seq_length)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=not ids)
        answer_ids = [*tokenizer.encode(answer["value"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += prompt_ids + answer_ids
        labels += [IGNORED] * len(prompt_ids) + answer_ids
        template = replace(template, system="")  # only the first turn has the system text
    return ids, labels


def tokenize_caption(caption: str, processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """A picture and its caption as ids and labels, in the template `plain` of the alignment stage.

    Only the caption and its </s> have labels. The text is "<image>\\ncaption</s>"; LLaVA's own is in tokenize_plain.
    """
    turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": caption}]
    return tokenize_conversation(turns, LlavaProcessor(None, processor.tokenizer, processor.image_seq_length, "plain"))


def tokenize_plain(turns: list[dict], processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """Pictures and their caption as ids and labels, as in LLaVA's first stage: "<image>caption\\n".

    The text of the question is left out. Only the caption and the newline have labels.
    """
    tokenizer = processor.tokenizer
    patches = turns[0]["value"].count("<image>") * processor.image_seq_length
    before = [tokenizer.bos_token_id] + [tokenizer.image_token_id] * patches
    caption = tokenizer.encode(turns[1]["value"] + "\n", add_special_tokens=False)
    return before + caption, [IGNORED] * len(before) + caption


def cut(
    row: tuple[list[int], list[int]], longest: int, processor: LlavaProcessor
) -> tuple[tuple[list[int], list[int]], int]:
    """At most the first `longest` ids and labels, and how many pictures are in them. No picture is cut in two.

    Raises ValueError if no label is left.
    """
    ids, labels = (part[:longest] for part in row)
    pictures, of_the_last = divmod(ids.count(processor.tokenizer.image_token_id), processor.image_seq_length)
    end = len(ids) - of_the_last  # only the last picture can be incomplete, and it is at the end
    if all(label == IGNORED for label in labels[1:end]):
        raise ValueError(f"no answer begins within the first {longest} of its {len(row[0])} tokens")
    return (ids[:end], labels[:end]), pictures


def collate(rows: Iterable[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Ids and labels (B, T), padded on the right. This needs no attention mask: no token attends to later ones."""
    rows = list(rows)
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return {"input_ids": input_ids, "labels": labels}
