"""Other projects open the bundled checkpoint and compute what this one computes. Run by hand, because they are large:

    python3 -m venv /tmp/others && /tmp/others/bin/pip install -qr tests/others/requirements.txt
    /tmp/others/bin/python -m pytest -q -s -m others tests/others

The checkpoint is a fixture for them: a small LLaVA that is trained. Those made for tests usually have random weights.
"""

from importlib.metadata import version

import pytest
import torch
from torch.testing import assert_close

from hub.files import BUNDLED
from hub.pictures import open_image
from llava import LlavaForConditionalGeneration, LlavaProcessor
from tiny_world import ROOT

pytestmark = pytest.mark.others
PICTURES = sorted((ROOT / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def ours():
    return LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, kernels="torch")


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    """A question about each bundled picture, as the model's inputs."""
    processor = LlavaProcessor.from_pretrained(BUNDLED)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return [dict(processor(images=open_image(path), text=prompt)) for path in PICTURES]


def theirs():
    import transformers

    print(f"\ntransformers {version('transformers')}", end=" ")
    return transformers.LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32).eval()


def test_the_newest_transformers_gives_the_same_logits_and_answers(ours, asked):
    model = theirs()
    for inputs in asked:
        assert_close(model(**inputs).logits, ours(**inputs).logits, atol=1e-4, rtol=1e-4)
        answers = [each.generate(**inputs, max_new_tokens=40, do_sample=False) for each in (model, ours)]
        assert answers[0].tolist() == answers[1].tolist()


def test_transformer_lens_gives_the_same_logits_and_sees_inside(ours, asked):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(BUNDLED), dtype=torch.float32)
    for inputs in asked:
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(inputs["input_ids"], pixel_values=inputs["pixel_values"])
        expected = ours(**inputs, output_attentions=True)
        assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
        for layer, weights in enumerate(expected.attentions):
            assert_close(cache[f"blocks.{layer}.attn.hook_pattern"], weights, atol=1e-4, rtol=1e-4)
    print(f"\nTransformerLens {version('transformer-lens')}: {len(cache)} activations in its cache")


def test_peft_adapts_it_and_merges_what_it_learnt(ours, asked):
    import peft

    inputs = asked[0]
    model = peft.get_peft_model(theirs(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = model(**inputs).logits
    assert_close(before, ours(**inputs).logits, atol=1e-4, rtol=1e-4)  # an adapter begins by changing nothing
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted = model.eval()(**inputs).logits
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert_close(model.merge_and_unload()(**inputs).logits, adapted, atol=1e-4, rtol=1e-4)
    print(f"PEFT {version('peft')}")
