"""A checkpoint's processor without its tokenizer: how pictures become pixels, and the prompt template."""

from pathlib import Path

from clip import ImageProcessor
from hub.processor_settings import read_processor_settings
from hub.settings import known_fields
from tokenizer import TEMPLATES, Template, Tokenizer


def read_parts(folder: Path, config, tokenizer: Tokenizer) -> tuple[ImageProcessor, Template]:
    """The image processor and the prompt template. Raises ValueError if the checkpoint's files do not fit together."""
    if tokenizer.image_token_id is None:
        tokenizer.set_image_token(config.image_token_index)
    ours, theirs = tokenizer.image_token_id, config.image_token_index
    if ours != theirs:
        raise ValueError(f"{folder}: <image> is token {ours} for the tokenizer and token {theirs} in config.json")
    settings, template = read_processor_settings(folder)
    side = config.vision_config.image_size
    settings = {"size": {"shortest_edge": side}, "crop_size": side} | settings
    image_processor = ImageProcessor(**known_fields(ImageProcessor, settings))
    if config.image_grid_pinpoints is not None:
        from family.llava_next import LlavaNextImageProcessor

        image_processor = LlavaNextImageProcessor.of(image_processor, config)
        if settings.get("image_grid_pinpoints", config.image_grid_pinpoints) != config.image_grid_pinpoints:
            raise ValueError(f"{folder}: image_grid_pinpoints differ between config.json and the processor's settings")
    return image_processor, find_template(folder, template, tokenizer.special_names.get(theirs, "<image>"))


def find_template(folder: Path, name: str, image_token: str):
    """The checkpoint's own chat template for the name "own", else an entry of tokenizer.TEMPLATES."""
    if name != "own":
        return TEMPLATES[name]
    from family.chat_template import JinjaTemplate
    from hub.chat_template import find_chat_template, special_tokens

    template = JinjaTemplate(find_chat_template(folder), folder, **special_tokens(folder))
    template.image_token = image_token
    return template
