"""Writing an answer: run the prompt once, then draw one token at a time and feed it back.

    prefill           what the cache lacks of the prompt through the model; its keys and values stay in the cache
    decode_one_token  one new token per row; everything before it is read from the cache
    sample            from scores over the vocabulary to the next token

`generate_tokens` is the loop around the three; `generate` knows when it ends, and returns prompt and answer together,
as the reference does. chat.py takes the tokens from the same loop, with a cache that lasts.

    B batch    T tokens of the prompt    V vocabulary

Left out: beam search, and every other search that keeps more than one answer per prompt.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from decode_graph import DecodeGraph
from llama import KVCache
from text_watcher import TextWatcher
from tokenizer import Tokenizer


@dataclass
class GenerationConfig:
    """How to choose tokens and when to stop: the fields of generation_config.json that are honoured, and defaults."""

    max_new_tokens: int | None = None  # 20 where neither this nor max_length is given
    max_length: int | None = None  # the same limit with the prompt counted in
    do_sample: bool = False  # False: always the likeliest token (greedy)
    temperature: float = 1.0  # below 1 sharpens the choice, above 1 flattens it
    top_k: int = 50  # sample among this many likeliest tokens; 0 for all
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability (Holtzman et al. 2019)
    repetition_penalty: float = 1.0  # above 1: tokens already there become less likely (Keskar et al. 2019)
    eos_token_id: int | list[int] = 2  # a row that draws one of these is finished; [] for none
    pad_token_id: int | None = None  # what a finished row is filled up with

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.do_sample and not self.temperature >= 1e-6:  # dividing by less can overflow float32
            raise ValueError(f"temperature must be at least 1e-06, not {self.temperature}, when sampling")
        if self.do_sample and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may follow a prompt of this length."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens or 20
        if self.max_length <= prompt_length:
            raise ValueError(f"max_length {self.max_length} leaves no room for an answer behind {prompt_length} tokens")
        return self.max_length - prompt_length

    @classmethod
    def merged(cls, defaults: dict, options: dict) -> "GenerationConfig":
        """A checkpoint's own settings, overridden by the caller's."""
        known = {f.name for f in fields(cls)}
        if unknown := set(options) - known:
            raise ValueError(f"generate knows {', '.join(sorted(known))}, but not {', '.join(sorted(unknown))}")
        settings = {name: value for name, value in defaults.items() if name in known and value is not None}
        return cls(**settings | {name: value for name, value in options.items() if value is not None})


def sample(logits: Tensor, seen: Tensor, config: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """Scores (B, V) for the next token to the next ids (B,). `seen` (B, V + 1) is True for tokens already there."""
    logits, penalty = logits.float(), config.repetition_penalty
    if logits.amax().isnan():  # a NaN wins; to look at all of them would take ten times as long
        raise ValueError("the scores of the next token are not numbers: try bfloat16, or a weight is broken")
    if penalty != 1:
        logits = torch.where(seen[:, :-1], torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if not config.do_sample:
        return logits.argmax(-1)
    logits = logits / config.temperature
    if config.top_k > 0:
        worst_kept = logits.topk(min(config.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    if config.top_p < 1:
        ascending, order = logits.sort()
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        drop[:, -1] = False  # the likeliest stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def tokens_seen(input_ids: Tensor, attention_mask: Tensor, V: int) -> Tensor:  # two (B, T) -> (B, V + 1)
    """Which tokens a prompt holds. Left padding and ids beyond the vocabulary go to a last column, ignored."""
    ids = input_ids.masked_fill(attention_mask.cumsum(-1) == 0, V).clamp(max=V)
    return torch.zeros(len(ids), V + 1, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def prefill(model, input_ids: Tensor, attention_mask: Tensor, cache: KVCache, pixel_values: Tensor | None) -> Tensor:
    """Run what the cache lacks of the prompt (B, T) through the model; scores (B, V) for the answer's first token."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # left padding does not count
    new, position_ids = input_ids[:, cache.length :], position_ids[:, cache.length :]
    return model(new, pixel_values, attention_mask, position_ids, cache, logits_to_keep=1).logits[:, -1]


def decode_one_token(model, ids: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
    """One token per row (B,) at position_ids (B, 1); scores (B, V) for the one after it."""
    return model(ids[:, None], position_ids=position_ids, past_key_values=cache).logits[:, -1]


@torch.inference_mode()  # decodes 1.03 times as fast as under no_grad
def generate_tokens(model, input_ids, attention_mask, cache, pixel_values, config, generator) -> Iterator[Tensor]:
    """An answer that never ends, a token per row (B,) at a time; it is in the cache once the next one is asked for."""
    logits = prefill(model, input_ids, attention_mask, cache, pixel_values)
    seen = tokens_seen(input_ids, attention_mask, logits.shape[1])
    position_ids = attention_mask.sum(-1, keepdim=True)
    decode = DecodeGraph(decode_one_token) if DecodeGraph.fits(cache) else decode_one_token
    while True:
        next_ids = sample(logits, seen, config, generator)
        yield next_ids
        seen.scatter_(1, next_ids[:, None], True)
        logits = decode(model, next_ids, position_ids, cache)
        position_ids = position_ids + 1


def generate(
    model,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    streamer: Callable[[str], None] | None = None,
    stop_strings: str | list[str] | None = None,
    seed: int | None = None,
    **options,
) -> Tensor:
    """Continue prompts (B, T), left-padded where they differ in length, to (B, T + new): prompt and answer.

    `options` are the fields of GenerationConfig; what they leave open, the checkpoint's generation_config.json says.
    `streamer` is called with each stretch of text as it is made. A row ends with an eos token or once its text holds a
    stop string. The same `seed` draws the same tokens. Raises ValueError for options out of range, and warns about
    those that change nothing because the answer is greedy.
    """
    config = GenerationConfig.merged(model.generation_config, options)
    given = {name for name, value in {"seed": seed, **options}.items() if value is not None}
    unused = sorted(given & {"seed", "temperature", "top_k", "top_p"})
    if unused and not config.do_sample:
        warnings.warn(f"without do_sample=True these have no effect: {', '.join(unused)}", stacklevel=3)
    batch, T = input_ids.shape
    n_new, device = config.new_tokens(T), input_ids.device
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if attention_mask.shape != input_ids.shape or not attention_mask[:, -1].all():
        raise ValueError("attention_mask must have the shape of input_ids and end in ones: pad prompts on the left")
    watcher = TextWatcher(tokenizer, batch, streamer, stop_strings) if streamer or stop_strings else None
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(config.eos_token_id, device=device).reshape(-1)
    pad = next((int(i) for i in (config.pad_token_id, *eos) if i is not None), 0)

    ids = torch.full((batch, T + n_new), pad, dtype=input_ids.dtype, device=device)
    ids[:, :T] = input_ids
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    cache = KVCache(model.config.text_config, batch, T + n_new, model.dtype, device)
    tokens = generate_tokens(model, input_ids, attention_mask, cache, pixel_values, config, generator)
    for end, next_ids in zip(range(T, T + n_new), tokens, strict=False):
        is_last = end == T + n_new - 1
        ids[:, end] = next_ids.where(~finished, pad)
        running, finished = ~finished, finished | torch.isin(next_ids, eos)
        if watcher:
            for row in running.nonzero().flatten().tolist():
                finished[row] |= watcher.put(row, int(next_ids[row]), last=is_last or bool(finished[row]))
        if finished.all():
            break
    return ids[:, : end + 1]
