"""The text of answers while it grows: for a streamer to show, and for stop strings to be found in."""

from collections.abc import Callable

from tokenizer import Tokenizer


class TextStream:
    """Ids to text one at a time, to show an answer as it is made: half a character is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.held, self.started = tokenizer, [], False

    def put(self, token_id: int) -> str:
        self.held.append(token_id)
        text = self.tokenizer.join(self.held, skip_special_tokens=True)
        return "" if text.endswith("\ufffd") else self.release(text)

    def end(self) -> str:
        return self.release(self.tokenizer.join(self.held, skip_special_tokens=True))

    def release(self, text: str) -> str:
        self.held.clear()
        if text and not self.started:
            self.started, text = True, text.removeprefix(" ")
        return text


class TextWatcher:
    """Follows the text of every row as it grows: hands it to a streamer, and knows when a stop string has come."""

    def __init__(
        self, tokenizer: Tokenizer, batch: int, streamer: Callable | None, stop_strings: str | list[str] | None
    ):
        if tokenizer is None:
            raise ValueError("streamer and stop_strings need the text: pass tokenizer=processor.tokenizer too")
        if streamer is not None and batch > 1:
            raise ValueError("a streamer follows one answer: generate a batch of prompts without it")
        self.streams = [TextStream(tokenizer) for _ in range(batch)]
        self.texts = [""] * batch
        self.streamer = streamer
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])

    def put(self, row: int, token_id: int, last: bool) -> bool:
        """Take in a row's next token; True if its text now holds a stop string."""
        text = self.streams[row].put(token_id)
        if last:
            text += self.streams[row].end()
        if text and self.streamer:
            self.streamer(text)
        self.texts[row] += text
        return any(stop in self.texts[row] for stop in self.stop_strings)
