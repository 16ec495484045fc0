"""Text to token ids and back, and the prompts LLaVA was taught with.

A sentencepiece model (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226) cuts text into pieces; a space is
written "▁", and a character the vocabulary lacks is spelt in bytes, "<0xE7>". Special tokens stand outside the text:

    <unk> 0    <s> 1, starts every prompt    </s> 2, ends an answer    <image>, one per patch    <pad>, fills up a batch

    "USER: <image>\\nWhat is it? ASSISTANT:"  ->  1 3148 1001 29901 29871 32000 29871 13 5618 ...

29871 is a lone "▁". The first is the space typed in front of <image>; the second is the one that sentencepiece puts
in front of every stretch of text, here of "\\nWhat is it?".

Left out: truncation, and training a vocabulary (train.py has sentencepiece do it).
"""

import re
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from checkpoint import read_tokenizer_settings

SPACE = "\u2581"  # sentencepiece's visible space, "▁"


class Tokenizer:
    """A sentencepiece model with special tokens. `special_tokens` maps those the model lacks to their ids."""

    def __init__(self, model: bytes, special_tokens: dict[str, int] | None = None, pad_token: str = "<pad>"):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
            size = self.sp.vocab_size()
            pieces = self.sp.id_to_piece(list(range(size)))
            self.special_tokens = {pieces[i]: i for i in range(size) if self.sp.is_control(i)}
            self.special_tokens |= {self.sp.id_to_piece(self.sp.unk_id()): self.sp.unk_id()}
        except (RuntimeError, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer.model is not a sentencepiece model ({error})") from error
        self.bos_token_id, self.eos_token_id = self.sp.bos_id(), self.sp.eos_id()
        if min(self.bos_token_id, self.eos_token_id) < 0:
            raise ValueError("tokenizer.model has no <s>, or no </s>")
        self.special_tokens |= special_tokens or {}
        if "<image>" not in self.special_tokens:
            self.special_tokens |= {"<image>": size, "<pad>": size + 1}
        self.special_names = {i: name for name, i in self.special_tokens.items()}
        names = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.pad_token_id = self.special_tokens.get(pad_token, self.sp.unk_id())
        self.image_token_id = self.special_tokens["<image>"]
        self.padding_side = "left"  # a decoder writes on at the right end, so that end must be text

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        folder = Path(folder)
        if not (folder / "tokenizer.model").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.model: copy it there from the original checkpoint")
        return cls((folder / "tokenizer.model").read_bytes(), *read_tokenizer_settings(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Cut at the special tokens, a user's too, and encode what lies between, each stretch as a text of its own."""
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self.special_pattern.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.sp.encode(part)
        return ids

    def decode(self, ids: list[int] | Tensor, skip_special_tokens: bool = False, **_) -> str:
        """Ids to text. The space that encoding puts in front is taken off; ids beyond the vocabulary give nothing."""
        return self.join(ids, skip_special_tokens).removeprefix(" ")

    def batch_decode(self, batch: list | Tensor, skip_special_tokens: bool = False, **_) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def join(self, ids: list[int] | Tensor, skip_special_tokens: bool) -> str:
        """`decode` with the leading space left on. A run of bytes that is not UTF-8 gives one U+FFFD a byte."""
        text, run = [], bytearray()

        def close_run() -> None:
            try:
                text.append(run.decode())
            except UnicodeDecodeError:
                text.append("\ufffd" * len(run))
            run.clear()

        for i in map(int, ids):
            if i in self.special_names:
                piece = "" if skip_special_tokens else self.special_names[i]
            elif not 0 <= i < self.sp.vocab_size():
                piece = ""
            elif self.sp.is_byte(i):
                run.append(int(self.sp.id_to_piece(i)[3:5], 16))  # "<0xE7>"
                continue
            else:
                piece = self.sp.id_to_piece(i).replace(SPACE, " ")
            if piece:
                close_run()
                text.append(piece)
        close_run()
        return "".join(text)

    def pad(self, batch: list[list[int]]) -> tuple[Tensor, Tensor]:  # -> two (B, T)
        """Fill up to the longest with <pad>; the second result, the attention mask, is 1 on tokens and 0 on filling."""
        longest = max(map(len, batch))
        left = self.padding_side == "left"
        input_ids = torch.full((len(batch), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(batch):
            place = slice(longest - len(ids), longest) if left else slice(len(ids))
            input_ids[row, place] = torch.tensor(ids)
            attention_mask[row, place] = 1
        return input_ids, attention_mask


# --- Prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """How a conversation is written down for the decoder."""

    system: str  # the instruction that opens a conversation without one of its own
    user: str
    user_end: str
    assistant: str
    assistant_end: str

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """Messages in the reference's form to one string; the pictures of a message come before its text.

        A message is {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, the role
        being system, user or assistant; the content may be a plain string.
        """
        prompt = self.system + " " if self.system and messages[0]["role"] != "system" else ""
        for message in messages:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = "<image>\n" * sum(part["type"] == "image" for part in content)
            text += " ".join(part["text"] for part in content if part["type"] == "text")
            before, after = {
                "system": ("", " "),
                "user": (self.user, self.user_end),
                "assistant": (self.assistant, self.assistant_end),
            }[message["role"]]
            prompt += before + text + after
        return prompt + self.assistant.rstrip() if add_generation_prompt else prompt


TEMPLATES = {
    # what the hub's converted checkpoints come with (theirs has no space at the end of a message without a text)
    "hub": Template("", "USER: ", " ", "ASSISTANT: ", " "),
    # Vicuna's, with which LLaVA-1.5 was trained and evaluated (Liu et al. 2023, https://arxiv.org/abs/2310.03744)
    "v1": Template(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: ", " ", "ASSISTANT: ", "</s>",
    ),
    # for alignment: <image>, line feed, caption, and in training </s> (LLaVA's own form is <image>, caption, line feed)
    "plain": Template("", "", "", "", ""),
}  # fmt: skip
