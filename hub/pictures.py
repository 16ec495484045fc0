"""Odd pictures: any file Pillow reads to upright, opaque, 8-bit RGB; and strips too long to be resized whole."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

LARGEST_RESIZE = 200_000_000  # pixels


def open_image(path: str | Path) -> Image.Image:
    """Read any picture Pillow reads and return it as people see it: upright, opaque, 8-bit RGB.

    The reference only calls `convert("RGB")`, which turns transparent pixels black, ignores the camera's orientation
    and saturates 16-bit pictures. Raises FileNotFoundError, or ValueError if the file is not a complete picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a picture")
    try:
        with Image.open(path) as image:
            image.load()  # the first frame of an animation
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's readers raise a dozen kinds on broken bytes
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if image.mode[0] in "IF":  # more than 8 bits a pixel, which Pillow would clip at 255
        levels = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        tops = [65535] if image.mode.startswith("I;16") else [1, 255, 65535, levels.max()]  # the file does not say
        white = next(top for top in tops if levels.max() <= top)
        image = Image.fromarray(np.rint(levels / white * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image: Image.Image, size: tuple[int, int], resample: int, crop: tuple[int, int] | None) -> Image.Image:
    """Resize to `size` (width, height); a result above LARGEST_RESIZE is cut to its centre `crop` straight away.

    A 5000x1 strip would become 1,680,000x336 pixels only to be cropped. Resizing just the part that the crop keeps, in
    two steps, is within one level of resizing it all.
    """
    width, height = size
    if width * height <= LARGEST_RESIZE or crop is None:
        return image.resize(size, resample)
    keep_w, keep_h = min(width, crop[0]), min(height, crop[1])
    left, top = (width - keep_w) // 2 * image.width / width, (height - keep_h) // 2 * image.height / height
    right, bottom = left + keep_w * image.width / width, top + keep_h * image.height / height
    image = image.resize((keep_w, image.height), resample, box=(left, 0, right, image.height))
    return image.resize((keep_w, keep_h), resample, box=(0, top, keep_w, bottom))


def flatten(images) -> list[Image.Image]:
    """A picture, or a list of pictures nested to any depth, as one list. Raises ValueError for anything else."""
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, list | tuple):
        return [image for part in images for image in flatten(part)]
    raise ValueError(f"images must be Pillow pictures or lists of them, not {type(images).__name__}")
