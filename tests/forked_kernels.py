"""Kernels of notebooks that do not import PyTorch and matplotlib: each is forked from a process that has imported them.

    with forked_kernels() as fork, fork:
        execute(notebook)

This file is also that process: it forks a kernel for each line of its standard input, which prints its number.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock


class Kernel:
    """What jupyter_client uses of a subprocess.Popen, for a process that is not a child of this one."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    wait = poll  # jupyter_client waits for what has ended

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@contextmanager
def forked_kernels():
    """Yields a context in which all kernels that are started are forked."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__], **pipes) as process:

        def launch(command: list[str], env: dict[str, str], cwd: os.PathLike, **_) -> Kernel:
            arguments = command[command.index("ipykernel_launcher") + 1 :]
            print(json.dumps([arguments, env, str(cwd)]), file=process.stdin, flush=True)
            return Kernel(int(process.stdout.readline()))

        yield mock.patch("jupyter_client.provisioning.local_provisioner.launch_kernel", launch)
        process.stdin.close()


def become_a_kernel(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    os.setsid()  # signals go to the kernel's group
    print(os.getpid(), flush=True)
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ |= env
    os.chdir(cwd)
    del sys.path[0]  # this folder
    IPKernelApp.launch_instance(arguments)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as in a kernel
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # a kernel ends when this process does
    import matplotlib.pyplot  # noqa: F401
    import torch  # noqa: F401
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))  # so that a kernel that ended is gone
    for line in sys.stdin:
        if not os.fork():
            become_a_kernel(*json.loads(line))
            os._exit(0)
