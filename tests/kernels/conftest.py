import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Triton's interpreter reads this variable while a kernel runs, too. Kernels have no gradients."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("TRITON_INTERPRET", "1")
        yield
