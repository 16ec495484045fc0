"""The text of answers while they are generated: for a streamer to show, and for stop strings to be found in."""

from collections.abc import Callable

from tokenizer import TextStream, Tokenizer


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
