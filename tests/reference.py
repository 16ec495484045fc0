"""The oracle: small random LLaVAs made and saved by Hugging Face transformers, with plain (eager) attention."""

from pathlib import Path

import torch
import transformers

from llava import LlavaForConditionalGeneration

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 300,
}
IMAGE_TOKEN, PAD_TOKEN = 290, 291
TOWERS = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}
DECODERS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}


def reference_model(vision: dict | None = None, text: dict | None = None, spread: float = 0.2, **top):
    """A random LLaVA of transformers in float32. The arguments change its configuration and its weights' spread."""
    vision, text = VISION | (vision or {}), TEXT | (text or {})
    tower, family = TOWERS[vision.pop("model_type", "clip")], DECODERS[text.pop("model_type", "llama")]
    config = transformers.LlavaConfig(
        vision_config=tower(**vision),
        text_config=family(**text),
        **{"image_token_index": IMAGE_TOKEN, "pad_token_id": PAD_TOKEN} | top,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the default spread makes every output nearly the same
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, spread)
    return model


def reference_and_ours(folder: Path, *configuration, **options):
    """The same random model twice: the reference's, and what we load from where it was saved."""
    reference = reference_model(*configuration, **options)
    reference.save_pretrained(folder)
    return reference, LlavaForConditionalGeneration.from_pretrained(folder)


# What newer releases of transformers call the entries of an output.
OLD_NAMES = {"cache": "past_key_values", "image_outputs": "image_hidden_states"}


def image_vectors(found) -> torch.Tensor:
    """(pictures * P, D) of image_hidden_states. In newer releases a list, and second in a tuple's image_outputs."""
    found = found[1] if isinstance(found, tuple) else found
    return found if isinstance(found, torch.Tensor) else torch.cat(found)


def prompts(lengths: list[int], pictures: list[int], patches: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch of random prompts, row i with `lengths[i]` words and `pictures[i]` pictures among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, n in zip(lengths, pictures, strict=True):
        words = torch.randint(3, 280, (length,), generator=generator).tolist()
        rows.append([1, *words[: length // 2], *[IMAGE_TOKEN] * patches * n, *words[length // 2 :]])
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD_TOKEN] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
