"""What all notebooks need. `import walk` puts the root of the repository on sys.path and sets the look of the figures.

`ROOT` is that root, `tiny_llava()` loads the bundled model, `chat_prompt` writes a question as the model expects it.
`predict` compares a guess with the answer, `check` compares the solution of a puzzle with the repository's function for
the same task, and `solution` prints one.
"""

import ast
import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # first, because installed packages may have the names `clip` and `llama` too
torch.manual_seed(0)

# Colours that colour-blind readers can tell apart too: Okabe & Ito 2008, https://jfly.uni-koeln.de/color
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
plt.rcParams |= {
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 80,
    "figure.facecolor": "white",  # also on a dark page: labels are black
    "font.size": 11,
    "image.cmap": "viridis",
}
SHORT = bool(os.environ.get("SHORT_NOTEBOOKS"))  # as in the tests: the same cells in less time
if SHORT:
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    plt.rcParams["figure.constrained_layout.use"] = False
    set_matplotlib_formats("png", bbox_inches=None)  # "tight" would draw each figure twice


def tiny_llava() -> tuple:
    """Returns the bundled model, the plain one in float32 on the CPU, and its processor."""
    from llava import LlavaForConditionalGeneration, LlavaProcessor

    folder = ROOT / "checkpoints/tiny-llava"
    model = LlavaForConditionalGeneration.from_pretrained(folder, torch.float32, kernels="torch")
    return model, LlavaProcessor.from_pretrained(folder)


def chat_prompt(processor, question: str) -> str:
    """Returns a prompt with one picture and a question about it, in the processor's template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def steps(number: int) -> int:
    """Steps of a training that takes minutes: `number`, or three where SHORT_NOTEBOOKS is set, as in the tests."""
    return min(number, 3) if SHORT else number


# --- Predictions and puzzles -----------------------------------------------------------------------------------------


def predict(guess, answer, tolerance: float = 0.1) -> None:
    """Compares a guess with the answer; with None, only asks for one.

    A number is right if it is within `tolerance` of the answer, relative to it; anything else if it is equal. Texts are
    compared without regard to upper and lower case.
    """
    if guess is None:
        print("Write your guess in place of None, and run this cell again.")
        return
    if isinstance(answer, str):
        right = str(guess).strip().lower() == answer.lower()
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        right = math.isclose(guess, answer, rel_tol=tolerance)
        answer = f"{answer:.4g}" if isinstance(answer, float) else answer
    else:
        right = guess == answer
    print(f"Right: {answer}" if right else f"You guessed {guess}. The answer is {answer}.")


def check(yours: Callable, theirs: Callable, *inputs: tuple) -> None:
    """Calls both functions with each tuple of arguments in `inputs`; prints "solved", or the first difference."""
    for arguments in inputs:
        try:
            answer = yours(*copy.deepcopy(arguments))  # a copy, because `yours` may modify its arguments
        except NotImplementedError:
            answer = None
        except Exception as error:  # any error of an unfinished solution is shown to its author
            print(f"not solved yet: {type(error).__name__}: {error}")
            return
        if answer is None:
            print("not solved yet")
            return
        if wrong := difference(answer, theirs(*arguments)):
            print(f"not solved yet: with {', '.join(map(brief, arguments))} {wrong}")
            return
    print("solved")


def difference(answer, expected) -> str | None:
    """The first place where an answer differs from what was expected, as a sentence. None if it does not."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(answer, torch.Tensor):
            return f"it returns {brief(answer)}, expected {brief(expected)}"
        if answer.shape != expected.shape:
            return f"the shape is {tuple(answer.shape)}, expected {tuple(expected.shape)}"
        apart = ~torch.isclose(answer.double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        if apart.any():
            first = tuple(apart.nonzero()[0].tolist())
            return (f"{int(apart.sum())} of {apart.numel()} elements are wrong, first the one at {list(first)}: it is "
                    f"{answer[first].item():.6g}, expected {expected[first].item():.6g}")  # fmt: skip
        return None
    if isinstance(expected, list | tuple) and isinstance(answer, list | tuple):
        if len(answer) != len(expected):
            return f"the length is {len(answer)}, expected {len(expected)}"
        found = (f"at [{i}] {wrong}" for i, pair in enumerate(zip(answer, expected, strict=True))
                 if (wrong := difference(*pair)))  # fmt: skip
        return next(found, None)
    if isinstance(expected, float) and isinstance(answer, int | float):
        close = math.isclose(answer, expected, rel_tol=1e-4, abs_tol=1e-5)
        return None if close else f"it is {answer:.6g}, expected {expected:.6g}"
    return None if answer == expected else f"it is {brief(answer)}, expected {brief(expected)}"


def brief(value) -> str:
    """A value in a few words: tensors by their shape, long texts cut."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}" if value.numel() > 6 else str(value.tolist())
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def solution(name: str) -> None:
    """Prints a solution of the puzzle whose function has this name."""
    for file in sorted((ROOT / "notebooks" / "solutions").glob("*.py")):
        source = file.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                print(ast.get_source_segment(source, node))
                return
    raise ValueError(f"no puzzle is called {name}")
