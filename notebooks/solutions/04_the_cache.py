"""Solutions of the puzzles in notebook 4."""

import torch

from generate import prefill
from llama import eager_attention


def my_update(cache, layer, k, v):
    end = cache.length + k.shape[2]
    cache.k[layer][:, :, cache.length : end] = k
    cache.v[layer][:, :, cache.length : end] = v
    return cache.k[layer][:, :, :end], cache.v[layer][:, :, :end]


def my_windowed(q, k, v, window):
    kept_k, kept_v, outputs = k[:, :, :window].clone(), v[:, :, :window].clone(), []
    for t in range(q.shape[2]):
        place, filled = t % window, min(t + 1, window)
        kept_k[:, :, place], kept_v[:, :, place] = k[:, :, t], v[:, :, t]
        out, _ = eager_attention(q[:, :, t : t + 1], kept_k[:, :, :filled], kept_v[:, :, :filled])
        outputs.append(out)
    return torch.cat(outputs, dim=2)  # the order of the keys does not matter: attention is a sum over them


def my_answers(prompts, pixel_values):
    shortest, longest = (choose(ids.shape[1] for ids in prompts) for choose in (min, max))
    same = [len({int(ids[0, i]) for ids in prompts}) == 1 for i in range(shortest)]
    common = [*same[:-1], False].index(False)  # at least one token of each prompt remains to be run
    cache, answers = model.language_model.new_cache(1, longest + 20), []
    prefill(model, prompts[0][:, :common], torch.ones(1, common), cache, pixel_values)
    for ids in prompts:
        cache.length = common
        logits = prefill(model, ids, torch.ones_like(ids), cache, None)
        answers.append([])
        while len(answers[-1]) < 20:
            answers[-1].append(int(logits.argmax()))
            if answers[-1][-1] == processor.tokenizer.eos_token_id:
                break
            logits = model.step(logits.argmax(-1), torch.tensor([[cache.length]]), cache)
    return answers
