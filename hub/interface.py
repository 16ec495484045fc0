"""What the interface of transformers expects of outputs, inputs and messages."""

import torch
from PIL import Image
from torch import Tensor


class ModelOutput(dict):
    """Base of a dataclass of outputs: `out.logits`, `out["logits"]`, or `out[i]` for the i-th one present.

    An output that was not asked for is None as an attribute, and is neither counted nor among the keys.
    """

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if value is not None:
            self[name] = value

    def __getitem__(self, key: str | int | slice):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        return tuple(self.values())


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


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for ids that have no row in the embedding table."""
    least, most = input_ids.aminmax()
    if least < 0 or most >= vocab_size:
        raise ValueError(f"the ids {least} to {most} do not fit a vocabulary of {vocab_size}")


def check_left_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask of a batch of prompts, all ones for None. Raises ValueError unless they are padded left."""
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if attention_mask.shape != input_ids.shape or not attention_mask[:, -1].all():
        raise ValueError("attention_mask must have the shape of input_ids and end in ones: pad prompts on the left")
    return attention_mask


def check_feature_choice(layers: list[int], n_layers: int, strategy: str) -> None:
    """Raise ValueError for hidden states that the tower does not have, or an unknown treatment of the class token."""
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy must be default or full, not {strategy!r}")
    if not all(-n_layers - 1 <= layer <= n_layers for layer in layers):
        raise ValueError(f"vision_feature_layer must lie from {-n_layers - 1} to {n_layers}, not {layers}")


def kept_positions(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The index of the positions that go through the head: the last n (0 for all), or a tensor (n,) of positions."""
    if not isinstance(logits_to_keep, Tensor):
        return slice(-logits_to_keep, None)
    if logits_to_keep.ndim != 1:
        shape = list(logits_to_keep.shape)
        raise ValueError(f"logits_to_keep must be a number or a tensor (n,), not of shape {shape}")
    return logits_to_keep


def check_messages(messages: list[dict]) -> list[tuple[str, list[dict]]]:
    """The role and the parts of each message. Raises ValueError for what a prompt template cannot write."""
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError('messages must be a list of at least one {"role": ..., "content": ...}')
    return [(message.get("role"), parts_of(message)) for message in messages]


def parts_of(message: dict) -> list[dict]:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message's role must be system, user or assistant, not {role!r}")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list | tuple):
        raise ValueError(f"a message's content must be a text or a list of parts, not {content!r}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("image", "text"):
            raise ValueError(f"a part of a message must be of type image or text, not {kind!r}")
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
