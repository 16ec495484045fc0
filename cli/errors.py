"""How a command ends. User errors print one line to stderr and exit with code 2; Ctrl-C and a closed pipe exit with 130
and print nothing.
"""

import os
import signal
import socket
import sys
import threading
import time
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
        work() if "WORLD_SIZE" not in os.environ else work_with_others(work)
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


# --- Several processes, started by torchrun --------------------------------------------------------------------------


def work_with_others(work: Callable[[], None]) -> None:
    """Do the work of one process of several. Raises ConnectionError if another one ended, and KeyboardInterrupt."""
    end_when_interrupted()
    try:
        work()
    except RuntimeError as error:
        time.sleep(0.1)  # Ctrl-C ends the other processes too: in that case this raises KeyboardInterrupt
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise ConnectionError("another process ended or cannot be reached, so this one ends too") from error
        raise


def end_when_interrupted(grace: float = 2) -> None:
    """End this process `grace` seconds after Ctrl-C if it is still running.

    While it waits for another process, KeyboardInterrupt would wait too: Python raises it between two instructions.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno())  # receives the number of each signal

    def end(told=told) -> None:
        while heard.recv(1) != bytes([signal.SIGINT]):
            pass
        time.sleep(grace)
        os._exit(130)

    threading.Thread(target=end, daemon=True).start()
