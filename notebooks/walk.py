"""What all notebooks need. `import walk` puts the root of the repository on sys.path and sets the look of the figures.

`ROOT` is that root, `tiny_llava()` loads the bundled model, `chat_prompt` writes a question as the model expects it,
and `check` compares the solution of a puzzle with the repository's function for the same task.
"""

import copy
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
    "font.size": 11,
    "image.cmap": "viridis",
}


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


def check(yours: Callable, theirs: Callable, *inputs: tuple) -> None:
    """Calls both functions with each tuple of arguments in `inputs` and prints whether their results agree."""
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
        try:
            torch.testing.assert_close(answer, theirs(*arguments), rtol=1e-4, atol=1e-5)
        except (AssertionError, TypeError) as error:  # TypeError where one result is a tensor and the other is not
            print("not solved yet:", str(error).split("\n")[0])
            return
    print("solved")
