"""Outputs, inputs and messages with the interface of transformers."""

from dataclasses import InitVar, dataclass
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor, nn

from hub.settings import require


class ModelOutput(dict):
    """Base of a dataclass of outputs: `out.logits`, `out["logits"]`, or `out[i]` for the i-th one present.

    An output that was not requested is None as an attribute, and is neither counted nor among the keys.
    """

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if value is not None:
            self[name] = value

    def __getitem__(self, key: str | int | slice):
        key = "past_key_values" if key == "cache" else key  # the newer name of the same entry
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        return tuple(self.values())


@dataclass
class LlavaCausalLMOutputWithPast(ModelOutput):
    """What the model returns. Entries that were not requested are None.

    Newer releases of transformers name the cache `cache`, and each picture's vectors image_outputs.pooler_output.
    """

    loss: Tensor | None = None  # one number
    logits: Tensor | None = None  # (B, T, V)
    past_key_values: object | None = None  # a llama.KVCache
    hidden_states: tuple[Tensor, ...] | None = None  # layers + 1 of (B, T, D), the last one after the final norm
    attentions: tuple[Tensor, ...] | None = None  # layers of (B, H, T, S)
    image_hidden_states: Tensor | None = None  # (pictures * P, D), the projector's output
    image_outputs: InitVar[list[Tensor] | None] = None  # the same, (P, D) of each picture

    def __post_init__(self, image_outputs: list[Tensor] | None) -> None:
        vars(self)["cache"] = self.past_key_values  # like image_outputs neither counted nor among the keys
        vars(self)["image_outputs"] = image_outputs and SimpleNamespace(pooler_output=image_outputs)


class Inputs(dict):
    """What the processor returns: tensors by name, as `inputs.input_ids` or `inputs["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(f"there is no {name} here, only {', '.join(self)}")
        return self[name]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Inputs":
        """Move all tensors, in place; only floating-point tensors change their dtype. `to(dtype)` works too."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self.update({k: v.to(device, dtype if v.is_floating_point() else None) for k, v in self.items()})
        return self


def check_one_prompt(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for ids that have no row in the embedding table."""
    if input_ids.shape[1] == 1 and not input_ids.is_cpu:  # generated ids are in range, and a GPU would have to wait
        return
    least, most = input_ids.aminmax()
    if least < 0 or most >= vocab_size:
        raise ValueError(f"the ids {least} to {most} do not fit a vocabulary of {vocab_size}")


def check_pixels(pixel_values: Tensor, config) -> None:
    """Raise ValueError unless the pictures have the shape that a vision tower with these settings expects."""
    channels, side = config.num_channels, config.image_size
    if pixel_values.shape[1:] != (channels, side, side):
        raise ValueError(f"pixel_values are {list(pixel_values.shape)}, not [pictures, {channels}, {side}, {side}]")


def check_image_tokens(is_image: Tensor, image_features: Tensor) -> None:  # (B, T), (pictures * P, D)
    """Raise ValueError unless there is an <image> token for each patch."""
    tokens, n = int(is_image.sum()), len(image_features)
    if tokens != n:
        raise ValueError(f"Image features and image tokens do not match, tokens: {tokens}, features: {n}")


def merge_embedded(model: nn.Module, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
    """The model's merge for a prompt that is already embedded: <image> tokens are recognized by their embedding."""
    image_token = model.config.image_token_index
    if not 0 <= image_token < model.config.vocab_size:
        raise ValueError(f"<image>, token {image_token}, has no embedding: with pixel_values pass input_ids")
    is_image = (inputs_embeds == model.language_model.embed_tokens.weight[image_token]).all(-1)
    check_image_tokens(is_image, image_features)
    return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))


def as_lists(text: str | list[str] | None, images, return_tensors: str) -> tuple[list[str], list[Image.Image]]:
    """The processor's prompts and pictures as two lists. Raises ValueError unless there is an <image> per picture."""
    texts = [text] if isinstance(text, str) else list(text or [])
    pictures = [] if images is None else flatten(images)
    if texts and (tokens := "\n".join(texts).count("<image>")) != len(pictures):
        raise ValueError(f"The prompts hold {tokens} <image> tokens, but {len(pictures)} images were passed")
    require("return_tensors", return_tensors, ("pt",))  # PyTorch tensors
    return texts, pictures


def check_left_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask of a batch of prompts, all ones for None. ValueError unless they are padded on the left."""
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if attention_mask.shape != input_ids.shape or not attention_mask[:, -1].all():
        raise ValueError("attention_mask must have the shape of input_ids and end in ones: pad prompts on the left")
    return attention_mask


def as_layers(layers: int | list[int], n_layers: int, strategy: str) -> list[int]:
    """`layers` as a list. Raises ValueError for hidden states that the tower does not have, or an unknown strategy."""
    layers = [layers] if isinstance(layers, int) else layers
    require("vision_feature_select_strategy", strategy, ("default", "full"))
    if not all(-n_layers - 1 <= layer <= n_layers for layer in layers):
        raise ValueError(f"vision_feature_layer must lie from {-n_layers - 1} to {n_layers}, not {layers}")
    return layers


def parse_messages(messages: list[dict]) -> list[tuple[str, list[dict]]]:
    """The role and the parts of each message. Raises ValueError for messages that a prompt template cannot write."""
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError('messages must be a list of at least one {"role": ..., "content": ...}')
    return [(message.get("role"), parts_of(message)) for message in messages]


def parts_of(message: dict) -> list[dict]:
    role, content = message.get("role"), message.get("content")
    require("a message's role", role, ("system", "user", "assistant"))
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list | tuple):
        raise ValueError(f"a message's content must be a text or a list of parts, not {content!r}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        require("the type of a part of a message", kind, ("image", "text"))
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type text must have a text, not {part.get('text')!r}")
    return content


def flatten(images) -> list[Image.Image]:
    """A picture, or a list of pictures nested to any depth, as one list. Raises ValueError for anything else."""
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, list | tuple):
        return [image for part in images for image in flatten(part)]
    raise ValueError(f"images must be Pillow pictures or lists of them, not {type(images).__name__}")
