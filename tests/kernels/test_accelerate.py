"""After `accelerate` a model can be read, saved, converted, loaded into and copied as if it were plain."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from hub.files import BUNDLED
from hub.writer import write_shards
from kernel_helpers import FP16, FP32, FP64, KINDS, random
from kernel_helpers import make as make_layers
from kernels import accelerate, why_triton_fails
from llama import Llama
from llava import LlavaForConditionalGeneration
from load_weights import read_tensors

pytest.importorskip("triton")

make = partial(make_layers, layers=1)
either = pytest.mark.parametrize("how", ["auto", "triton"])


def scores(model) -> Tensor:
    """The scores of one token: the least that runs every weight of the decoder."""
    return model(torch.tensor([[5]]), past_key_values=model.language_model.new_cache(1, 1)).logits


def same(ours, theirs, tolerance: float = 1e-4) -> None:
    assert_close(scores(ours), scores(theirs), atol=tolerance, rtol=tolerance)


@either
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_values_stay(kind, how, tmp_path):
    plain = make(kind)
    wanted = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fast = accelerate(plain, how)
    assert list(fast.state_dict()) == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in fast.state_dict().items())
    assert all(part.is_contiguous() for part in fast.parameters())
    if "int" not in kind:
        write_shards([fast.named_parameters()], tmp_path, 5e9)
        stored = read_tensors(tmp_path / "model.safetensors")
        assert sum(tensor.nbytes for tensor in stored.values()) == sum(part.nbytes for part in fast.parameters())
        write_shards([make(kind).named_parameters()], tmp_path, 5e9)
        for name, tensor in read_tensors(tmp_path / "model.safetensors").items():
            assert torch.equal(tensor, stored[name]), name


@either
def test_another_dtype(how):
    plain = make("biases")
    fast = accelerate(copy.deepcopy(plain), how)
    scores(fast)
    same(fast.to(FP64), plain.to(FP64), 1e-10)
    same(fast.to(FP16), plain.to(FP16), 0.05)
    same(fast.float(), plain.float())
    same(accelerate(make("int8"), how).to(FP16), make("int8").to(FP16), 0.05)


@either
@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later(how, assign):
    fast, other = accelerate(make("biases"), how), make("biases")
    scores(fast)
    for part in other.parameters():
        part.add_(0.05 * random(*part.shape))
    fast.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    same(fast, other)
    attn = fast.language_model.layers[0].self_attn
    for name in ("weight", "bias"):  # one parameter by itself, in place and replaced
        new = random(*getattr(attn.k_proj, name).shape)
        setattr(other.language_model.layers[0].self_attn.k_proj, name, torch.nn.Parameter(new.clone()))
        if assign:
            setattr(attn.k_proj, name, torch.nn.Parameter(new.clone()))
        else:
            getattr(attn.k_proj, name).data.copy_(new)
        same(fast, other)


FUSED = {
    "auto": lambda model: [layer.self_attn.fused_qkv for layer in model.language_model.layers],
    "triton": lambda model: [part for pair in model.language_model.fused for part in pair],
}


@either
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_weights_of_its_own(how, copied):
    fast, other = accelerate(make(), how), make()
    scores(fast)
    twin = copied(fast)
    held = [part.made[2] for part in FUSED[how](twin)]
    assert held == [None] * len(held)  # nothing is copied twice
    for part in (*twin.parameters(), *other.parameters()):
        part.mul_(1.5)
    same(twin, other)
    same(fast, make())
    twin.load_state_dict(make().state_dict())
    same(twin, make())


@either
def test_converting_frees_the_old_weights(how):
    fast = accelerate(make(), how)
    layer = fast.language_model.layers[0]
    linears = layer.self_attn.k_proj, layer.mlp.up_proj, layer.mlp.down_proj
    old = [StorageWeakRef(linear.weight.untyped_storage()) for linear in linears]
    assert not any(storage.expired() for storage in old)
    fast.to(FP64)
    assert all(storage.expired() for storage in old)


@either
def test_a_linear_replaced_later_takes_effect(how):
    """An adapter wraps linears after the model was loaded."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    fast, plain = accelerate(make(), how), make()
    for model in (fast, plain):
        attn, mlp = model.language_model.layers[0].self_attn, model.language_model.layers[0].mlp
        attn.v_proj, mlp.gate_proj, mlp.up_proj = Doubled(attn.v_proj), Doubled(mlp.gate_proj), Doubled(mlp.up_proj)
    same(fast, plain)


@either
def test_linears_of_different_dtypes_stay_apart(how):
    """Concatenated they would all have the wider dtype."""
    fast = accelerate(make(), how)
    fast.language_model.layers[0].self_attn.k_proj.half()
    with pytest.raises(RuntimeError, match="dtype"):
        scores(fast)
    assert fast.language_model.layers[0].self_attn.k_proj.weight.dtype == FP16


@either
def test_accelerating_twice_is_accelerating_once(how):
    fast = accelerate(accelerate(make(), how), how)
    same(fast, make())
    assert list(fast.state_dict()) == list(make().state_dict())


@either
def test_weights_fused_in_inference_mode_can_be_trained(how):
    fast, plain = make(), make().double()
    with torch.inference_mode():
        accelerate(fast, how)
        scores(fast)
    fast.double()
    with torch.inference_mode():
        scores(fast)  # fuses again
    with torch.enable_grad():
        for model in (fast, plain):
            model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def test_threads_that_find_weights_moved_agree():
    fast = accelerate(make("int8"))  # not in Triton's interpreter, which runs one thread only
    wanted, found = scores(fast), []
    fast.to(FP64).float()

    def work() -> None:
        with torch.no_grad():
            found.extend(scores(fast) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and all(torch.equal(ours, wanted) for ours in found)


def test_the_choice_belongs_to_the_model():
    first = LlavaForConditionalGeneration.from_pretrained(BUNDLED, FP32, kernels="torch")
    kinds, ids = [type(module) for module in first.modules()], torch.tensor([[1, 5, 9]])
    wanted = first(ids).logits
    others = [LlavaForConditionalGeneration.from_pretrained(BUNDLED, FP32, kernels=how) for how in ("auto", "triton")]
    assert [type(module) for module in first.modules()] == kinds
    assert torch.equal(first(ids).logits, wanted)
    assert len({tuple(map(type, model.modules())) for model in (first, *others)}) == 3
    for model in others:
        assert_close(model(ids).logits, wanted, atol=1e-3, rtol=1e-3)


def test_without_a_compiler_the_model_stays_plain(monkeypatch):
    def launch(*arguments):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr("kernels.rms_norm.launch", launch)
    model = make()
    with pytest.raises(ValueError, match="Triton cannot run here: Failed to find C compiler"):
        accelerate(model, "triton")
    assert type(model.language_model) is Llama
    assert why_triton_fails(torch.ones(8)) == "Failed to find C compiler."


def test_errors():
    with pytest.raises(ValueError, match="auto, triton or torch, not 'cuda'"):
        accelerate(make(), "cuda")
    with pytest.raises(ValueError, match="float64"):
        accelerate(make().double(), "triton")
    with pytest.raises(ValueError, match="cannot run on meta"):
        accelerate(make().to("meta"), "triton")
    model = make().double()
    assert accelerate(model, "torch") is model and type(model.lm_head) is torch.nn.Linear
