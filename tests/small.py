"""A small LLaVA of random weights with the bundled tokenizer: it answers in words, and never produces an eos token."""

import torch

from clip import ImageProcessor
from hub.files import BUNDLED, SPACE
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
