"""Pictures to pixels, bit for bit as the reference's Pillow path; and the tower."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from clip import ImageProcessor

pytestmark = pytest.mark.parity
SIZES = [(640, 480), (333, 500), (1, 1), (1, 1000), (337, 336), (336, 337), (4000, 3), (101, 99), (2500, 2000)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (min(size[1], 64), min(size[0], 64), 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("side", [336, 112, 30])
def test_cropped_pixels_are_bit_equal(size, side):
    square = {"height": side, "width": side}
    reference = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    theirs = reference(noise(size), return_tensors="pt")["pixel_values"]
    ours = ImageProcessor(size={"shortest_edge": side}, crop_size=side)([noise(size)])
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (101, 98), (1, 50), (64, 64)], ids=str)
def test_padded_pixels_are_bit_equal(size):
    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_pad": True}
    theirs = LlavaImageProcessorPil(**settings)(noise(size), return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageProcessor(**settings)([noise(size)]), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 40, "width": 50}, "do_center_crop": False},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 30, "width": 36}},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 30, "width": 31}},
        {"do_resize": False, "crop_size": {"height": 30, "width": 30}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]},
    ],
    ids=str,
)
def test_settings_of_preprocessor_config(settings):
    theirs = CLIPImageProcessorPil(**settings)(noise((90, 71)), return_tensors="pt")["pixel_values"]
    assert_close(ImageProcessor(**settings)([noise((90, 71))]), theirs, atol=0, rtol=0)


def test_a_picture_in_another_mode_is_converted_as_the_reference_does():
    image = noise((60, 60)).convert("L")
    theirs = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageProcessor()([image]), theirs)
