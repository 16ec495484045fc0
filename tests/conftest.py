"""Triton decides when a kernel is defined whether it will be interpreted. In these tests all are, on the CPU.

Nothing else changes: only models accelerated with "triton" run kernels on a CPU, and subprocesses do not inherit the
variable.
"""

import importlib.util
import os

if importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels.graph  # noqa: F401  (it imports every kernel)

    del os.environ["TRITON_INTERPRET"]
