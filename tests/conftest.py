"""Fixtures for several folders; the switch of Triton's interpreter; the threads of tests that run side by side.

In these tests kernels are interpreted, on the CPU. TRITON_INTERPRET must be set before triton is imported, because
Triton makes its own functions then for the interpreter or for a GPU, and each kernel when it is defined. Nothing else
changes: only models accelerated with "triton" run kernels on a CPU, and subprocesses do not inherit the variable.

`python -m pytest tests/gpu` is the exception: it needs a GPU and compiles the kernels. With TEST_DEVICE=cpu it tries
those tests themselves, in the interpreter. Other runs leave tests/gpu out, and see no GPU.
"""

import importlib.util
import os
import sys

import pytest

ON_GPU = any("tests/gpu" in argument for argument in sys.argv)
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    collect_ignore = ["gpu"]

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: PyTorch's threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ON_CPU = not ON_GPU or os.environ.get("TEST_DEVICE") == "cpu"

if importlib.util.find_spec("triton") and ON_CPU:
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels.decode_attention
    import kernels.graph  # imports every kernel

    kernels.decode_attention.MOST_SPLITS = 4  # the interpreter runs one program after the other, empty ones too
    if not ON_GPU:  # the interpreter reads the variable while a kernel runs, too: kernels/conftest.py sets it
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="module")
def reference():
    """A random LLaVA of transformers."""
    from reference import reference_model  # here, because it imports transformers, which quick tests do without

    return reference_model()


@pytest.fixture
def folder(reference, tmp_path):
    """A checkpoint written by transformers, to change or to break."""
    reference.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    """A small sentencepiece model."""
    from folders import train_tokenizer

    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))
