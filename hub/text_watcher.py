"""The text of an answer while it is generated: for a streamer, and for stop strings."""

from collections.abc import Callable


class TextWatcher:
    """Decodes an answer as it is generated: passes new text to a streamer and looks for stop strings.

    A character that takes several tokens is held back until it is complete. At the end, flush passes on what is left.
    """

    def __init__(self, tokenizer, streamer: Callable | None, stop_strings: str | list[str] | None = None):
        if tokenizer is None:
            raise ValueError("streamer and stop_strings need the text: pass tokenizer=processor.tokenizer too")
        self.tokenizer, self.streamer = tokenizer, streamer
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        self.pending: list[int] = []  # tokens that are not in the text yet
        self.text: str | None = None  # None until a token has text

    def put(self, token_id: int) -> bool:
        """Add the next token; True if the text now contains a stop string."""
        self.pending.append(token_id)
        if not self.tokenizer.join(self.pending, skip_special_tokens=True).endswith("\ufffd"):
            self.flush()
        return any(stop in (self.text or "") for stop in self.stop_strings)

    def flush(self) -> None:
        new = self.tokenizer.join(self.pending, skip_special_tokens=True)
        self.pending.clear()
        if new and self.text is None:  # encoding put a space in front of the text
            self.text, new = "", new.removeprefix(self.tokenizer.first_space)
        if new:
            self.text += new
            if self.streamer:
                self.streamer(new)


def text_watchers(
    batch: int, tokenizer, streamer: Callable | None, stop_strings: str | list[str] | None
) -> list[TextWatcher]:
    """One for each row. Raises ValueError for a streamer with several rows."""
    watchers = [TextWatcher(tokenizer, streamer, stop_strings) for _ in range(batch)]
    if streamer and batch > 1:
        raise ValueError("a streamer follows one answer: generate a batch of prompts without it")
    return watchers
