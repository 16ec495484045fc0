"""Generation: run the prompt once, then choose one token at a time and feed it back.

    prefill          the tokens of the prompt that are not in the cache yet go through the model together
    model.step       one new token per row goes through the model; the cache has the keys and values of all others
    sample           choose the next token from the scores over the vocabulary

`generate_tokens` is the loop around the three; `generate` decides when the loop ends, and returns prompt and answer, as
the reference does. Chat, which keeps a cache from one answer to the next, uses `generate_tokens` directly.

    B batch    T tokens of the prompt    V vocabulary

Not implemented: beam search and other searches that keep several candidates per prompt.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from hub.generation import GenerationConfig
from hub.interface import check_left_padding
from llama import KVCache
from tokenizer import Tokenizer


def sample(logits: Tensor, seen: Tensor, config: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """Choose the next ids (B,) from their scores (B, V). `seen` (B, V + 1) is the result of tokens_seen.

    The order is the reference's: repetition penalty (Keskar et al. 2019, section 4.1), then, unless the choice is
    greedy, temperature, top-k and top-p (Holtzman et al. 2019, section 3.1). hub/generation.py explains each option.
    """
    logits, penalty = logits.float(), config.repetition_penalty
    if logits.amax().isnan():  # NaN if any score is
        raise ValueError("the next token's scores are NaN: float16 overflowed (try bfloat16), or a weight is NaN")
    if penalty != 1:  # negative scores are multiplied: dividing would raise them
        logits = torch.where(seen[:, :-1], torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if not config.do_sample:
        return logits.argmax(-1)
    logits = logits / config.temperature
    if config.top_k > 0:
        threshold = logits.topk(min(config.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if config.top_p < 1:
        ascending, order = logits.sort()
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p  # the least likely, together at most 1 - top_p
        drop[:, -1] = False  # always keep the most likely token
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)  # scatter undoes the sort
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def tokens_seen(input_ids: Tensor, attention_mask: Tensor, V: int) -> Tensor:  # two (B, T) -> (B, V + 1)
    """Which of the V tokens each row contains. Column V, which `sample` ignores, is for left padding and ids >= V."""
    ids = input_ids.masked_fill(attention_mask.cumsum(-1) == 0, V).clamp(max=V)
    return torch.zeros(len(ids), V + 1, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def prefill(model, input_ids, attention_mask, cache: KVCache, pixel_values=None, image_sizes=None) -> Tensor:
    """Run the part of a prompt (B, T) that the cache lacks, with that part's pictures; returns scores (B, V)."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # 0 is the first token after the padding
    new, position_ids = input_ids[:, cache.length :], position_ids[:, cache.length :]
    out = model(new, pixel_values, attention_mask, position_ids, cache, image_sizes=image_sizes, logits_to_keep=1)
    return out.logits[:, -1]


@torch.inference_mode()
def generate_tokens(model, input_ids, attention_mask, cache, pictures, config, generator) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,), indefinitely. `pictures`: a dict of prefill's last two arguments.

    The cache keeps the prompt's mask. A token's keys and values enter it when the next token is requested.
    """
    logits = prefill(model, input_ids, attention_mask, cache, **pictures)
    seen = tokens_seen(input_ids, attention_mask, logits.shape[1])
    position_ids = attention_mask.sum(-1, keepdim=True)  # (B, 1): padding is not counted
    while True:
        next_ids = sample(logits, seen, config, generator)
        yield next_ids
        seen.scatter_(1, next_ids[:, None], True)
        logits = model.step(next_ids, position_ids, cache)
        position_ids = position_ids + 1


def generate(
    model,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    image_sizes: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    streamer: Callable[[str], None] | None = None,
    stop_strings: str | list[str] | None = None,
    seed: int | None = None,
    **options,
) -> Tensor:
    """Continue prompts (B, T), padded on the left if their lengths differ, to (B, T + new): prompt and answer.

    `options` are the fields of GenerationConfig (hub/generation.py; by default greedy, 20 new tokens); the checkpoint's
    generation_config.json supplies the others. `streamer` (one row only) gets each new piece of text; it and
    `stop_strings` need `tokenizer`. A row ends with an eos token or a stop string, which stay in the result; padding
    follows. The same `seed` gives the same samples. ValueError for unknown or bad options; a warning for useless ones.
    """
    config = GenerationConfig.merged(model.generation_config, options | {"seed": seed})  # warns if seed has no effect
    attention_mask = check_left_padding(input_ids, attention_mask)
    (batch, T), device = input_ids.shape, input_ids.device
    n_new = config.new_tokens(T)
    watchers = []  # one per row: passes text on to `streamer`, and reports when a stop string has appeared
    if streamer or stop_strings:
        from hub.text_watcher import text_watchers
        watchers = text_watchers(batch, tokenizer, streamer, stop_strings)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = model.language_model.new_cache(batch, T + n_new)
    pictures = {"pixel_values": pixel_values, "image_sizes": image_sizes}
    tokens = generate_tokens(model, input_ids, attention_mask, cache, pictures, config, generator)

    eos = torch.tensor(config.eos_ids, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    for next_ids in islice(tokens, n_new):
        next_ids = next_ids.masked_fill(finished, config.pad_id)  # in the result only: the model continues unmasked
        input_ids = torch.cat([input_ids, next_ids[:, None]], dim=1)
        finished = finished | torch.isin(next_ids, eos)
        if watchers:
            stopped = [watcher.put(token_id) for watcher, token_id in zip(watchers, next_ids.tolist(), strict=True)]
            finished = finished | torch.tensor(stopped, device=device)
        if finished.all():
            break
    for watcher in watchers:
        watcher.flush()
    return input_ids
