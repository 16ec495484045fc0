"""Pictures of every kind become upright, opaque, 8-bit RGB; strips are resized in little memory."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from clip import ImageProcessor
from hub import strips
from hub.pictures import open_image

pytestmark = pytest.mark.quick


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (min(size[1], 64), min(size[0], 64), 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


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
    monkeypatch.setattr(strips, "LARGEST_RESIZE", 0)
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
