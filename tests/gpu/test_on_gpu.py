"""What only a GPU can show: the compiled kernels, and the accelerated model with its CUDA graph against the plain one.

    python -m pytest tests/gpu

Kernels are judged row by row, against the formula in float32: a row may be 1.5 times as far from it as the plain
function is in the same dtype. Over a whole tensor, single wrong rows would not show.
"""

import copy
import gc
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import clip
import llama
from cli.chat import Chat
from hub.files import BUNDLED
from hub.pictures import open_image
from kernel_helpers import BF16, FP16, FP32, KINDS, make
from kernels import accelerate
from kernels.attention import attention
from kernels.decode_attention import decode_attention
from kernels.int8 import int8_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_into_cache
from kernels.swiglu import swiglu
from llava import LlavaForConditionalGeneration, LlavaProcessor
from quantize import quantize_rows
from tiny_world import ROOT

DEVICE = os.environ.get("TEST_DEVICE", "cuda")  # cpu: tries these tests themselves, in the interpreter
ON_GPU = DEVICE == "cuda"
dtypes = pytest.mark.parametrize("dtype", [FP32, FP16, BF16] if ON_GPU else [FP32], ids=str)


def random(*shape: int, dtype=FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def no_row_is_worse(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Each (..., D). `plain` is computed in the dtype of `ours`, `exact` in float32."""
    assert ours.shape == exact.shape and ours.isfinite().all()
    far, allowed = ((x.float() - exact).norm(dim=-1) / exact.norm(dim=-1) for x in (ours, plain))
    floor = {FP32: 1e-5, FP16: 5e-4, BF16: 4e-3}[ours.dtype]
    assert (far <= 1.5 * allowed.amax().clamp(min=floor)).all(), (far.max(), allowed.max())


@dtypes
@pytest.mark.parametrize(("H", "K", "d"), [(4, 4, 64), (8, 2, 128), (4, 1, 80), (2, 2, 256)])
@pytest.mark.parametrize(("T", "S", "window"), [(577, 577, None), (130, 300, None), (200, 200, 37), (1, 65, None)])
def test_attention(H, K, d, T, S, window, dtype):
    q, (k, v) = random(1, H, T, d), random(2, 1, K, S, d)
    mask = llama.visible_keys(torch.ones(1, S, dtype=torch.bool, device=DEVICE), S - T, T, window, DEVICE)
    exact, _ = llama.eager_attention(q, k, v, mask)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    no_row_is_worse(attention(q, k, v, True, None, window), llama.eager_attention(q, k, v, mask)[0], exact)
    if T == S and H == K:
        no_row_is_worse(attention(q, k, v, False), clip.eager_attention(q, k, v), clip.eager_attention(
            *(x.float() for x in (q, k, v))))  # fmt: skip


@dtypes
@pytest.mark.parametrize(("H", "K", "d"), [(4, 4, 64), (32, 32, 128), (32, 8, 128), (2, 1, 256)])
@pytest.mark.parametrize(
    ("past", "first_key", "window"), [(0, 0, None), (640, 0, None), (640, 30, None), (639, 3, 100)]
)
def test_decode_attention(H, K, d, past, first_key, window, dtype):
    q, (k, v) = random(2, H, 1, d), random(2, 2, K, 1024, d)
    real = torch.arange(past + 1, device=DEVICE).expand(2, -1) >= min(first_key, past)
    mask = llama.visible_keys(real, past, 1, window, DEVICE)
    exact, _ = llama.eager_attention(q, k[:, :, : past + 1], v[:, :, : past + 1], mask)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k[:, :, past + 1 :], v[:, :, past + 1 :] = torch.nan, torch.nan  # the kernel must not read them
    first = torch.full((2,), min(first_key, past), dtype=torch.int32, device=DEVICE)
    ours = decode_attention(q, k, v, torch.tensor([past], dtype=torch.int32, device=DEVICE), first, window)
    no_row_is_worse(ours, llama.eager_attention(q, k[:, :, : past + 1], v[:, :, : past + 1], mask)[0], exact)


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 608])
def test_norm_swiglu_and_rope(rows, dtype):
    x, y = random(1, rows, 4096, dtype=dtype), random(2, rows, 2048, dtype=dtype).view(1, rows, 4096)
    norm = llama.RMSNorm(4096, 1e-5).to(DEVICE, dtype)
    exact = copy.deepcopy(norm).float()
    no_row_is_worse(rms_norm(x, norm.weight, norm.eps), norm(x), exact(x.float()))
    total, ours = add_rms_norm(x, y, norm.weight, norm.eps)
    assert torch.equal(total, x + y)
    no_row_is_worse(ours, norm(x + y), exact((x + y).float()))
    no_row_is_worse(swiglu(x, y), F.silu(x) * y, F.silu(x.float()) * y.float())

    q, k, v = random(1, rows, 3 * 512, dtype=dtype).unflatten(-1, (3, 4, 128)).permute(2, 0, 3, 1, 4)
    angles = llama.rope_angles(llama.LlamaConfig(), torch.arange(9, 9 + rows, device=DEVICE)[None])[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = torch.zeros(2, 1, 4, 640, 128, dtype=dtype, device=DEVICE)
    rotated = rope_into_cache(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([9], dtype=torch.int32, device=DEVICE))
    both = {"ours": (rotated, k_cache[:, :, 9 : 9 + rows]), "plain": [llama.apply_rope(x, cos, sin) for x in (q, k)]}
    for ours, plain, given in zip(both["ours"], both["plain"], (q, k), strict=True):
        no_row_is_worse(ours, plain, llama.apply_rope(given.float(), cos.float(), sin.float()))
    assert torch.equal(v_cache[:, :, 9 : 9 + rows], v) and not k_cache[:, :, :9].any()


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_int8(rows, dtype):
    x, (q, scale) = random(1, rows, 1024, dtype=dtype), quantize_rows(random(777, 1024))
    weight = q.float() * scale.float()[:, None]
    plain = F.linear(x, (q.to(dtype) * scale.to(dtype)[:, None]))
    no_row_is_worse(int8_linear(x, q, scale.to(dtype)), plain, F.linear(x.float(), weight))


def answers(model, n: int, **prompt) -> Tensor:
    return model.generate(**prompt, max_new_tokens=n)


@pytest.mark.parametrize("kind", KINDS)
def test_the_accelerated_model_gives_the_plain_ones_tokens(kind):
    """In float32: a single prompt, a padded batch, twice, so that the second answer has a graph of its own."""
    plain = make(kind).to(DEVICE)
    fast = accelerate(copy.deepcopy(plain), "triton")
    one = {"input_ids": torch.tensor([[1, 5, 9, 33]], device=DEVICE)}
    ids = torch.tensor([[1, 5, 9, 12, 40], [0, 0, 1, 7, 22]], device=DEVICE)
    two = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    for prompt in (one, two, one, two):
        assert torch.equal(answers(fast, 24, **prompt), answers(plain, 24, **prompt))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_bundled_model_answers_like_the_plain_one_in_a_batch_and_in_a_chat(quantize):
    load = LlavaForConditionalGeneration.from_pretrained
    plain, fast = (load(BUNDLED, FP32, DEVICE, quantize, kernels=how) for how in ("torch", "triton"))
    processor = LlavaProcessor.from_pretrained(BUNDLED)
    pictures = [open_image(path) for path in sorted((ROOT / "images").glob("*.jpg"))]
    prompt = "USER: <image>\nDescribe the picture. ASSISTANT:"
    inputs = processor(images=pictures, text=[prompt] * len(pictures), padding=True).to(DEVICE)
    assert torch.equal(answers(fast, 30, **inputs), answers(plain, 30, **inputs))
    said = []
    for model in (plain, fast):
        chat = Chat(model, processor, max_new_tokens=20)
        chat.pictures = [("a", pictures[0])]
        for question in ("What is on the left?", "What is on the right?", "What color is the background?"):
            chat.say(question, lambda text: None)
        said.append(chat.ids)
    assert said[0] == said[1]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs in one thread only")
def test_two_models_in_two_threads_do_not_disturb_each_other():
    models = [accelerate(make(kind).to(DEVICE), "triton") for kind in ("MHA", "GQA and window")]
    ids = torch.tensor([[1, 5, 9, 33]], device=DEVICE)
    wanted, found = [answers(model, 16, input_ids=ids) for model in models], [[], []]

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(answers(models[i], 16, input_ids=ids))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, wanted, strict=True):
        assert len(got) == 5 and all(torch.equal(ids, want) for ids in got)


@pytest.mark.parametrize("dtype", [FP16, BF16] if ON_GPU else [FP16], ids=str)  # no bfloat16 in the interpreter
def test_scores_in_16_bits_are_as_exact_as_the_plain_models(dtype):
    exact = make("GQA and window").to(DEVICE)
    plain = copy.deepcopy(exact).to(dtype)
    fast = accelerate(copy.deepcopy(plain), "triton")
    ids = torch.randint(1, 50, (3, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    no_row_is_worse(*(model(ids).logits for model in (fast, plain, exact)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu():
    torch.cuda.set_device(1)
    try:
        plain = make("MHA").to("cuda:1")
        fast = accelerate(copy.deepcopy(plain), "triton")
        ids = torch.tensor([[1, 5, 9, 33]], device="cuda:1")
        assert torch.equal(answers(fast, 16, input_ids=ids), answers(plain, 16, input_ids=ids))
    finally:
        torch.cuda.set_device(0)


def test_a_captured_graph_survives_what_happens_between_tokens():
    """Garbage collection, other allocations and the end of another answer."""
    model = accelerate(make("MHA").to(DEVICE), "triton")
    ids = torch.tensor([[1, 5, 9, 33]], device=DEVICE)
    wanted = answers(model, 20, input_ids=ids)
    seen = []

    def streamer(text: str) -> None:
        gc.collect()
        torch.empty(1000, 1000, device=DEVICE)
        seen.append(text)

    processor = LlavaProcessor.from_pretrained(BUNDLED)
    again = model.generate(ids, max_new_tokens=20, streamer=streamer, tokenizer=processor.tokenizer)
    assert torch.equal(again, wanted)
    assert_close(answers(model, 20, input_ids=ids), wanted, atol=0, rtol=0)
