"""Solutions of the puzzles in notebook 17."""

import torch


def my_usable(records):
    usable = []
    for i, record in enumerate(records):
        turns = record["conversations"]
        alternate = [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        pictures = sum(turn["value"].count("<image>") for turn in turns)
        control = any(name in turn["value"] for turn in turns for name in ("<s>", "</s>", "<unk>", "<pad>"))
        in_answer = any("<image>" in turn["value"] for turn in turns[1::2])
        if turns and alternate and pictures == ("image" in record) and not control and not in_answer:
            usable.append(i)
    return usable


def my_average(before, after, share):
    return [(1 - share) * old + share * new for old, new in zip(before, after, strict=True)]


def my_explained(states, layers, targets):
    x = torch.cat([states[layer] for layer in layers], dim=1)
    return fit(x, targets)[1]
