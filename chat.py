"""A conversation about pictures, at the terminal: `python llava.py --chat`.

What the model remembers is its KV cache, and the ids in it are the conversation: `ids` has every token, and the first
`cache.length` of them are in the cache. A turn appends its own words and runs what the cache lacks. That begins with
the last token of an answer that was stopped: it was shown, but no token was asked for behind it, so it was never run.

    ids      <s> USER: <image> ... ASSISTANT: A cat  and  a  USER: Which colour? ASSISTANT:
    cached   ---------------------------------------
    run now                                          ---------------------------------------

Whoever talks here types text. A special token such as </s>, typed, is text too: control tokens are the template's.

Left out: forgetting the oldest turns when the context is full. `/clear` begins anew.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from clip import open_image
from generate import GenerationConfig, generate_tokens
from llama import KVCache
from text_watcher import TextWatcher

HELP = """\
/image PATH   show a picture with your next words; once more for another one
/clear        forget the pictures and all that was said
/save FILE    write the conversation as JSON, in the form of LLaVA's training files
/help         these lines
/quit         leave; so does an empty line or Ctrl-D
Ctrl-C        stop the answer"""


class Chat:
    """A model, a processor, and what was said so far. `options` are the fields of generate.GenerationConfig."""

    def __init__(self, model, processor, system: str | None = None, stop_strings=None, seed=None, **options):
        self.model, self.processor, self.system, self.stop_strings = model, processor, system, stop_strings
        self.config = GenerationConfig.merged(model.generation_config, options)
        eos = self.config.eos_token_id
        # An <image> that the model said would have no picture: it ends an answer too.
        self.ends = {*([eos] if isinstance(eos, int) else eos), processor.tokenizer.image_token_id}
        self.generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        self.context = model.config.text_config.max_position_embeddings
        self.clear()

    def clear(self) -> None:
        self.ids: list[int] = []
        self.cache: KVCache | None = None
        self.pictures: list[tuple[str, object]] = []  # path and picture, shown with the next words
        self.shown: list[str] = []  # the paths of those shown before
        self.turns: list[dict] = []  # in the form of LLaVA's training files

    def show(self, path: str) -> None:
        self.pictures.append((path, open_image(path)))

    def turn_ids(self, text: str) -> list[int]:
        """What a turn appends: the end of the answer before it, the pictures, the words, and the call for an answer."""
        template, tokenizer = self.processor.template, self.processor.tokenizer
        messages = [{"role": "user", "content": [{"type": "image"}] * len(self.pictures)}]
        if self.ids:
            head = template.assistant_end + replace(template, system="").render(messages)
            head = head.lstrip(" ")  # the tokenizer opens each stretch with a space of its own
        else:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            head = template.render(system + messages)
        tail = template.user_end + template.assistant.rstrip()
        head = head.removesuffix(tail).replace("<image>", "<image>" * self.processor.image_seq_length)
        *controls, stretch = tokenizer.special_pattern.split(head)
        ids = tokenizer.sp.encode(stretch + text + tail)  # without a look for special tokens: here a user's are text
        if control := set(ids) & set(tokenizer.special_names) - {tokenizer.sp.unk_id()}:
            name = tokenizer.special_names[min(control)]
            raise ValueError(f"{name} is a control token of this model and cannot be said: write it in another way")
        return tokenizer.encode("".join(controls), add_special_tokens=not self.ids) + ids

    def make_room(self, length: int) -> None:
        """A cache for so many tokens, with all that the old one holds."""
        old = self.cache
        room = 0 if old is None else old.attention_mask.shape[1]
        if length > room:
            room = min(max(length, 2 * room), self.context)
            self.cache = KVCache(self.model.config.text_config, 1, room, self.model.dtype, self.model.device)
            if old is not None:
                self.cache.length = old.length
                self.cache.past.copy_(old.past)
                for new, kept in zip(self.cache.k + self.cache.v, old.k + old.v, strict=True):
                    new[:, :, : old.length] = kept[:, :, : old.length]

    def say(self, text: str, streamer: Callable[[str], None]) -> str:
        """Answer to `streamer`, piece by piece; why it ended: "stop", "length", or "context" where that is full.

        An interrupt leaves what was said so far as the answer, or, before the first token, takes the question back.
        Raises ValueError for a turn that the context has no room for.
        """
        before, prompt = len(self.ids), self.ids + self.turn_ids(text)
        T, room = len(prompt), self.context - len(prompt)
        if room < 1:
            raise ValueError(f"this would make {T} tokens, and the context ends at {self.context}: /clear begins anew")
        limit = min(self.config.new_tokens(T), room)
        self.make_room(T + limit)
        device, pixels = self.model.device, None
        if self.pictures:
            pixels = self.processor.image_processor([picture for _, picture in self.pictures]).to(device)
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        tokens = generate_tokens(self.model, ids, mask, self.cache, pixels, self.config, self.generator)
        watcher = TextWatcher(self.processor.tokenizer, 1, streamer, self.stop_strings)
        self.ids = prompt
        try:
            for left, token in zip(reversed(range(limit)), map(int, tokens), strict=False):
                ended = token in self.ends
                if not ended:  # the template writes the end of an answer, as it does behind a stopped one
                    self.ids.append(token)
                if watcher.put(0, token, last=ended or left == 0) or ended:
                    return "stop"
            return "context" if limit == room else "length"
        finally:
            if self.cache.length < T:  # the question was not read to its end
                del self.ids[before:]
            else:
                self.remember(text, self.ids[T:])

    def remember(self, text: str, answer: list[int]) -> None:
        said = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
        for name in self.processor.tokenizer.special_tokens:  # text here, but not to who reads the file: < image>
            text, said = (part.replace(name, f"{name[0]} {name[1:]}") for part in (text, said))
        self.turns.append({"from": "human", "value": "<image>\n" * len(self.pictures) + text})
        self.turns.append({"from": "gpt", "value": said})
        self.shown += [path for path, _ in self.pictures]
        self.pictures = []

    def save(self, path: str) -> None:
        """All or nothing: the file is written under another name first."""
        record = {"conversations": self.turns}
        if self.shown:
            record["image"] = self.shown[0] if len(self.shown) == 1 else self.shown
        unfinished = Path(path).with_name(f".chat-{os.getpid()}.json")
        try:
            unfinished.write_text(json.dumps([record], ensure_ascii=False, indent=1) + "\n", "utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def command(chat: Chat, line: str) -> bool:
    """Do a line that begins with a slash; False to leave."""
    name, _, rest = line.partition(" ")
    path = os.path.expanduser(rest.strip().strip("'\""))
    if name in ("/image", "/save") and not path:
        raise ValueError(f"{name} needs a path")
    if name == "/image":
        chat.show(path)
        note(f"{path} is shown with your next words")
    elif name == "/save":
        chat.save(path)
        note(f"{len(chat.turns) // 2} questions and answers are in {path}")
    elif name == "/clear":
        chat.clear()
        note("all is forgotten")
    elif name == "/help":
        note(HELP)
    elif name != "/quit":
        raise ValueError(f"{name} is not a command: /help lists them")
    return name != "/quit"


def answer(chat: Chat, line: str) -> None:
    try:
        why = chat.say(line, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        why = "interrupt"
    print(flush=True)
    if why == "context":
        note(f"The answer stops here: the context of {chat.context} tokens is full. /clear begins a new conversation.")


def respond(chat: Chat, line: str) -> bool:
    """Do a command or answer a question; False to leave. An error is a note, and the conversation continues."""
    try:
        if line.startswith("/"):
            return command(chat, line.strip())
        answer(chat, line)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        note(f"error: {error}")
    except (MemoryError, torch.OutOfMemoryError):
        note("error: the memory is not enough for this conversation: /clear begins a new one")
    return True


def converse(chat: Chat) -> None:
    """Read lines and answer them until an empty one, /quit or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lets `input` edit a line and find old ones)
    prompt = "> " if sys.stdin.isatty() else ""
    note("Ask, or /help. An empty line leaves.")
    while True:
        try:
            line = input(prompt)  # an error here is not caught: it would repeat without end
            if not line.strip() or not respond(chat, line):
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\nAn empty line or Ctrl-D leaves.")
