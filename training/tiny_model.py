"""The tiny LLaVA before it has learnt anything: its sizes, its vocabulary and its first weights."""

import io
import random
from dataclasses import replace

import sentencepiece
import torch
from torch import Tensor, nn

from clip import CLIPVisionConfig, ImageProcessor
from llama import LlamaConfig
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from tokenizer import TEMPLATES, Tokenizer
from training import emoji_world
from training.conversations import messages
from training.losses import init_weights
from training.outside import is_outside

SIDE = 112  # pixels
VISION = CLIPVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=3,
    image_size=SIDE,
    patch_size=14,
    hidden_act="gelu",
)
TEXT = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    tie_word_embeddings=True,  # input and output share one table: learning to copy one word transfers to all words
)


def train_tokenizer(scenes: int = 20000) -> Tokenizer:
    """A vocabulary from texts of the emoji world, with Llama's settings: otherwise transformers' ids would differ."""
    rng = random.Random(0)
    text = []
    for i in range(scenes):
        truth = emoji_world.make_truth(i)
        said = messages(emoji_world.conversation(truth, rng, turns=9, outside=is_outside(i)))
        text += [emoji_world.caption(truth, rng), TEMPLATES["v1"].render(said, add_generation_prompt=True)]
    text = [line for part in text for line in part.replace("<image>", "\n").replace("</s>", "\n").split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=1300,  # enough for a token for every word of every name
        byte_fallback=True,  # a character that is not in the vocabulary is spelled in bytes
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        required_chars="".join(map(chr, range(33, 127))),
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def new_processor(tokenizer: Tokenizer) -> LlavaProcessor:
    side = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(ImageProcessor({"shortest_edge": SIDE}, side), tokenizer, VISION.num_patches, "v1")


def new_model(tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
    """The model with random weights, from PyTorch's global random numbers."""
    size = max(tokenizer.special_names) + 1
    text = replace(TEXT, vocab_size=-(-size // 64) * 64)  # rounded up, as in the hub's checkpoints
    model = LlavaForConditionalGeneration(
        # LLaVA reads CLIP's layer -2 (clip.py says why). The loss of our tower reads the patches of the last layer, so
        # the decoder reads them too.
        LlavaConfig(VISION, text, image_token_index=tokenizer.image_token_id, vision_feature_layer=-1)
    )
    init_weights(model)
    # Embeddings that are small compared with what the layers add to them slow down learning to repeat a word.
    nn.init.normal_(model.language_model.embed_tokens.weight, std=0.05)
    # Each layer adds to x, so its last matrix shrinks with the number of layers, as in GPT-2.
    for layer in model.language_model.layers:
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            matrix.data /= (2 * text.num_hidden_layers) ** 0.5
    return model


@torch.no_grad()
def start_projector(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> None:
    """First weights of the projector: standardise the tower's features, and give patches the size of words.

    In the tower a few features grow a hundred times larger than the others, and are the same for all patches. After a
    plain random projector they would hide the features that tell a cat from a dog.
    """
    first, second = model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2
    features = model.vision_tower(pixel_values)[-1][:, 1:].flatten(0, 1)  # (B * P, D), of the layer that is read
    nn.init.normal_(first.weight, std=features.shape[1] ** -0.5)
    first.weight /= features.std(0)
    first.bias.copy_(-first.weight @ features.mean(0))
    words, patches = model.language_model.embed_tokens.weight, model.multi_modal_projector(features)
    second.weight *= words.std() / patches.std()
