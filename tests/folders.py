"""Checkpoint folders for the tests: the reference's, to change or to break; in other layouts; and how loading ends."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import torch
from torch.testing import assert_close

from llava import LlavaForConditionalGeneration
from reference import IMAGE_TOKEN, prompts

# What the prefixes of transformers' names in memory become in the hub's files and in those of LLaVA's authors.
HUB = {
    "model.language_model": "language_model.model",
    "lm_head": "language_model.lm_head",
    "model.vision_tower": "vision_tower.vision_model",
    "model.multi_modal_projector": "multi_modal_projector",
}
AUTHORS = {
    "model.vision_tower": "vision_model",
    "model.multi_modal_projector.linear_1": "model.mm_projector.0",
    "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    "model.language_model": "model",
}
NORM = "language_model.model.norm.weight"


def train_tokenizer(folder: Path) -> bytes:
    prefix = str(folder / "small")
    text = iter(["USER: what is in the picture? ASSISTANT: a cat and a dog on the red mat"] * 20)
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options |= {"model_type": "bpe", "vocab_size": 300, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_prefix=prefix, **options)
    return Path(f"{prefix}.model").read_bytes()


def load(folder, dtype=None):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def logits(model, image_token=IMAGE_TOKEN):
    ids, mask = prompts([9], [1], 16)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    ids = ids.masked_fill(ids == IMAGE_TOKEN, image_token)
    return model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits


def close(ours, theirs, tolerance=2e-4):
    assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def renamed(tensors, prefixes):
    """Each name with the first of the prefixes that it has replaced."""
    old = {name: next((prefix for prefix in prefixes if name.startswith(prefix)), "") for name in tensors}
    return {prefixes.get(old[n], "") + n.removeprefix(old[n]): tensor.clone() for n, tensor in tensors.items()}


def edit_json(path, **changes):
    """Set entries at the top of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(folder, *words):
    """Loading ends in one line that holds `words`."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def hub_cache(monkeypatch, cache, name):
    """The empty snapshot of `name` in a local hub cache, without a network."""
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the network"))
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    return snapshot
