"""Opens any picture that Pillow can read, as upright, opaque, 8-bit RGB."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def open_image(path: str | Path) -> Image.Image:
    """Read any picture that Pillow can read and return it as people see it: upright, opaque, 8-bit RGB.

    The reference only calls `convert("RGB")`, which turns transparent pixels black, ignores the camera's orientation
    and saturates 16-bit pictures. Raises FileNotFoundError, or ValueError if the file is not a complete picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a picture")
    try:
        with Image.open(path) as image:
            image.load()  # the first frame of an animation
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if image.mode[0] in "IF":  # more than 8 bits per channel, which Pillow would clip at 255
        levels = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        tops = [65535] if image.mode.startswith("I;16") else [1, 255, 65535, levels.max()]  # the file does not say
        white = next(top for top in tops if levels.max() <= top)
        image = Image.fromarray(np.rint(levels / white * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
