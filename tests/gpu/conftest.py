import os

import pytest
import torch

if os.environ.get("TEST_DEVICE", "cuda") == "cuda" and not torch.cuda.is_available():
    pytest.exit("tests/gpu needs an NVIDIA GPU that PyTorch can use", returncode=5)
