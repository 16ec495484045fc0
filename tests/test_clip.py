"""Pictures to pixels, bit for bit as the reference's Pillow path, and people's pictures of every kind."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import clip
from clip import ImageProcessor, open_image

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


def test_long_strips_are_resized_in_little_memory(monkeypatch):
    largest = 0
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for size in [(5000, 1), (1, 5000)]:
        strip = noise((64, 1)).resize(size) if size[0] > 1 else noise((1, 64)).resize(size)
        pixels = ImageProcessor({"shortest_edge": 336}, 336)([strip])
        assert pixels.shape == (1, 3, 336, 336)
        middle = np.asarray(strip).reshape(-1, 3)[2499:2501].mean(0) / 255
        seen = pixels[0].mean((1, 2)) * torch.tensor([0.26862954, 0.26130258, 0.27577711])
        seen = seen + torch.tensor([0.48145466, 0.4578275, 0.40821073])
        assert_close(seen, torch.tensor(middle, dtype=torch.float32), atol=0.05, rtol=0)
    assert largest < 20_000_000


@pytest.mark.parametrize("size", [(3000, 40), (37, 2000)], ids=str)
def test_resizing_in_two_steps_is_within_one_level(monkeypatch, size):
    processor = ImageProcessor({"shortest_edge": 100}, 100)
    plain = np.asarray(processor.fit(noise(size))).astype(int)
    monkeypatch.setattr(clip, "LARGEST_RESIZE", 0)
    steps = np.asarray(processor.fit(noise(size))).astype(int)
    assert np.abs(plain - steps).max() <= 1


# --- open_image ------------------------------------------------------------------------------------------------------


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 3 + [9, 8, 7] * 253)
    palette.save(tmp_path / "c.png", transparency=3)
    assert open_image(tmp_path / "c.png").getpixel((0, 0)) == (255, 255, 255)


def test_phone_pictures_stand_upright(tmp_path):
    upright = noise((30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.parametrize(
    ("levels", "suffix"),
    [
        (np.array([[0, 257 * 100, 65535]], np.uint16), "png"),
        (np.array([[0, 257 * 100, 65535]], np.int32), "tiff"),
        (np.array([[0, 100, 255]], np.int32), "tiff"),
        (np.array([[0, 100 / 255, 1]], np.float32), "tiff"),
        (np.array([[0, 1e6, 2.55e6]], np.float32), "tiff"),
    ],
    ids=["16-bit", "32-bit", "8-bit-in-32", "fractions", "floats"],
)
def test_more_than_eight_bits_are_scaled_not_clipped(tmp_path, levels, suffix):
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    assert np.asarray(open_image(tmp_path / f"a.{suffix}"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = noise((20, 20)).convert("L" if mode in "IF" else "RGB").convert(mode)
    image.save(tmp_path / "a.tiff")
    opened = open_image(tmp_path / "a.tiff")
    assert (opened.mode, opened.size) == ("RGB", (20, 20))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_what_is_not_a_picture_is_one_plain_error(tmp_path, monkeypatch):
    noise((20, 20)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for name, content in [("empty", b""), ("text", b"hello"), ("half", whole[: len(whole) // 2])]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            open_image(tmp_path / name)
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="not a file"):
            open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"a\.png"):
        open_image(tmp_path / "a.png")


# --- The tower -------------------------------------------------------------------------------------------------------


def test_the_formula_and_pytorchs_function_agree():
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind()
    fast = clip.attention(q, k, v)
    assert_close(clip.attention(q.requires_grad_(), k, v), fast)


def test_the_tower_stops_where_llava_reads():
    tower = clip.CLIPVisionModel(clip.CLIPVisionConfig(32, 48, 32, 4, 4, image_size=28, patch_size=7))
    ran = []
    for i, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    assert len(tower(torch.zeros(1, 3, 28, 28), depth=3)) == 4
    assert ran == [0, 1, 2]


def test_pictures_of_another_size_are_refused():
    tower = clip.CLIPVisionModel(clip.CLIPVisionConfig(32, 48, 32, 4, 4, image_size=28, patch_size=7))
    with pytest.raises(ValueError, match="28, 28"):
        tower(torch.zeros(1, 3, 30, 30))
