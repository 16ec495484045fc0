"""Solutions of the puzzles of notebook 6."""

import torch


def my_top_p(logits, top_p):
    p, order = logits.softmax(-1).sort(descending=True)
    kept = p.cumsum(-1) - p < top_p  # what the more likely tokens have together is not enough
    return torch.zeros_like(kept).scatter(1, order, kept)


def my_temperature(logits, largest):
    low, high = 1e-3, 1e3
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        if (logits / middle).softmax(-1).max() > largest:
            low = middle
        else:
            high = middle
    return low


def my_log_probability(input_ids, pixel_values, answer):
    both = torch.cat([input_ids, answer], dim=1)
    log_p = model(both, pixel_values, use_cache=False).logits.log_softmax(-1)
    first = input_ids.shape[1] - 1  # the last token of the prompt predicts the first of the answer
    return log_p[0, first:-1].gather(1, answer.T).sum().item()


def my_length(ids, stop_strings):
    for n in range(1, len(ids) + 1):
        if any(stop in tokenizer.decode(ids[:n]) for stop in stop_strings):
            return n
    return len(ids)
