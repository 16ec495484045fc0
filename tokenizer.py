"""Text to token ids and back, and the prompt templates of LLaVA.

A sentencepiece model (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226) splits text into pieces. A space is
part of a piece and written "▁"; a character that is not in the vocabulary is spelled in bytes such as "<0xE7>". Special
tokens have ids of their own and are never split. In the 7B:

    <unk> 0    <s> 1 starts a prompt    </s> 2 ends an answer    <image> 32000, one per patch    <pad> 32001 fills rows

    "USER: <image>\\nWhat is it? ASSISTANT:"  ->  1 3148 1001 29901 29871 32000 29871 13 5618 ...

29871 is a lone "▁". The first one is the space typed before <image>. The second one was added: sentencepiece puts a
space in front of every text it encodes, here in front of "\\nWhat is it?". 13 is "<0x0A>", a newline.

Not implemented: splitting into pieces and training a vocabulary, which the sentencepiece library does, and truncation.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hub.files import open_sentencepiece
from hub.interface import parse_messages


class Tokenizer:
    """A sentencepiece model (the bytes of tokenizer.model), and special tokens: name -> id, from the JSON files."""

    first_space = " "  # what encoding puts in front of a text, and decoding removes
    padding_side = "left"  # generation continues at the right end, so the right end must be text

    def __init__(self, model: bytes, special_tokens: dict[str, int] | None = None, pad_token: str = "<pad>"):
        self.sp, control_tokens = open_sentencepiece(model)
        self.vocab_size = self.sp.vocab_size()
        self.bos_token_id, self.eos_token_id = self.sp.bos_id(), self.sp.eos_id()
        special_tokens = control_tokens | (special_tokens or {})
        if "<image>" not in special_tokens:  # as in the files of LLaVA's authors: it gets the first free id
            special_tokens = {"<image>": self.vocab_size, "<pad>": self.vocab_size + 1} | special_tokens
        self.special_tokens = special_tokens
        self.special_names = {i: name for name, i in special_tokens.items()}
        names = sorted(special_tokens, key=len, reverse=True)  # a regex takes the first alternative that matches
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")  # with (), split keeps them
        self.image_token_id = special_tokens["<image>"]
        self.pad_token_id = special_tokens.get(pad_token, self.sp.unk_id())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        from hub.processor_settings import read_tokenizer_settings, read_vocabulary
        return cls(read_vocabulary(Path(folder)), *read_tokenizer_settings(Path(folder)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Split at special tokens, including any that the user typed, and encode each part between them separately."""
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self.special_pattern.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.encode_text(part)
        return ids

    def encode_text(self, text: str, is_first: bool = True) -> list[int]:
        """The ids of a text without special tokens. sentencepiece needs no `is_first`; tokenizers in family/ do."""
        return self.sp.encode(text)

    def decode(self, ids: list[int] | Tensor, skip_special_tokens=False, clean_up_tokenization_spaces=None) -> str:
        """Ids to text, without the space that encoding added. The last argument has no effect, as in the reference."""
        return self.join(ids, skip_special_tokens).removeprefix(self.first_space)

    def batch_decode(self, batch, skip_special_tokens=False, clean_up_tokenization_spaces=None) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def join(self, ids: list[int] | Tensor, skip_special_tokens: bool) -> str:
        """The text of ids, first space included. Byte tokens are decoded together: a character may take several."""
        text, pending_bytes = "", b""
        for i in map(int, ids):
            piece = self.piece(i, skip_special_tokens)
            if isinstance(piece, bytes):
                pending_bytes += piece
            elif piece:
                text += decode_bytes(pending_bytes) + piece
                pending_bytes = b""
        return text + decode_bytes(pending_bytes)

    def piece(self, i: int, skip_special_tokens: bool) -> str | bytes:
        """The text of one token, or the byte that it stands for; empty for an id beyond the vocabulary."""
        if i in self.special_names:
            return "" if skip_special_tokens else self.special_names[i]
        if not 0 <= i < self.vocab_size:
            return ""
        if self.sp.is_byte(i):
            return bytes([int(self.sp.id_to_piece(i)[3:5], 16)])  # "<0xE7>"
        return self.sp.id_to_piece(i).replace("▁", " ")

    def pad(self, batch: list[list[int]]) -> tuple[Tensor, Tensor]:  # -> two (B, T)
        """Fill rows up to the longest with the pad token. Returns ids, and the attention mask: 0 on padding, else 1."""
        longest = max(map(len, batch))
        left = self.padding_side == "left"
        input_ids = torch.full((len(batch), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(batch):
            place = slice(longest - len(ids), longest) if left else slice(len(ids))
            input_ids[row, place] = torch.tensor(ids)
            attention_mask[row, place] = 1
        return input_ids, attention_mask


def decode_bytes(run: bytes) -> str:
    """UTF-8 to text. If any part of the bytes is not valid, U+FFFD for every byte."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


# --- Prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """How a conversation is written as a prompt: the text before and after each turn."""

    system: str = ""  # the system message, used if the conversation does not begin with one
    user: str = ""
    user_end: str = ""
    assistant: str = ""
    assistant_end: str = ""

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Convert messages, in the reference's form, to one prompt. The pictures of a message come before its text.

        A message is {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}; roles
        are system, user and assistant; the content may be a plain string. Raises ValueError for anything else.
        """
        before_and_after = {
            "system": ("", " "),
            "user": (self.user, self.user_end),
            "assistant": (self.assistant, self.assistant_end),
        }
        turns = parse_messages(messages)
        prompt = (self.system + " ") if self.system and turns[0][0] != "system" else ""
        for role, parts in turns:
            text = "<image>\n" * sum(part["type"] == "image" for part in parts)
            text += " ".join(part["text"] for part in parts if part["type"] == "text")
            before, after = before_and_after[role]
            prompt += before + text + after
        if add_generation_prompt:
            prompt += self.assistant.rstrip()  # the model generates the space
        return prompt


TEMPLATES = {
    # llava-hf's checkpoints on the hub
    "hub": Template(user="USER: ", user_end=" ", assistant="ASSISTANT: ", assistant_end=" "),
    # LLaVA-1.5 and the tiny model were trained with this one: that of Vicuna, the fine-tuned Llama inside LLaVA-1.5
    "v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        user="USER: ", user_end=" ", assistant="ASSISTANT: ", assistant_end="</s>",
    ),
    # The first stage of LLaVA's training, which aligns pictures with captions: <image>, a newline and the caption
    "plain": Template(),
}  # fmt: skip
