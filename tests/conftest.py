"""The kernels are interpreted in these tests. Triton settles that at its import, so this comes before all imports.

Nothing else changes: outside test_kernels.py no model on a CPU takes a kernel, and no subprocess inherits the variable.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
import kernels  # noqa: F401

del os.environ["TRITON_INTERPRET"]
