"""The kernels against the model's own plain functions, in Triton's interpreter; and compiled for GPUs not at hand.

The interpreter cannot do bfloat16, and is slow: shapes are small, 577 tokens apart. Speed, bfloat16 and the CUDA graph
are for benchmarks/gpu.py, on a GPU.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import prompts, reference_and_ours
from torch.testing import assert_close

pytest.importorskip("triton")
import clip
import generate
import kernels
import llama
from decode_graph import DecodeGraph
from kernels.attention import attention
from llava import LlavaForConditionalGeneration
from quantize import Int8Linear, quantize_rows

ROOT = Path(__file__).parent.parent
FP32, FP16 = torch.float32, torch.float16
both = pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
SOME = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("TRITON_INTERPRET", "1")
        kernels.choose_kernels("triton", "cpu")
        yield
        kernels.choose_kernels("auto", "cpu")


@pytest.fixture
def plain():
    """Whatever a test compares with is computed without kernels."""

    def run(function, *args, **options):
        kernels.choose_kernels("torch", "cpu")
        result = function(*args, **options)
        kernels.choose_kernels("triton", "cpu")
        return result

    return run


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    tolerance = {FP32: 1e-5, FP16: 3e-3}[ours.dtype]
    assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


def random(*shape: int, dtype=FP32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# --- Attention -------------------------------------------------------------------------------------------------------


def check_attention(B, H, K, T, S, d, dtype, causal=True, first_key=None, window=None):
    """Against llama.attention_by_hand in float32, on queries, keys and values as the model's matrices give them."""
    q = random(B, T, H, d, dtype=dtype).transpose(1, 2)
    k, v = random(2, B, S, K, d, dtype=dtype).transpose(2, 3)
    mask, padding = torch.ones(1, 1, T, S, dtype=torch.bool), None
    if first_key is not None:
        first_key = torch.tensor(first_key, dtype=torch.int32)
        padding = torch.arange(S) >= first_key[:, None]
    if causal:
        mask = llama.visible_keys(padding, S - T, T, window, "cpu")
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None] if mask is None else mask
    wanted, _ = llama.attention_by_hand(q.float(), k.float(), v.float(), mask)
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
def test_attention_behind_every_padding(T, dtype):
    check_attention(9, 2, 1, T, 9, 32, dtype, first_key=range(9))
    check_attention(9, 2, 1, T, 9, 32, dtype, first_key=range(9), window=4)


@both
def test_attention_behind_long_padding(dtype):
    check_attention(6, 1, 1, 150, 150, 32, dtype, first_key=[0, 1, 63, 64, 130, 149], window=40)


@both
def test_attention_of_a_picture(dtype):
    q, k, v = random(3, 1, 577, 1, 64, dtype=dtype).transpose(2, 3)
    close(clip.attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float()))


def test_large_scores_do_not_overflow():
    q, k, v = random(3, 1, 2, 40, 32) * 200
    assert_close(attention(q, k, v, True), llama.attention_by_hand(q, k, v)[0], atol=0.1, rtol=1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2), (1, 0, 3, 2)], ids=str)
def test_attention_of_tensors_laid_out_in_any_order(order):
    shape = torch.tensor((2, 4, 40, 32))[list(order)].tolist()
    back = torch.tensor(order).argsort().tolist()
    q, k, v = (x.permute(back) for x in random(3, *shape))
    close(attention(q, k[:, ::2], v[:, ::2], True), llama.attention_by_hand(q, k[:, ::2], v[:, ::2])[0])


@SOME
@given(st.data())
def test_attention_of_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    B, K, group, T, past = draw(1, 2), draw(1, 2), draw(1, 3), draw(1, 90), draw(0, 90)
    window = data.draw(st.none() | st.integers(1, 120))
    first_key = data.draw(st.none() | st.lists(st.integers(0, T + past - 1), min_size=B, max_size=B))
    check_attention(B, K * group, K, T, past + T, draw(1, 70), FP32, True, first_key, window)


# --- Attention of one token ------------------------------------------------------------------------------------------


def check_decode(B, H, K, past, room, d, dtype, first_key=None, window=None):
    q = random(B, 1, H, d, dtype=dtype).transpose(1, 2)
    cache = random(2, B, K, room, d, dtype=dtype)
    S = past + 1
    padding = None if first_key is None else torch.arange(S) >= torch.tensor(first_key)[:, None]
    mask = llama.visible_keys(padding, past, 1, window, "cpu")
    wanted, _ = llama.attention_by_hand(q.float(), *cache[:, :, :, :S].float(), mask)
    cache[:, :, :, S:] = torch.nan  # nothing there may be read
    first_key = None if first_key is None else torch.tensor(first_key, dtype=torch.int32)
    number = torch.tensor([past], dtype=torch.int32)
    close(kernels.decode_attention(q, *cache, number, first_key, window), wanted)


@both
@pytest.mark.parametrize("d", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (3, 1), (32, 1)], ids=str)
def test_one_token_with_every_head_width_and_grouping(H, K, d, dtype):
    check_decode(1, H, K, 70, 130, d, dtype)


@both
@pytest.mark.parametrize("past", [0, 1, 62, 63, 64, 65, 127, 128, 299])
def test_one_token_behind_every_length(past, dtype):
    check_decode(1, 2, 1, past, 300, 32, dtype)
    check_decode(1, 2, 1, past, 300, 32, dtype, window=50)


@both
def test_one_token_behind_every_padding(dtype):
    check_decode(9, 2, 2, 8, 20, 32, dtype, first_key=list(range(9)))
    check_decode(3, 2, 2, 199, 256, 32, dtype, first_key=[0, 130, 199], window=90)


@SOME
@given(st.data())
def test_one_token_with_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    B, K, group, past = draw(1, 3), draw(1, 2), draw(1, 5), draw(0, 200)
    first_key = data.draw(st.none() | st.lists(st.integers(0, past), min_size=B, max_size=B))
    window = data.draw(st.none() | st.integers(1, 250))
    check_decode(B, K * group, K, past, past + draw(1, 90), draw(1, 70), FP32, first_key, window)


# --- The small ones --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 33), (1, 1, 64), (5, 100), (2, 4096), (0, 8)], ids=str)
def test_rms_norm(shape, dtype, plain):
    norm = llama.RMSNorm(shape[-1], 1e-5).to(dtype)
    norm.weight.copy_(random(shape[-1], dtype=dtype))
    x, y = random(2, *shape, dtype=dtype) * 100  # their squares overflow in float16
    close(norm(x), plain(norm, x))
    for ours, theirs in zip(norm.after_adding(x, y), plain(norm.after_adding, x, y), strict=True):
        close(ours, theirs)
    wide = random(*shape[:-1], 2 * shape[-1], dtype=dtype)
    close(norm(wide[..., ::2]), plain(norm, wide[..., ::2]))
    close(norm.after_adding(x, wide[..., ::2])[1], plain(norm.after_adding, x, wide[..., ::2])[1])


@both
@pytest.mark.parametrize("shape", [(1, 1, 22), (2, 3, 64), (1, 2, 1100), (4, 1), (0, 6)], ids=str)
def test_swiglu(shape, dtype, plain):
    gate, up = random(*shape[:-1], 2 * shape[-1], dtype=dtype).mul(5).split(shape[-1], -1)  # halves of one matrix
    close(llama.swiglu(gate, up), plain(llama.swiglu, gate, up))
    close(llama.swiglu(gate.mT, up.mT), plain(llama.swiglu, gate.mT, up.mT))


@both
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "past", "d"), [(1, 2, 2, 1, 0, 32), (2, 4, 2, 3, 4, 20), (2, 3, 1, 5, 2, 96)]
)
@pytest.mark.parametrize("shared", [True, False], ids=["angles shared", "angles for each row"])
def test_rope_into_the_cache(B, H, K, T, past, d, shared, dtype):
    cache = llama.KVCache(llama.LlamaConfig(8, H * d, 8, 1, H, K), B, past + T + 2, dtype, "cpu")
    cache.k[0].fill_(7), cache.v[0].fill_(7)
    cache.length = past
    cache.past += past
    qkv = random(B, T, (H + 2 * K) * d, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in qkv.split((H * d, K * d, K * d), -1))
    angles = random(1 if shared else B, 1, T, d // 2) * 9
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = cache.k[0].clone(), cache.v[0].clone()
    close(kernels.rope_into_cache(q, k, v, cos, sin, k_cache, v_cache, cache.past), llama.apply_rope(q, cos, sin))
    cache.update(0, llama.apply_rope(k, cos, sin), v)
    close(k_cache, cache.k[0])
    assert torch.equal(v_cache, cache.v[0])


@both
@pytest.mark.parametrize(("rows", "out", "n"), [(1, 64, 512), (2, 37, 600), (3, 5, 7), (4, 1, 1100)])
def test_int8_product(rows, out, n, dtype):
    linear = llama.Linear(n, out, bias=False).to(dtype)
    int8 = Int8Linear(linear)
    quantize_rows(linear.weight, int8.q, int8.scale)
    x = random(1, rows, n, dtype=dtype)
    close(int8(x), (x.float() @ (int8.q.float() * int8.scale.float()[:, None]).T).to(dtype))
    many = x.expand(5, -1, -1)  # more rows than the kernel takes
    if 5 * rows > 4:
        assert int8(many).shape == (5, rows, out)


# --- Errors ----------------------------------------------------------------------------------------------------------

Q, CACHE, PAST = random(2, 4, 1, 16), random(2, 2, 9, 16), torch.zeros(1, dtype=torch.int32)
COS = random(1, 1, 1, 8)
INT8 = torch.zeros(5, 16, dtype=torch.int8)
WRONG = {
    "k is .* must be": lambda: attention(Q, random(1, 2, 9, 16), CACHE, False),
    "v is .* must be": lambda: attention(Q, CACHE, random(2, 2, 8, 16), False),
    "must be .batch, heads, tokens, width.": lambda: attention(Q[0], CACHE, CACHE, False),
    "divide": lambda: attention(random(2, 3, 1, 16), CACHE, CACHE, False),
    "256 wide": lambda: attention(*(random(1, 1, 2, 300),) * 3, False),
    "at least as many keys": lambda: attention(random(2, 4, 10, 16), CACHE, CACHE, True),
    "for causal attention": lambda: attention(Q, CACHE, CACHE, False, window=3),
    "first_key is": lambda: attention(Q, CACHE, CACHE, True, torch.zeros(3, dtype=torch.int32)),
    "first_key must be int32": lambda: attention(Q, CACHE, CACHE, True, torch.zeros(2, dtype=torch.int64)),
    "k is torch.float16, but q is torch.float32": lambda: attention(Q, CACHE.half(), CACHE, True),
    "q is torch.float64": lambda: attention(Q.double(), CACHE.double(), CACHE.double(), True),
    "k is on meta": lambda: attention(Q, CACHE.to("meta"), CACHE, True),
    "q is on meta, but the kernels run": lambda: attention(*(CACHE.to("meta"),) * 3, True),
    "q is .* must be .2, 4, 1, 16": lambda: kernels.decode_attention(random(2, 4, 2, 16), CACHE, CACHE, PAST),
    "k and v must be contiguous": lambda: kernels.decode_attention(Q, CACHE[:, :, ::2], CACHE[:, :, ::2], PAST),
    "past must be int32": lambda: kernels.decode_attention(Q, CACHE, CACHE, PAST.long()),
    "weight is": lambda: kernels.rms_norm(Q, random(15), 1e-5),
    "added is": lambda: kernels.add_rms_norm(Q, Q[:1], random(16), 1e-5),
    "up is": lambda: kernels.swiglu(Q, Q[:1]),
    "cos is": lambda: kernels.rope_into_cache(Q, Q[:, :2], Q[:, :2], COS[..., :3], COS, CACHE, CACHE, PAST),
    "k_cache must be": lambda: kernels.rope_into_cache(Q, Q[:, :2], Q[:, :2], COS, COS, CACHE[:, :, ::2], CACHE, PAST),
    "q must be contiguous int8": lambda: kernels.int8_linear(Q, INT8.float(), random(5)),
    "8 rows": lambda: kernels.int8_linear(Q, INT8, random(5)),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_a_kernel_cannot_serve_is_a_plain_error(words):
    with pytest.raises(ValueError, match=words):
        WRONG[words]()


def test_training_takes_the_plain_path_and_a_kernel_says_why():
    x, norm = random(2, 8).requires_grad_(), llama.RMSNorm(8, 1e-5)
    assert kernels.usable(x)
    with torch.enable_grad():
        assert not kernels.usable(x)
        norm(x).sum().backward()
        with pytest.raises(ValueError, match="no gradients"):
            kernels.rms_norm(x, norm.weight, norm.eps)
    assert x.grad.abs().sum() > 0 and norm.weight.grad is not None


def test_autocast_takes_the_plain_path():
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.usable(Q)


def test_nothing_but_a_test_takes_kernels_on_a_cpu():
    kernels.choose_kernels("auto", "cpu")
    assert not kernels.usable(Q)
    kernels.choose_kernels("triton", "cpu")
    assert kernels.usable(Q) and not kernels.usable(Q.double())
    with pytest.raises(ValueError, match="auto, triton or torch"):
        kernels.choose_kernels("cuda", "cpu")
    command = [sys.executable, ROOT / "llava.py", "--kernels", "triton", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 2 and "Triton cannot run on cpu" in done.stderr


# --- The whole model -------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 10}


kind = lambda *names: pytest.mark.parametrize("model", names, indirect=True)  # noqa: E731


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("checkpoint"), dict(SMALL)
    if request.param == "mistral":
        text |= {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 3}
    reference_and_ours(folder, {"num_hidden_layers": 2, "patch_size": 14}, text)
    quantize = "int8" if request.param == "int8" else None
    return LlavaForConditionalGeneration.from_pretrained(folder, kernels="triton", quantize=quantize)


def inputs() -> dict:
    ids, mask = prompts([4, 1], [1, 1], patches=4)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": random(2, 3, 28, 28)}


@kind("llama", "mistral", "int8")
def test_the_same_words_with_kernels_as_without(model, plain, monkeypatch):
    options = {**inputs(), "max_new_tokens": 3, "eos_token_id": []}
    wanted = plain(model.generate, **options)
    launched = []
    monkeypatch.setattr(kernels, "attend", lambda *args, attend=kernels.attend: launched.append(1) or attend(*args))
    assert torch.equal(model.generate(**options), wanted)
    assert len(launched) == 3 * 2  # every step of both layers


@kind("llama", "mistral")
def test_the_same_numbers_with_kernels_as_without(model, plain):
    given = inputs()
    for options in ({}, {"use_cache": False}, {"output_attentions": True}):
        ours, theirs = model(**given, **options), plain(model, **given, **options)
        seen = given["attention_mask"].bool()
        assert_close(ours.logits[seen], theirs.logits[seen], atol=1e-4, rtol=1e-4)
    more = random(2, 3, model.config.text_config.hidden_size)  # several tokens behind a filled cache
    mask = torch.cat([given["attention_mask"], torch.ones(2, 3)], 1)
    ours = model(inputs_embeds=more, attention_mask=mask, past_key_values=model(**given).past_key_values)
    cache = plain(model, **given).past_key_values
    theirs = plain(model, inputs_embeds=more, attention_mask=mask, past_key_values=cache)
    assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)


@kind("llama")
def test_a_mask_with_holes_takes_the_plain_path(model, plain, monkeypatch):
    given = inputs()
    given["attention_mask"][0, 2] = 0
    wanted = plain(model.generate, **given, max_new_tokens=3, eos_token_id=[])
    monkeypatch.setattr(kernels, "attend", None)
    assert torch.equal(model.generate(**given, max_new_tokens=3, eos_token_id=[]), wanted)


@kind("llama")
def test_a_full_cache_says_so_with_kernels_too(model):
    cache = llama.KVCache(model.config.text_config, 1, 2, FP32, "cpu")
    with pytest.raises(ValueError, match="room for 2 tokens, and 3"):
        model(torch.tensor([[1, 5, 6]]), past_key_values=cache)


@kind("mistral")
def test_a_decode_step_reads_its_place_on_the_device(model):
    """What a CUDA graph replays: the host's numbers are frozen, and only what lies on the device moves on."""
    given, scores = inputs(), {}
    steps = random(3, 2, 1).abs().mul(90).long() + 5
    for frozen in (False, True):
        cache = llama.KVCache(model.config.text_config, 2, 20, FP32, "cpu")
        generate.prefill(model, given["input_ids"], given["attention_mask"], cache, given["pixel_values"])
        length, position_ids = cache.length, given["attention_mask"].sum(-1, keepdim=True)
        scores[frozen] = []
        for i, ids in enumerate(steps):
            scores[frozen].append(generate.decode_one_token(model, ids[:, 0], position_ids + i, cache))
            if frozen:
                cache.length = length
    assert torch.equal(torch.stack(scores[False]), torch.stack(scores[True]))
    assert not DecodeGraph.fits(cache)  # a graph is for a GPU


@kind("llama")
def test_a_decode_step_waits_for_no_value(model, plain):
    """On the meta device tensors have no values, so whatever looked at one would fail here, as it would in a graph."""
    model, text = copy.deepcopy(model).to("meta"), model.config.text_config
    cache = llama.KVCache(text, 2, 20, FP32, "meta")
    ids = torch.zeros(2, dtype=torch.long, device="meta")
    assert plain(generate.decode_one_token, model, ids, ids[:, None], cache).shape == (2, text.vocab_size)


def test_the_graph_is_given_each_token_and_its_place(monkeypatch):
    """Without a GPU, a stand-in: recording counts on the host alone, and a replay knows what is on the device alone."""

    class Cache:
        length, past = 5, torch.tensor([5])

    def decode(model, ids, position_ids, cache):
        cache.length += 1
        return scores.copy_(ids * 100 + position_ids[:, 0] * 10 + cache.past)

    class Graph:
        def replay(self):
            scores.copy_(step.ids * 100 + step.position_ids[:, 0] * 10 + Cache.past)

    scores, step = torch.zeros(2, dtype=torch.long), DecodeGraph(decode)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
    for i in range(4):
        ids, position_ids = torch.tensor([i, 7]), torch.tensor([[i], [i + 1]])
        assert torch.equal(step(None, ids, position_ids, Cache), ids * 100 + position_ids[:, 0] * 10 + Cache.past)
        Cache.past += 1
        assert Cache.length == Cache.past == 6 + i


def test_threads_record_one_after_the_other(monkeypatch):
    """PyTorch captures on one stream, and a capture must not forbid the other threads their work meanwhile."""
    recording, modes = threading.Lock(), []

    @contextlib.contextmanager
    def graph(_, capture_error_mode="global"):
        modes.append(capture_error_mode)
        assert recording.acquire(blocking=False)
        time.sleep(0.05)
        yield
        recording.release()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    cache = types.SimpleNamespace(length=5)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: DecodeGraph(lambda *_: None).record(None, cache), range(3)))
    assert modes == ["thread_local"] * 3


# --- Compiled for a GPU ----------------------------------------------------------------------------------------------


def test_every_kernel_compiles_without_spills(tmp_path):
    """At the 7B's shapes, by the benchmark's own command: registers suffice, and products are for matrix units."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--compile-only", "--json", tmp_path / "table.json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["compiled"]
    assert {row["sm"] for row in rows} == {80, 90}
    names = ["attention_kernel", "decode_kernel", "join_kernel", "rms_norm_kernel", "rope_kernel", "swiglu_kernel"]
    assert {row["kernel"] for row in rows} == {*names, "int8_kernel"}
    for row in rows:
        assert row["spilled bytes"] == 0, row
        assert row["shared bytes"] <= (227 if row["sm"] == 90 else 99) * 1024, row
        if row["kernel"] in ("attention_kernel", "decode_kernel") and "float32" not in row["what"]:
            many_queries = row["kernel"] == "attention_kernel"
            assert row["matrix unit"] == ("wgmma" if row["sm"] == 90 and many_queries else "mma.sync"), row
