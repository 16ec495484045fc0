"""Prompts and pictures to the model's inputs, against the reference's processor on the bundled checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hub.files import BUNDLED
from hub.settings import known_fields, read_config
from hub.writer import config_json, write_json, write_processor, write_tokenizer
from llava import AutoProcessor, LlavaConfig, LlavaProcessor


@pytest.fixture(scope="module")
def pair():
    return AutoProcessor.from_pretrained(BUNDLED), transformers.AutoProcessor.from_pretrained(BUNDLED, backend="pil")


def picture(seed: int, size: tuple[int, int] = (150, 120)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


BATCHES = {
    "one": ("USER: <image>\nWhat is it? ASSISTANT:", picture(0)),
    "one in a list": (["USER: <image>\nWhat is it? ASSISTANT:"], [picture(0)]),
    "different lengths": (
        ["<image>\nA", "USER: <image>\nWhat is in the picture? ASSISTANT:"],
        [picture(0), picture(1)],
    ),
    "two pictures in one prompt": ("<image>\n<image>\nBoth?", [picture(0), picture(1, (50, 300))]),
    "none, one and two": (["Hello", "<image> x", "<image><image>"], [picture(i) for i in range(3)]),
    "nested lists": (["<image>a", "b <image><image>"], [[picture(0)], [picture(1), picture(2)]]),
    "text only": (["Hello", "Hello there, how are you?"], None),
    "odd": ("<s></s><image>\0 é🤗 <pad>", picture(3)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_inputs_are_the_references(pair, name):
    ours, theirs = pair
    text, images = BATCHES[name]
    our, their = (p(text=text, images=images, padding=True, return_tensors="pt") for p in pair)
    assert set(our) == set(their)
    for key in their:
        assert torch.equal(our[key], their[key]), key
    kept, shown = (p.batch_decode(our.input_ids, skip_special_tokens=False) for p in (theirs, ours))
    assert kept == shown


def test_numbers_of_prompts_and_pictures_must_agree(pair):
    for processor in pair:  # the reference's errors, in our words
        for text, images in (("<image>", None), ("no picture", picture(0)), ("<image>", [picture(0), picture(1)])):
            with pytest.raises(ValueError, match="image"):
                processor(text=text, images=images)
    with pytest.raises(ValueError, match="hold 1 <image> tokens, but 2 images were passed"):
        pair[0](text="<image>", images=[picture(0), picture(1)])


def test_other_plain_errors(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match="padding=True"):
        ours(text=["a", "a longer one"])
    with pytest.raises(ValueError, match="return_tensors"):
        ours(text="a", return_tensors="np")
    with pytest.raises(ValueError, match="Pillow"):
        ours(text="<image>", images="x.jpg")
    with pytest.raises(AttributeError, match="pixel_values"):
        _ = ours(text="a").pixel_values


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((torch.float16,), {}),
        (("cpu", torch.float16), {}),
        ((torch.device("cpu"), torch.float16), {}),
        ((), {"device": "cpu", "dtype": torch.float16}),
        (("cpu",), {"dtype": torch.float16}),
        ((), {"dtype": torch.float16}),
        (("cpu",), {}),
        ((), {"device": "meta"}),
    ],
    ids=str,
)
def test_inputs_move_and_only_pixels_change_their_dtype(pair, args, options):
    for processor in pair:
        inputs = processor(text="<image>", images=picture(0), return_tensors="pt")
        moved = inputs.to(*args, **options)
        assert moved is inputs  # `inputs.to(...)` without an assignment moves them too
        assert moved["input_ids"].dtype == moved["attention_mask"].dtype == torch.int64
        asked = torch.float16 if torch.float16 in (*args, *options.values()) else torch.float32
        assert moved["pixel_values"].dtype == asked
        assert {tensor.device.type for tensor in moved.values()} == {options.get("device", "cpu")}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_side(pair, padding_side):
    for processor in pair:
        processor.tokenizer.padding_side = padding_side
    ours, theirs = (p(text=["a", "one two three"], padding=True, return_tensors="pt").input_ids for p in pair)
    for processor in pair:
        processor.tokenizer.padding_side = "left"
    assert torch.equal(ours, theirs)


def test_the_chat_template_is_the_checkpoints(pair):
    ours, theirs = pair
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    for generation in (False, True):
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=generation)
        assert ours.apply_chat_template(messages, add_generation_prompt=generation) == rendered
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)  # without the generation prompt


@pytest.mark.parametrize("do_pad", [False, True])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_both_layouts_of_the_settings_are_read(pair, tmp_path, do_pad, strategy):
    """Ours (the hub's, two files) and what transformers 5 makes of it (one file)."""
    ours, _ = pair
    config = LlavaConfig(**known_fields(LlavaConfig, read_config(BUNDLED)))
    config = replace(config, vision_feature_select_strategy=strategy)
    image_processor = replace(ours.image_processor, do_pad=do_pad)
    changed = LlavaProcessor(image_processor, ours.tokenizer, config.image_seq_length, "v1")
    write_json(tmp_path / "config.json", config_json(config))
    write_processor(changed, config, tmp_path)
    write_tokenizer(ours.tokenizer, tmp_path)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    image = picture(5, (90, 200))
    expected = theirs(text="<image>", images=image, return_tensors="pt")
    for _ in range(2):
        inputs = LlavaProcessor.from_pretrained(tmp_path)(text="<image>", images=image)
        assert torch.equal(inputs.input_ids, expected.input_ids)
        assert torch.equal(inputs.pixel_values, expected.pixel_values)
        (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
        theirs.save_pretrained(tmp_path)
