"""Each module that `accelerate` swaps in against the plain module, with the same weights and random inputs."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kernel_helpers import BF16, FP16, FP32, KINDS, answer, batch, make, random
from kernels import accelerate
from kernels.cpu import AVX2, CpuInt4, CpuInt8, CpuLinear, FusedAttention, FusedMLP, one_query_attention
from llama import KVCache, Llama, LlamaConfig, attention, rope_angles, visible_keys

pytest.importorskip("triton")
from kernels.decoder import FastInt8Linear, FastLlama

every_kind = pytest.mark.parametrize("kind", KINDS)


def pairs(plain: nn.Module, fast: nn.Module):
    """The modules that were swapped: name, plain one, twin."""
    for name, twin in fast.named_modules():
        module = plain.get_submodule(name)
        if type(twin) is not type(module):
            yield name, module, twin


def no_worse(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """In float32 a twin has the plain module's numbers; in others its error is hardly larger than the plain one's."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if ours.dtype == FP32:
        assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    else:
        error = (theirs.float() - exact).abs().max()
        assert (ours.float() - exact).abs().max() <= 2 * error + 0.01 * exact.std()


# --- On a CPU --------------------------------------------------------------------------------------------------------


def run_attention(module: nn.Module, config, rows: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """The output for new tokens after three others, and then the layer's keys and values."""
    cache, outs = KVCache(config, rows, 3 + tokens, dtype, "cpu"), []
    for T in (3, tokens):
        angles = rope_angles(config, torch.arange(cache.length, cache.length + T)[None])[:, None]
        rope = angles.cos().to(dtype), angles.sin().to(dtype)
        mask = visible_keys(None, cache.length, T, config.sliding_window, "cpu")
        outs.append(module(random(rows, T, config.hidden_size, dtype=dtype), rope, mask, cache))
        cache.length += T
    return [*outs, cache.k[module.layer], cache.v[module.layer]]


def run(module: nn.Module, twin: nn.Module, config, rows: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    if isinstance(twin, FusedAttention):
        return run_attention(module, config, rows, tokens, dtype)
    width = config.hidden_size if isinstance(twin, FusedMLP) else twin.in_features
    x = random(rows, tokens, width, dtype=dtype)
    given = x.clone()
    y = module(x)
    assert torch.equal(x, given)  # what a module overwrites is its own
    return [y]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@every_kind
def test_every_twin_on_a_cpu(kind, dtype):
    plain = make(kind, dtype)
    fast, exact = accelerate(copy.deepcopy(plain)), copy.deepcopy(plain).float()
    found = set()
    for name, module, twin in pairs(plain, fast):
        found.add(type(twin))
        in_decoder = name.startswith(("language_model.", "lm_head"))
        assert in_decoder or (AVX2 and dtype == BF16 and type(twin) is CpuLinear)
        for rows, tokens in ((1, 1), (4, 1), (1, 4), (1, 70), (70, 1)):
            where = plain.config.text_config, rows, tokens
            ours, theirs = run(twin, twin, *where, dtype), run(module, twin, *where, dtype)
            for a, b, c in zip(ours, theirs, run(exact.get_submodule(name), twin, *where, FP32), strict=True):
                no_worse(a, b, c)
    linear = CpuInt8 if "int8" in kind else CpuInt4 if "int4" in kind else CpuLinear
    assert found - {CpuLinear} == {linear, FusedAttention, FusedMLP} - {CpuLinear}
    assert linear in found


@pytest.mark.quick
@every_kind
def test_the_whole_model_on_a_cpu(kind):
    plain = make(kind)
    fast = accelerate(copy.deepcopy(plain))
    (ours, our_cache), (theirs, their_cache) = answer(fast), answer(plain)
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert_close(our_cache, their_cache, atol=2e-5, rtol=2e-5)


@pytest.mark.quick
@pytest.mark.parametrize("largest", [0, 10**9], ids=["in its dtype", "converted"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_attention_of_one_query_is_the_formula_in_every_dtype(dtype, largest, monkeypatch):
    monkeypatch.setattr("kernels.cpu.LARGEST_CONVERTED", largest)
    monkeypatch.setattr("kernels.cpu.AMX", False)
    for B, H, K, S in ((1, 4, 4, 1), (2, 6, 2, 70), (3, 5, 1, 300)):
        mask = random(B, 1, 1, S) > 0
        mask[..., -1] = True  # a query sees itself
        q, k, v = random(B, H, 1, 16), random(B, K, S + 9, 16)[:, :, :S], random(B, K, S, 16)
        for seen in (None, mask):
            exact = attention(q, k, v, seen)
            ours, theirs = (f(q.to(dtype), k.to(dtype), v.to(dtype), seen) for f in (one_query_attention, attention))
            no_worse(ours, theirs, exact)


@pytest.mark.quick
def test_matrices_are_fused_only_where_they_are_small(monkeypatch):
    plain = make()
    fast = accelerate(copy.deepcopy(plain))
    attn = fast.language_model.layers[0].self_attn
    assert attn.q_proj.weight.untyped_storage().data_ptr() == attn.v_proj.weight.untyped_storage().data_ptr()
    monkeypatch.setattr("kernels.cpu.LARGEST_FUSED", 3 * attn.q_proj.weight.nbytes - 1)
    fast = accelerate(copy.deepcopy(plain))
    for name, parameter in fast.named_parameters():  # nothing was copied
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert torch.equal(answer(fast)[0], answer(accelerate(copy.deepcopy(plain)))[0])


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["MHA", "biases"])
def test_gradients_and_autocast_run_the_formula_on_a_cpu(kind):
    plain = make(kind)
    fast, ids = accelerate(copy.deepcopy(plain)), torch.tensor([[7]])
    for model in (plain, fast):
        with torch.enable_grad():
            model(ids).logits.square().mean().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    with torch.autocast("cpu", BF16):
        ours, theirs = fast(ids).logits, plain(ids).logits
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# --- On a GPU, in Triton's interpreter -------------------------------------------------------------------------------


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """A list with an entry for each layer that the kernels ran."""
    calls, attend = [], FastLlama.attend
    monkeypatch.setattr(FastLlama, "attend", lambda *args: calls.append(1) or attend(*args))
    return calls


@every_kind
def test_the_decoder_on_a_gpu(kind, attended):
    layers = 2 if kind == "MHA" else 1
    plain = make(kind, layers=layers)
    fast = accelerate(copy.deepcopy(plain), "triton")
    swapped = {type(twin) for _, _, twin in pairs(plain, fast)}
    assert swapped == {FastLlama} | ({FastInt8Linear} if "int8" in kind else set())
    (ours, our_cache), (theirs, their_cache) = answer(fast), answer(plain)
    assert len(attended) == 3 * layers  # three forwards
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert_close(our_cache, their_cache, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_an_int8_matrix_on_a_gpu(dtype):
    plain = make("int8", dtype, layers=1)
    fast, exact = accelerate(copy.deepcopy(plain), "triton"), copy.deepcopy(plain).float()
    twins = [(name, *pair) for name, *pair in pairs(plain, fast) if isinstance(pair[1], FastInt8Linear)]
    assert len(twins) == 7 + 1
    for name, module, twin in twins[-3:]:  # up and down of the last layer, and the head
        for rows in (1, 4, 70):
            x = random(rows, 1, module.q.shape[1], dtype=dtype)
            no_worse(twin(x), module(x), exact.get_submodule(name)(x.float()))


def test_an_int8_matrix_runs_the_formula_where_the_kernel_cannot():
    plain = make("int8", layers=1).lm_head
    twin = FastInt8Linear(plain)
    with torch.enable_grad():
        assert torch.equal(twin(random(1, 32)), plain(random(1, 32)))
        x = random(5, 32).requires_grad_()
        assert torch.equal(*(torch.autograd.grad(part(x).sum(), x)[0] for part in (twin, plain)))
    x = random(5, 32, dtype=FP16)  # of another dtype than the scale
    assert torch.equal(twin(x), plain(x)) and twin(x).dtype == FP16
    assert twin(x[:0].float()).shape == (0, 70)


def test_the_tower_on_a_gpu():
    plain = make()
    fast = accelerate(copy.deepcopy(plain), "triton")
    pixels = batch()["pixel_values"]
    for ours, theirs in zip(fast.vision_tower(pixels), plain.vision_tower(pixels), strict=True):
        assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


FALLBACKS = {
    "attentions": {"output_attentions": True},
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
    "gradients": {},
    "autocast": {},
    "a mask with holes": {},
    "a plain cache": {},
    "float64": {},
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_the_formula_runs_where_kernels_cannot(why, attended):
    plain = make("GQA and window")
    fast = accelerate(copy.deepcopy(plain), "triton")
    results = []
    for model in (fast, plain):
        given = batch() | FALLBACKS[why]
        scope = contextlib.nullcontext()
        if why == "gradients":
            scope = torch.enable_grad()
        elif why == "autocast":
            scope = torch.autocast("cpu", BF16)
        elif why == "a mask with holes":
            given["attention_mask"][0, 1] = 0
        elif why == "a plain cache":
            given["past_key_values"] = KVCache(model.config.text_config, 2, 20, FP32, "cpu")
        elif why == "float64":
            model.double()
        with scope:
            out = model(**given)
            if why == "gradients":
                out.logits.square().mean().backward()
                results.append([p.grad for p in model.parameters() if p.grad is not None])
            elif why not in ("attentions", "hidden states", "no cache"):  # the next step uses the mask in the cache
                results.append([out.logits[:, -1], model.step(torch.tensor([7, 8]), None, out.past_key_values)])
            else:
                real = given["attention_mask"].bool()
                results.append([out.logits[real], *(x[real] for x in out.hidden_states or ())])
                results[-1] += [x[:, :, -1] for x in out.attentions or ()]
    assert not attended
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, atol=1e-4 if ours.dtype == FP32 else 0.02, rtol=1e-4)


ROPE = {"default": {}, "linear": {"rope_factor": 4.0}, "llama3": {"rope_factor": 8.0, "head_dim": 64}}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("kind", ROPE)
def test_the_table_has_the_cosines_and_sines_of_the_formula(kind, dtype):
    config = LlamaConfig(8, 64, 8, 1, 2, max_position_embeddings=100, rope_type=kind, **ROPE[kind])
    decoder = FastLlama(Llama(config).to(dtype))
    for tokens, positions in ((50, 100), (130, 130), (20, 130)):  # the table grows and does not shrink
        table = decoder.new_cache(1, tokens).rope
        assert table.shape == (2, positions, config.head_dim // 2) and table.dtype == dtype
        for i in range(positions):  # one by one, as in the plain decode step
            angles = rope_angles(config, torch.tensor([[i]]))[:, None]
            assert torch.equal(table[:, i], torch.cat([angles.cos(), angles.sin()]).to(dtype)[:, 0, 0])
    kept = decoder.new_cache(1, 130).rope
    assert kept is table  # made once,
    decoder.double()
    assert decoder.new_cache(1, 130).rope.dtype == torch.float64 and kept.dtype == dtype  # for each dtype


def test_a_prompt_with_positions_beyond_the_table_runs_the_formula(attended):
    plain = make(layers=1)
    fast, ids = accelerate(copy.deepcopy(plain), "triton"), torch.tensor([[1, 5]])
    context = plain.config.text_config.max_position_embeddings
    for first, layers in ((context - 2, 1), (context - 1, 0), (-1, 0)):
        attended.clear()
        position_ids = torch.tensor([[first, first + 1]])
        ours, theirs = (model(ids, position_ids=position_ids).logits for model in (fast, plain))
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert len(attended) == layers


def test_a_later_mask_replaces_an_earlier_one():
    plain = make(layers=1)
    results = []
    for model in (accelerate(copy.deepcopy(plain), "triton"), plain):
        cache = model.language_model.new_cache(2, 8)
        for mask in ([[1, 1], [0, 1]], [[1, 1, 1], [1, 1, 1]], [[1, 1, 1, 1], [0, 1, 1, 1]]):
            mask = torch.tensor(mask)
            new = torch.tensor([[5, 6, 7, 8], [9, 1, 2, 3]])[:, cache.length : mask.shape[1]]
            results.append(model(new, attention_mask=mask, past_key_values=cache).logits[:, -1])
    for ours, theirs in zip(results[:3], results[3:], strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_full_cache_says_so():
    fast = accelerate(make(), "triton")
    for mask in (None, torch.tensor([[0, 1, 1]])):
        cache = fast.language_model.new_cache(1, 2)
        with pytest.raises(ValueError, match="room for 2 tokens, and 3"):
            fast(torch.tensor([[1, 5, 6]]), attention_mask=mask, past_key_values=cache)
    cache = fast.language_model.new_cache(1, 2)
    fast(torch.tensor([[1, 5]]), past_key_values=cache)
    with pytest.raises(ValueError, match="room for 2 tokens, and 3"):
        fast.step(torch.tensor([6]), torch.tensor([[2]]), cache)
    with pytest.raises(ValueError, match="a batch of 1, but the batch is 2"):
        fast.step(torch.tensor([6, 7]), torch.tensor([[2]]), cache)
