"""How a command ends. User errors print one line to stderr and exit with code 2; Ctrl-C and a closed pipe exit with 130
and print nothing.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

USER_ERRORS = (OSError, ValueError, MemoryError, torch.OutOfMemoryError)
REMEDY = "try --dtype bfloat16, a smaller model or another device"


def sentence(error: Exception, remedy: str = REMEDY) -> str:
    """One line about one of USER_ERRORS."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"error: not enough memory: {remedy}"
    return f"error: {' '.join(str(error).split())}"


def run(work: Callable[[], None], remedy: str = REMEDY) -> int:
    """Do the work of a command and return its exit code. `remedy`: what to try if memory is not enough."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: treated as empty
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (it stays open)
    try:
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # discards what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except USER_ERRORS as error:
        print(sentence(error, remedy), file=sys.stderr)
        return 2
    return 0
