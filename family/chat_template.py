"""A checkpoint's own chat template: a program in the language of Jinja2, which writes a conversation as a prompt.

As in transformers, jinja2 renders it in a sandbox. The sandbox denies attributes such as `__class__`, but it bounds
neither time nor memory: 'a' * 10**9 is one call into C, which no thread or Python signal handler can interrupt, and
after `{% set n.x = [n.x, n.x] %}` 40 times the text of n.x has 2**40 characters, so limits on operators are not enough.
Therefore a child process renders it, which the system ends when its CPU time is used up. CPU time is limited, because
on a busy machine a harmless template may take long. The child is a new interpreter, which any thread can start, on
macOS too; a fork may hang once PyTorch has threads. It takes 0.2 s, so the latest prompts are cached.

This file is also the child's program, and therefore imports hub/, and with it PyTorch, only inside functions. Not
implemented: tools, documents, and named templates other than "default".
"""

import json
import re
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

PROBE = "Which parts does it write?"  # the text of a trial message
MAX_PROMPT = 1_000_000  # characters
MAX_WAIT = 20  # seconds by the clock
MAX_SECONDS, MAX_BYTES = 2, 2**30  # of CPU time; of memory, which macOS does not enforce


class JinjaTemplate:
    """Renders like a tokenizer.Template. `file` is named in errors; `special_tokens` are bos_token="<s>" and so on."""

    image_token = "<image>"  # what the template writes for a picture; prompts always have <image>

    def __init__(self, source: str, file: str | Path = "chat_template", **special_tokens: str):
        self.source, self.file, self.special_tokens = source, file, special_tokens
        self.parts: bool | None = None  # the result of takes_parts

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Convert messages, in the form of tokenizer.Template, to one prompt. Raises ValueError with one sentence.

        A template that cannot write a list of parts gets texts, with "<image>\\n" for each picture.
        """
        from hub.interface import parse_messages

        parse_messages(messages)  # raises ValueError for malformed ones
        if not self.takes_parts():
            messages = [message | {"content": as_text(message["content"], self.image_token)} for message in messages]
        return self.run(messages, add_generation_prompt)

    def takes_parts(self) -> bool:
        """Whether the template can write a message that is a list of parts: some are for plain texts only."""
        if self.parts is None:
            content = [{"type": "image"}, {"type": "text", "text": PROBE}]
            try:
                written = self.run([{"role": "user", "content": content}], True)
            except ValueError as error:
                if "it takes more than" in str(error):  # seconds, and would again
                    raise
                written = ""
            self.parts = written.count(PROBE) == written.count("<image>") == 1 and "{'type'" not in written
        return self.parts

    def run(self, messages: list[dict], add_generation_prompt: bool) -> str:
        messages = [{name: x for name, x in message.items() if x is not None} for message in messages]
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        variables = self.special_tokens | {"tools": None, "documents": None} | variables
        now = datetime.now().isoformat() if "strftime_now" in self.source else "2000-01-01"  # constant for the cache
        job = {"source": self.source, "variables": variables, "now": now}
        try:
            text = render_in_child(json.dumps(job, default=lambda x: f"<{type(x).__name__}>"))  # for pictures
            return text.replace(self.image_token, "<image>")
        except (ValueError, subprocess.TimeoutExpired) as error:
            why = error if isinstance(error, ValueError) else f"it takes more than {MAX_WAIT} seconds"
            raise ValueError(f"{self.file}: the chat template cannot be rendered: {why}") from error


def as_text(content: str | list[dict], image_token: str) -> str:
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content if part["type"] == "text"]
    return f"{image_token}\n" * sum(part["type"] == "image" for part in content) + " ".join(texts)


@lru_cache(maxsize=16)
def render_in_child(job: str) -> str:
    """The prompt. `job` holds the arguments of render_in_sandbox as JSON."""
    command = [sys.executable, "-P", __file__]  # -P: nothing in this folder takes the place of a library
    child = subprocess.run(command, input=job, capture_output=True, encoding="ascii", timeout=MAX_WAIT)
    late = f"it takes more than {MAX_SECONDS} seconds" if child.returncode == -signal.SIGPROF else "its process failed"
    text, why = (None, late) if child.returncode else json.loads(child.stdout)
    if text is None:
        raise ValueError(why)
    return text


# --- In the child process --------------------------------------------------------------------------------------------


def sandbox(now: str):
    """A jinja2 environment with the names that transformers defines."""
    from jinja2 import exceptions, ext, nodes, sandbox, utils

    class Generation(ext.Extension):  # {% generation %} and {% endgeneration %} mark the answers, for training
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Namespace(utils.Namespace):  # its names must not include __html__ and others that jinja2 calls
        def __getattribute__(self, name):
            return object.__getattribute__(self, name) if name.startswith("_") else super().__getattribute__(name)

    def raise_exception(message):
        raise exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, ext.loopcontrols]
    made = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "namespace": Namespace}
    made.globals["strftime_now"] = lambda form: datetime.fromisoformat(now).strftime(form)
    return made


def render_in_sandbox(source: str, variables: dict, now: str) -> str:
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        raise ImportError("the sandboxes of older versions are not safe")
    text = ""
    for piece in sandbox(now).from_string(source).generate(variables):
        text += piece
        if len(text) > MAX_PROMPT:
            raise ValueError(f"it writes more than {MAX_PROMPT} characters")
    return text


def text_or_reason(source: str, variables: dict, now: str) -> tuple[str | None, str]:
    """The prompt or None, and why there is none."""
    try:
        return render_in_sandbox(source, variables, now), ""
    except ImportError as error:
        return None, f"it needs jinja2 3.1.6 or newer, pip install -r requirements-family.txt ({error})"
    except MemoryError:
        return None, "it needs too much memory"
    except Exception as error:
        line = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
        return None, " ".join((getattr(error, "message", None) or str(error)).split())[:300] + line


def main() -> None:
    """Read a job from stdin and print the result of text_or_reason."""
    import resource

    job = json.load(sys.stdin)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # then SIGPROF ends the process, during a call into C as well
    with suppress(ValueError, OSError):  # macOS may refuse it
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(json.dumps(text_or_reason(**job)))


if __name__ == "__main__":
    main()
