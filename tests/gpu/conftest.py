import os

import pytest
import torch

if os.environ.get("TEST_DEVICE", "cuda") == "cuda" and not torch.cuda.is_available():
    pytest.exit("tests/gpu needs an NVIDIA GPU that PyTorch can use", returncode=5)


@pytest.fixture(autouse=True)
def without_gradients():
    """Kernels have none, and refuse parameters that would record them."""
    with torch.no_grad():
        yield
