"""An order of the samples in which a step has only pictures or only texts, as in LLaVA's finetune scripts.

A process that has only texts in its share would wait for the others, which run the tower. The samples of a step are
sorted by length: with --accumulate each piece holds texts of about the same length, and so little padding.
"""

import random
from itertools import cycle, islice


def words(record: dict) -> int:
    """The number of words of a record's turns, negative if it has no picture: LLaVA's measure of its length."""
    count = sum(len(turn["value"].split()) for turn in record["conversations"])
    return count if record.get("image") else -count


def grouped_order(lengths: list[int], batch: int, epoch: int) -> list[int]:
    """The numbers of the samples in an epoch's order, whole steps of `batch`. `lengths`: see `words`.

    What is left over of pictures and of texts forms the last steps, which are mixed. The last one is filled up.
    """
    rng = random.Random(epoch)
    shuffled = rng.sample(range(len(lengths)), len(lengths))
    kinds = [i for i in shuffled if lengths[i] > 0], [i for i in shuffled if lengths[i] <= 0]
    steps, rest = [], []
    for kind in kinds:
        whole = len(kind) - len(kind) % batch
        steps += [kind[start : start + batch] for start in range(0, whole, batch)]
        rest += kind[whole:]
    rng.shuffle(steps)
    rest += islice(cycle(shuffled), -len(rest) % batch)
    steps += [rest[start : start + batch] for start in range(0, len(rest), batch)]
    return [i for step in steps for i in sorted(step, key=lambda i: abs(lengths[i]), reverse=True)]
