"""A small LLaVA of random weights with the bundled tokenizer: it answers in words, and never produces an eos token.

And an adapter by hand for any LLaVA.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from clip import ImageProcessor
from hub.files import BUNDLED, SPACE
from hub.settings import read_config
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from reference import TEXT, VISION
from tokenizer import Tokenizer


def small(context: int = 200, template: str = "hub", **text) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer = Tokenizer.from_pretrained(BUNDLED)
    text = TEXT | {"vocab_size": max(tokenizer.special_names) + 1, "max_position_embeddings": context} | text
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(VISION, text, image_token_index=tokenizer.image_token_id)).eval()
    model.generation_config = {"eos_token_id": []}
    pieces = [tokenizer.sp.id_to_piece(i) for i in range(tokenizer.sp.vocab_size())]
    words = [i for i, piece in enumerate(pieces) if piece[0] == SPACE and piece[1:].isalpha()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2)
        # The first number of every vector is large, and lowers the score of every token that is not a word.
        model.language_model.embed_tokens.weight[:, 0] = 10
        model.multi_modal_projector.linear_2.bias[0] = 10
        model.language_model.norm.weight[:] = 1
        model.lm_head.weight *= 5
        model.lm_head.weight[:, 0] = -100
        model.lm_head.weight[words, 0] = 0
    return model, LlavaProcessor(ImageProcessor({"shortest_edge": 28}, 28), tokenizer, 16, template)


def write_adapter(folder: Path, base: Path, **whole: torch.Tensor) -> None:
    """An adapter for `base` whose products are zero. `whole`: parameters of the decoder that it replaces."""
    width = read_config(base)["text_config"]["hidden_size"]
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": list(whole)}))
    prefix, q_proj = "base_model.model.model.language_model", "layers.0.self_attn.q_proj"
    tensors = {f"{q_proj}.lora_A": torch.zeros(1, width), f"{q_proj}.lora_B": torch.zeros(width, 1), **whole}
    tensors = {f"{prefix}.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
