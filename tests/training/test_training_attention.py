"""The attention that training swaps in: the same outputs and gradients as the plain model's, with bounded memory."""

from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

import clip
import llama
from tiny_world import tiny_world, untrained
from training import attention
from training.attention import decoder_attention, formula_is_faster, tower_attention, use_training_attention
from training.losses import ContrastiveLoss, NextTokenLoss


def random_qkv(T: int, H: int, K: int, d: int = 16, S: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, n, d, requires_grad=True) for heads, n in ((H, T), (K, S or T), (K, S or T))]


def output_and_gradients(function, qkv, *rest) -> list[torch.Tensor]:
    out = function(*qkv, *rest)
    return [out, *torch.autograd.grad(out.square().sum(), qkv)]


def mask(T: int, window: int | None, padded: bool) -> torch.Tensor | None:
    padding = torch.arange(T).expand(2, T) >= torch.tensor([[0], [3]]) if padded else None
    return llama.visible_keys(padding, 0, T, window, "cpu")


@pytest.mark.quick
@pytest.mark.parametrize("H, K", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window, padded", [(None, False), (5, False), (None, True), (5, True)])
def test_the_decoders_attention_and_its_gradients_are_the_plain_models(H, K, window, padded):
    qkv, m = random_qkv(17, H, K), mask(17, window, padded)
    first = 3 if padded else 0  # no row of the mask before it attends to anything in the padded sequence
    ours, plain = (output_and_gradients(lambda *x, f=f: f(*x)[:, :, first:], qkv, m)
                   for f in (decoder_attention, llama.attention))  # fmt: skip
    assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.quick
def test_the_towers_attention_and_its_gradients_are_the_plain_models():
    ours, plain = (output_and_gradients(f, random_qkv(17, 3, 3)) for f in (tower_attention, clip.attention))
    assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.quick
def test_the_formula_keeps_256_mb_at_most_and_only_for_gradients(monkeypatch):
    called = []
    monkeypatch.setattr(llama, "eager_attention", lambda *_: called.append("formula") or [None])
    monkeypatch.setattr(llama, "attention", lambda *_: called.append("PyTorch"))
    largest = torch.empty(1, 1, 8000, 1, requires_grad=True)  # 8000 x 8000 weights of 4 bytes are 256 MB
    longer = torch.empty(1, 1, 8001, 1, requires_grad=True)
    assert 4 * 8000**2 == attention.LARGEST_WEIGHTS
    for q in (largest, longer, longer.bfloat16(), largest.detach()):
        decoder_attention(q, q, q)
    assert called == ["formula", "PyTorch", "formula", "PyTorch"]
    many = torch.empty(2, 8, 2000, 1, requires_grad=True)
    assert formula_is_faster(many, many) and not formula_is_faster(torch.cat([many, many[:1]]), many)
    assert not formula_is_faster(many, torch.empty(2, 8, 2001, 1))
    assert not formula_is_faster(many.to("meta"), many)  # any device but a CPU


@pytest.mark.parametrize("loss, batch", [
    (NextTokenLoss, tiny_world().conversations(range(3))), (ContrastiveLoss, tiny_world().parts(range(3)))
], ids=["next token", "contrast"])  # fmt: skip
def test_a_model_with_it_learns_the_same(loss, batch):
    plain = loss(untrained())
    ours = deepcopy(plain)
    use_training_attention(ours)
    swapped = [m.attention for m in ours.modules() if isinstance(m, llama.LlamaAttention | clip.CLIPAttention)]
    assert set(swapped) == {decoder_attention, tower_attention}
    results = []
    for objective in (plain, ours):
        value = objective(batch) / objective.count(batch)
        value.backward()
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        results.append({"loss": value} | gradients)
    assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
