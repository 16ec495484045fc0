"""Recomputed layers: the same gradients, from fewer tensors kept for the backward pass."""


import pytest
import torch
from safetensors.torch import load_file

from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration
from tiny_world import tiny_world, write_file
from training.lora import Lora, LoraLoss, add_lora, matrices
from training.losses import NextTokenLoss
from training.recompute import recompute_layers
from training.run_stage import Place
from training.tune_adapter import train_adapter


def bundled(bits=None, dropout=None):
    """The bundled model's objective: of full tuning, or with `dropout` of a LoRA whose B is not zero."""
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, quantize=bits, kernels="torch")
    if dropout is None:
        return NextTokenLoss(model).train()
    masks = add_lora(model, Lora(4, 8, dropout))
    with torch.no_grad():
        for i, linear in enumerate(matrices(model).values()):
            linear.lora_B.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    return LoraLoss(model, masks).train()


@pytest.mark.parametrize("bits, dropout", [(None, None), (None, 0.3), ("int8", 0.3), ("int4", 0.3)])
def test_recomputed_layers_have_the_same_gradients_and_keep_less(bits, dropout):
    batch = tiny_world().conversations(range(2))
    if dropout is not None:
        batch["samples"] = torch.arange(2)
    results, kept = [], []
    for recompute in (False, True):
        objective, sizes = bundled(bits, dropout), []
        if recompute:
            recompute_layers(objective.model)
            recompute_layers(objective.model)  # as before each stage of the recipe
        inner = objective.model.config.text_config.intermediate_size
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.shape) or x, lambda x: x):
            loss = objective(batch)
        loss.backward()
        kept.append(sum(shape[-1:] == (inner,) and len(shape) == 3 for shape in sizes))
        results.append([loss, *(p.grad for p in objective.parameters() if p.grad is not None)])
    assert kept[0] > 0 and kept[1] == 0
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_run_with_pieces_and_dropout_ends_with_the_same_adapter(tmp_path):
    """The masks of a piece are computed again from the piece's own sample numbers."""
    data = write_file(tmp_path, 4)
    for name in ("kept", "again"):
        place = Place(tmp_path / name, accumulate=2, recompute=name == "again")
        train_adapter(place, data, None, BUNDLED, 2, 4, 1e-2, 2e-5, Lora(4, 8, dropout=0.3))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "again"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
