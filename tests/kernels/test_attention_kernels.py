"""Attention, of many tokens and of one, against the formula in llama.py and clip.py, in Triton's interpreter.

The interpreter does not support bfloat16 and is slow: shapes are small, except for 577 tokens.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import clip
import llama
from kernel_helpers import FP32, both, close, random

pytest.importorskip("triton")
import kernels.decode_attention
from kernels.attention import attention
from kernels.decode_attention import decode_attention

SOME = settings(max_examples=12, deadline=None, derandomize=True)


# --- Attention -------------------------------------------------------------------------------------------------------


def check_attention(B, H, K, T, S, d, dtype, causal=True, first_key=None, window=None):
    """Compare with llama.eager_attention in float32, on tensors strided like those in the model."""
    q = random(B, T, H, d, dtype=dtype).transpose(1, 2)
    k, v = random(2, B, S, K, d, dtype=dtype).transpose(2, 3)
    mask, padding = torch.ones(1, 1, T, S, dtype=torch.bool), None
    if first_key is not None:
        first_key = torch.tensor(first_key, dtype=torch.int32)
        padding = torch.arange(S) >= first_key[:, None]
    if causal:
        mask = llama.visible_keys(padding, S - T, T, window, "cpu")
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None] if mask is None else mask
    wanted, _ = llama.eager_attention(q.float(), k.float(), v.float(), mask)
    wanted = wanted.masked_fill(~mask.any(-1, keepdim=True), 0)  # a query that is padding gets 0
    close(attention(q, k, v, causal, first_key, window), wanted)


@both
@pytest.mark.parametrize("d", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("K", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_attention_of_every_head_width_and_grouping(K, d, dtype):
    check_attention(1, 4, K, 37, 37, d, dtype)


@both
@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (1, 50), (2, 65), (32, 32), (128, 128), (128, 192), (129, 129), (5, 300), (70, 200)]
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_attention_of_every_length(T, S, causal, dtype):
    check_attention(1, 2, 1, T, S, 32, dtype, causal)


@both
@pytest.mark.parametrize("window", [1, 5, 16, 31, 64, 100, 1000])
@pytest.mark.parametrize(("T", "S"), [(70, 70), (9, 150), (140, 150)])
def test_attention_through_a_sliding_window(T, S, window, dtype):
    check_attention(1, 2, 2, T, S, 32, dtype, window=window)


@both
@pytest.mark.parametrize("T", [9, 3, 1])
def test_attention_after_every_padding(T, dtype):
    check_attention(9, 2, 1, T, 9, 32, dtype, first_key=range(9))
    check_attention(9, 2, 1, T, 9, 32, dtype, first_key=range(9), window=4)


@both
def test_attention_after_long_padding(dtype):
    check_attention(6, 1, 1, 150, 150, 32, dtype, first_key=[0, 1, 63, 64, 130, 149], window=40)


@both
def test_attention_of_a_picture(dtype):
    q, k, v = random(3, 1, 577, 1, 64, dtype=dtype).transpose(2, 3)
    close(attention(q, k, v, causal=False), clip.eager_attention(q.float(), k.float(), v.float()))


def test_large_scores_do_not_overflow():
    q, k, v = random(3, 1, 2, 40, 32) * 200
    assert_close(attention(q, k, v, True), llama.eager_attention(q, k, v)[0], atol=0.1, rtol=1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2), (1, 0, 3, 2)], ids=str)
def test_attention_of_tensors_laid_out_in_any_order(order):
    shape = torch.tensor((2, 4, 40, 32))[list(order)].tolist()
    back = torch.tensor(order).argsort().tolist()
    q, k, v = (x.permute(back) for x in random(3, *shape))
    close(attention(q, k[:, ::2], v[:, ::2], True), llama.eager_attention(q, k[:, ::2], v[:, ::2])[0])


@SOME
@given(st.data())
def test_attention_of_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    B, K, group, T, past = draw(1, 2), draw(1, 2), draw(1, 3), draw(1, 90), draw(0, 90)
    window = data.draw(st.none() | st.integers(1, 120))
    first_key = data.draw(st.none() | st.lists(st.integers(0, T + past - 1), min_size=B, max_size=B))
    check_attention(B, K * group, K, T, past + T, draw(1, 70), FP32, True, first_key, window)


# --- Attention of one token ------------------------------------------------------------------------------------------


def check_decode(B, H, K, past, capacity, d, dtype, first_key=None, window=None):
    q = random(B, 1, H, d, dtype=dtype).transpose(1, 2)
    cache = random(2, B, K, capacity, d, dtype=dtype)
    S = past + 1
    padding = None if first_key is None else torch.arange(S) >= torch.tensor(first_key)[:, None]
    mask = llama.visible_keys(padding, past, 1, window, "cpu")
    wanted, _ = llama.eager_attention(q.float(), *cache[:, :, :, :S].float(), mask)
    cache[:, :, :, S:] = torch.nan  # nothing there may be read
    first_key = None if first_key is None else torch.tensor(first_key, dtype=torch.int32)
    number = torch.tensor([past], dtype=torch.int32)
    close(decode_attention(q, *cache, number, first_key, window), wanted)


@both
@pytest.mark.parametrize("d", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (3, 1), (32, 1)], ids=str)
def test_one_token_with_every_head_width_and_grouping(H, K, d, dtype):
    check_decode(1, H, K, 70, 130, d, dtype)


@both
@pytest.mark.parametrize("past", [0, 1, 62, 63, 64, 65, 127, 128, 299])
def test_one_token_after_every_length(past, dtype):
    check_decode(1, 2, 1, past, 300, 32, dtype)
    check_decode(1, 2, 1, past, 300, 32, dtype, window=50)


@both
def test_one_token_after_every_padding(dtype):
    check_decode(9, 2, 2, 8, 20, 32, dtype, first_key=list(range(9)))
    check_decode(3, 2, 2, 199, 256, 32, dtype, first_key=[0, 130, 199], window=90)


@pytest.mark.parametrize("past", [0, 40, 3000])
def test_one_token_with_as_many_ranges_as_on_a_gpu(past, monkeypatch):
    """Most of them empty in a short cache; several steps in each of a long one."""
    monkeypatch.setattr(kernels.decode_attention, "MOST_SPLITS", 64)
    check_decode(2, 4, 2, past, 3100, 32, FP32, first_key=[0, min(past, 9)])


@SOME
@given(st.data())
def test_one_token_with_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    B, K, group, past = draw(1, 3), draw(1, 2), draw(1, 5), draw(0, 200)
    first_key = data.draw(st.none() | st.lists(st.integers(0, past), min_size=B, max_size=B))
    window = data.draw(st.none() | st.integers(1, 250))
    check_decode(B, K * group, K, past, past + draw(1, 90), draw(1, 70), FP32, first_key, window)
