"""What notebooks 1 and 11 claim about the inside of the bundled model: `python notebooks/claims.py` writes claims.md.

A claim is a sentence about the rates of an experiment, and a function of them: "yes", "no" or a place in the model. A
rate counts as above another if their intervals do not overlap. A claim is confirmed if two ranges of scenes say the
same, and not "no".
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import experiments
import torch
import walk
from experiments import Rates, above, draw, wilson

SEEDS, SCENES = (3 * 10**9, 4 * 10**9), 60  # the first seed of each range; no training and no evaluation uses them
FILE = Path(__file__).with_suffix(".md")
EXPERIMENTS = {  # functions of experiments.py -> what they count
    "erased": "names lost, these patches erased",
    "swapped": "said of another scene, with its patches",
    "kept": "names right, 32 patches chosen by",
    "layers": "names right, the picture seen in",
    "heads": "right answers, one head muted",
    "lens": "names read at the middle of things",
    "blinded": "tokens right without the picture",
    "nearby": "pictures whose patches attend to near ones in",
}


class Claim(NamedTuple):
    experiment: str
    sentence: str
    says: Callable[[Rates], str]


def yes(condition: bool) -> str:
    return "yes" if condition else "no"


def having(rates: Rates, part: str) -> Rates:
    """The rates whose labels contain a text, labelled by the rest."""
    return {label.replace(part, ""): rate for label, rate in rates.items() if part in label}


def highest(rates: Rates) -> str:
    best, second = sorted(rates, key=lambda label: rates[label][0], reverse=True)[:2]
    return best if above(rates[best], rates[second]) else "no"


def lowest(rates: Rates) -> str:
    return highest({label: (n - successes, n) for label, (successes, n) in rates.items()})


def first_is_lowest(rates: Rates) -> str:
    first, *others = rates.values()
    return yes(all(above(other, first) for other in others))


CLAIMS = (
    Claim("erased", "A thing loses its name with its patches, and not with as many others.",
          lambda r: yes(above(r["its patches"], r["as many others"]))),
    Claim("swapped", "Names come with the patches of things.",
          lambda r: yes(above(r["where things are: names"], r["elsewhere: names"]))),
    Claim("swapped", "The colour of the background comes with the other patches.",
          lambda r: yes(above(r["elsewhere: colour"], r["where things are: colour"]))),
    Claim("kept", "Attention of the prompt's last token, in some layer, is worse than a random choice.",
          lambda r: yes(any(above(r["at random"], rate) for rate in having(r, "prompt's last token").values()))),
    Claim("kept", "Attention of the answer's tokens is better than a random choice.",
          lambda r: yes(above(r["answer's tokens, all layers"], r["at random"]))),
    Claim("kept", "The longest vectors are better than a random choice.",
          lambda r: yes(above(r["longest vectors"], r["at random"]))),
    Claim("layers", "More things are named with the view in one single layer than in any other:",
          lambda r: highest(having(r, "only "))),
    Claim("layers", "Fewer things are named without the view in one layer than without any other:",
          lambda r: lowest(having(r, "all but "))),
    Claim("layers", "The answer needs its own view of the picture more than the question's.",
          lambda r: yes(above(r["no layer, for the question"], r["no layer, for the answer"]))),
    Claim("heads", "Fewer colours are right without one head than without any other, where they are asked for:",
          lambda r: lowest(having(r, ": colour, asked"))),
    Claim("heads", "In descriptions, too, fewer are right without one head than without any other:",
          lambda r: lowest(having(r, ": colour, described"))),
    Claim("heads", "In its layer, the word before the colour needs one token, not the picture and not another token.",
          lambda r: first_is_lowest(having(r, "does not see"))),
    Claim("lens", "More than half of the names can be read, first:",
          lambda r: next((depth for depth, rate in r.items() if wilson(*rate)[0] > 0.5), "no")),
    Claim("blinded", "Without the picture, names and colours are right less often than places and other words.",
          lambda r: yes(all(above(r[more], r[less]) for more in ("places", "other tokens")
                            for less in ("names", "colours")))),
    Claim("nearby", "In more pictures the tower's last layer attends to near patches than the first.",
          lambda r: yes(above([*r.values()][-1], next(iter(r.values()))))),
)  # fmt: skip


def cell(successes: int, trials: int) -> str:
    low, high = wilson(successes, trials)
    return f"{successes} of {trials}: {successes / trials:.0%} ({low:.0%} to {high:.0%})"


def verdicts(experiment: str, both: tuple[Rates, Rates]) -> list[str]:
    """Each claim about an experiment, and what its rates on both ranges of scenes say."""
    lines = []
    for claim in (claim for claim in CLAIMS if claim.experiment == experiment):
        first, second = map(claim.says, both)
        confirmed = "" if first == second != "no" else " **Not confirmed.**"
        lines.append(f"- {claim.sentence} First scenes: {first}; second: {second}.{confirmed}")
    return lines


def table(results: dict[str, tuple[Rates, Rates]]) -> str:
    """The text of claims.md, from the rates of each experiment on both ranges of scenes."""
    text = f"""# Inside the bundled model

Written by [claims.py](claims.py). Notebooks [1](01_picture_to_tokens.ipynb) and [11](11_taking_it_apart.ipynb) explain
the experiments. Each is made on {SCENES} scenes with seeds from {SEEDS[0]:,} on, and again on {SCENES} others with
seeds from {SEEDS[1]:,} on.
In brackets: Wilson's interval for 95 %, which takes trials as independent. The things of one scene are not quite.
"""
    for experiment, both in results.items():
        first, second = both
        text += "\n".join(["", f"## {experiment}", "", *verdicts(experiment, both), ""])
        text += f"\n| {EXPERIMENTS[experiment]} | first scenes | second scenes |\n|---|---|---|\n"
        text += "".join(f"| {label} | {cell(*rate)} | {cell(*second[label])} |\n" for label, rate in first.items())
    return text


def committed() -> dict[str, tuple[Rates, Rates]]:
    """The rates in claims.md: experiment -> those of the first and of the second scenes, by label."""
    results = {}
    for part in FILE.read_text("utf-8").split("## ")[1:]:
        rows = re.findall(r"^\| (.+) \| (\d+) of (\d+): .* \| (\d+) of (\d+): .* \|$", part, re.M)
        first = {label: (int(k), int(n)) for label, k, n, _, _ in rows}
        results[part.split()[0]] = first, {label: (int(k), int(n)) for label, _, _, k, n in rows}
    return results


def main() -> None:
    torch.set_num_threads(1)
    model, processor = walk.tiny_llava()
    both = [draw(model, processor, first, SCENES) for first in SEEDS]
    results = {}
    for name in EXPERIMENTS:
        results[name] = tuple(getattr(experiments, name)(model, processor, scenes) for scenes in both)
        print(f"{name}: {time.process_time():.0f} s", flush=True)
    FILE.write_text(table(results), "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
