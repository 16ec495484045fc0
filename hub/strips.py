"""Very long or very tall pictures, which would take gigabytes if they were resized whole."""

from PIL import Image

LARGEST_RESIZE = 200_000_000  # pixels


def resize(image: Image.Image, size: tuple[int, int], resample: int, crop: tuple[int, int] | None) -> Image.Image:
    """Resize to `size` (width, height); if the result would exceed LARGEST_RESIZE, only its centre `crop`.

    A 5000x1 strip would become 1,680,000x336 pixels only to be cropped. Resizing just the part that the crop keeps, in
    two steps, differs by at most one level from resizing the whole picture.
    """
    width, height = size
    if width * height <= LARGEST_RESIZE or crop is None:
        return image.resize(size, resample)
    keep_w, keep_h = min(width, crop[0]), min(height, crop[1])
    left, top = (width - keep_w) // 2 * image.width / width, (height - keep_h) // 2 * image.height / height
    right, bottom = left + keep_w * image.width / width, top + keep_h * image.height / height
    image = image.resize((keep_w, image.height), resample, box=(left, 0, right, image.height))
    return image.resize((keep_w, keep_h), resample, box=(0, top, keep_w, bottom))
