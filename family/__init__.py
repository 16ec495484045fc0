"""What checkpoints beyond LLaVA-1.5 need. Each part is imported when a checkpoint's files ask for it."""

from pathlib import Path

from clip import CLIPVisionConfig, CLIPVisionModel
from hub.files import find_checkpoint
from hub.settings import require
from tokenizer import Tokenizer


def vision_classes(model_type: str) -> tuple[type, type]:
    """The classes of a vision tower's settings and of the tower, for a vision_config's model_type."""
    known = ("clip_vision_model", "siglip_vision_model")
    require("vision_config: model_type", model_type or known[0], known)
    if model_type == "siglip_vision_model":
        from family.siglip import SiglipVisionConfig, SiglipVisionModel
        return SiglipVisionConfig, SiglipVisionModel
    return CLIPVisionConfig, CLIPVisionModel


def llava_class(Plain: type, config) -> type:
    """`Plain`, the class of a model or processor, or for LLaVA-1.6 its subclass."""
    if config.image_grid_pinpoints is None:
        return Plain
    from family.llava_next import next_class
    return next_class(Plain)


class AutoTokenizer:
    """`from_pretrained` returns the tokenizer that a checkpoint's files describe."""

    @staticmethod
    def from_pretrained(path: str | Path) -> Tokenizer:
        """`path`: a folder or a hub id."""
        from family.find_tokenizer import find_tokenizer
        return find_tokenizer(find_checkpoint(path))
