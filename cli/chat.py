"""A conversation about pictures, at the terminal: `python llava.py --chat`.

`ids` has all tokens of the conversation, and the first `cache.length` of them are in the KV cache. A turn appends the
user's text and runs only the tokens that the cache lacks. These include the last token of an answer that was cut
short: it was displayed, but a token goes through the model only when the next one is requested.

    ids      <s> USER: <image> ... ASSISTANT: A cat  and  a  USER: Which colour? ASSISTANT:
    cached   ---------------------------------------
    run now                                          ---------------------------------------

What the user types is text: only the template writes special tokens. Not implemented: dropping the oldest turns when
the context is full (/clear starts again).
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

import torch

from cli.answer import MARK, end_ids
from cli.errors import USER_ERRORS, sentence
from generate import GenerationConfig, generate_tokens
from hub.pictures import open_image
from hub.text_watcher import TextWatcher
from hub.writer import write_whole

HELP = """\
/image PATH   add a picture to your next message; repeat for several pictures
/clear        forget the pictures and the conversation
/save FILE    write the conversation as JSON, in the format of LLaVA's training files
/help         print these lines
/quit         leave; an empty line or Ctrl-D does the same
Ctrl-C        stop the answer"""


class Chat:
    """A model, its processor and a conversation. `options` are the fields of generate.GenerationConfig."""

    def __init__(self, model, processor, system: str | None = None, stop_strings=None, seed=None, **options):
        self.model, self.processor, self.stop_strings = model, processor, stop_strings
        self.system = system
        self.config = GenerationConfig.merged(model.generation_config, options)
        # A generated <image> would have no picture, so it ends an answer too.
        self.ends = {*end_ids(model, processor, options), processor.tokenizer.image_token_id}
        self.generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        self.context = model.config.text_config.max_position_embeddings
        self.clear()

    def clear(self) -> None:
        self.ids: list[int] = []
        self.cache = self.model.language_model.new_cache(1, 0)
        self.pictures: list[tuple[str, object]] = []  # path and picture, for the next message
        self.shown: list[str] = []  # paths of the pictures in earlier messages
        self.turns: list[dict] = []  # in the format of LLaVA's training files

    def turn_ids(self, text: str) -> list[int]:
        """The tokens of a turn: the end of the answer before it, pictures, text, and the start of the next answer."""
        tokenizer = self.processor.tokenizer
        head, tail = self.around_text()
        if self.ids:
            head = head.removeprefix(tokenizer.first_space)  # encoding puts it in front of each text
        # The user's text is encoded together with the text around it, so a typed <image> is not a token.
        *before, last = tokenizer.special_pattern.split(head)
        first, *after = tokenizer.special_pattern.split(tail)
        ids = tokenizer.encode_text(last + text + first, is_first=not before)
        special = set(tokenizer.special_names) - {tokenizer.special_tokens.get("<unk>")}
        if special := special.intersection(tokenizer.encode_text(text)):
            name = tokenizer.special_names[min(special)]
            raise ValueError(f"{name} is a control token of this model and cannot be in a message: change its spelling")
        opening = "".join(before)
        (opening,) = self.processor.expand([opening], [picture for _, picture in self.pictures])
        opening = opening.removeprefix(tokenizer.special_names.get(tokenizer.bos_token_id, ""))  # encode adds it
        return [*tokenizer.encode(opening, not self.ids), *ids, *tokenizer.encode("".join(after), False)]

    def around_text(self) -> tuple[str, str]:
        """What the template writes before and after the text of this turn, from the end of the last answer on."""
        text = {"type": "text", "text": MARK}
        messages = [] if self.system is None else [{"role": "system", "content": [text | {"text": self.system}]}]
        if self.ids:  # any earlier question and answer: what follows them is the same for all
            messages += [{"role": "user", "content": [text]}, {"role": "assistant", "content": [text]}]
        messages.append({"role": "user", "content": [{"type": "image"}] * len(self.pictures) + [text]})
        parts = self.processor.apply_chat_template(messages, add_generation_prompt=True).split(MARK)
        if len(parts) != (4 if self.ids else 2):
            raise ValueError("the chat template does not write each message once, so it cannot be used with --chat")
        return parts[-2], parts[-1]

    def grow(self, length: int) -> None:
        """Give the cache a capacity of `length` tokens. An interrupt leaves the old cache, which is still complete."""
        old = self.cache
        if length > old.capacity:
            new = self.model.language_model.new_cache(1, min(max(length, 2 * old.capacity), self.context))
            for copy, kept in zip(new.k + new.v, old.k + old.v, strict=True):
                copy[:, :, : old.length] = kept[:, :, : old.length]
            new.attention_mask, new.length = old.attention_mask, old.length
            self.cache = new

    def say(self, text: str, streamer: Callable[[str], None]) -> str:
        """Stream the answer; returns why it ended: "stop", "length", or "context" if the context is full.

        An interrupt keeps the answer so far, or discards the question if its prefill was not complete. Raises
        ValueError for a turn that does not fit into the context.
        """
        prompt, answer = self.ids + self.turn_ids(text), []
        T, room, device = len(prompt), self.context - len(prompt), self.model.device
        if room < 1:
            raise ValueError(f"this would make {T} tokens, and the context ends at {self.context}: /clear starts again")
        limit = min(self.config.new_tokens(T), room)
        why = "context" if limit == room else "length"
        self.grow(T + limit)
        pictures = [picture for _, picture in self.pictures]
        inputs = self.processor.encode_pictures(pictures).to(device) if pictures else {}
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        tokens = generate_tokens(self.model, ids, mask, self.cache, inputs, self.config, self.generator)
        watcher = TextWatcher(self.processor.tokenizer, streamer, self.stop_strings)
        try:
            for token in map(int, islice(tokens, limit)):
                ended = token in self.ends
                if not ended:  # the template ends every answer, including one that was cut short
                    answer.append(token)
                if watcher.put(token) or ended:
                    why = "stop"
                    break
            watcher.flush()
            return why
        finally:
            if self.cache.length >= T:  # the question is in the cache
                self.ids = prompt + answer
                self.remember(text, answer)

    def remember(self, text: str, answer: list[int]) -> None:
        said = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
        for name in self.processor.tokenizer.special_tokens:  # in the file <image> means a picture: write < image>
            text, said = (part.replace(name, f"{name[0]} {name[1:]}") for part in (text, said))
        self.turns.append({"from": "human", "value": "<image>\n" * len(self.pictures) + text})
        self.turns.append({"from": "gpt", "value": said})
        self.shown += [path for path, _ in self.pictures]
        self.pictures = []

    def save(self, path: str) -> None:
        record = {"conversations": self.turns}
        if self.shown:
            record["image"] = self.shown[0] if len(self.shown) == 1 else self.shown
        write_whole(path, json.dumps([record], ensure_ascii=False, indent=1) + "\n")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def command(chat: Chat, line: str) -> None:
    name, _, path = line.strip().partition(" ")
    path = os.path.expanduser(path.strip().strip("'\""))
    if name in ("/image", "/save") and not path:
        raise ValueError(f"{name} needs a path")
    if name == "/image":
        chat.pictures.append((path, open_image(path)))
        note(f"{path} is added to your next message")
    elif name == "/save":
        chat.save(path)
        note(f"{path} has {len(chat.turns) // 2} questions and answers")
    elif name == "/clear":
        chat.clear()
        note("the conversation is forgotten")
    elif name == "/help":
        note(HELP)
    else:
        raise ValueError(f"{name} is not a command: /help lists them")


def respond(chat: Chat, line: str) -> None:
    """Execute a command, or print the answer to a question. After an error or Ctrl-C the conversation continues."""
    try:
        if line.startswith("/"):
            return command(chat, line)
        why = chat.say(line, lambda text: print(text, end="", flush=True))
        print(flush=True)
        if why == "context":
            note(f"The answer stops here: the context of {chat.context} tokens is full. /clear starts again.")
    except KeyboardInterrupt:
        print(flush=True)
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        note(sentence(error, "/clear starts a new conversation"))


def converse(chat: Chat) -> None:
    """Read lines and respond to them until an empty one, /quit or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lets `input` edit a line and recall old ones)
    prompt = "> " if sys.stdin.isatty() else ""
    note("Ask, or type /help. An empty line leaves.")
    while True:
        try:
            line = input(prompt)  # an OSError ends the command: it would occur again and again
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\nAn empty line or Ctrl-D leaves.")
            continue
        if line.strip() in ("", "/quit"):
            return
        respond(chat, line)
