"""Looks that artists and pictures differ in. Only training shows them, so that judged scenes stay the same.

A look is a function of a picture and a random stream, and returns a picture of the same size and mode: DRAWING_LOOKS
of a drawing (RGBA), COLOUR_LOOKS of its colours without the transparency (RGB), PICTURE_LOOKS of a whole picture (RGB).
A look changes neither what a thing is nor where it is, so the truth of a scene holds with all of them. Their numbers
of pixels are for pictures with sides of 112.
"""

import io
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

Look = Callable[[Image.Image, random.Random], Image.Image]
DARK, LIGHT = ((0, 0, 0), (24, 24, 60), (70, 40, 20)), ((255, 255, 255), (255, 250, 225), (225, 235, 250))
DISTANCE = Image.radial_gradient("L")  # from the centre


def flat(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Three to five colours."""
    alpha, mean = drawing.getchannel("A"), drawing.resize((1, 1), Image.Resampling.BOX).convert("RGB").getpixel((0, 0))
    colours = Image.new("RGB", drawing.size, mean)  # in place of the black where a drawing is transparent
    colours.paste(drawing, mask=alpha)
    palette = colours.resize((16, 16), Image.Resampling.BOX).quantize(rng.randint(3, 5), Image.Quantize.MEDIANCUT)
    colours = colours.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")
    colours.putalpha(alpha)
    return colours


def line_drawing(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Dark lines around the drawing and where its colours change, on one light colour."""
    ink, paper, alpha = rng.choice(DARK), Image.new("RGB", drawing.size, rng.choice(LIGHT)), drawing.getchannel("A")
    for channels in drawing.convert("RGB"), alpha:
        paper.paste(ink, mask=times(channels.filter(ImageFilter.FIND_EDGES).convert("L"), 2.5))
    paper.putalpha(alpha)
    return paper


def outlined(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """A dark or a light line of one to three pixels around the drawing."""
    pixels, whole = rng.randint(1, 3), Image.new("RGBA", drawing.size, rng.choice(rng.choice((DARK, LIGHT))))
    whole.putalpha(times(drawing.getchannel("A").filter(ImageFilter.BoxBlur(pixels)), 2 * pixels + 1))
    whole.alpha_composite(drawing)
    return whole


def times(mask: Image.Image, factor: float) -> Image.Image:
    return ImageChops.add(mask, mask, scale=2 / factor)  # at most 255


def turned_hue(colours: Image.Image, rng: random.Random) -> Image.Image:
    turn = rng.choice((-1, 1)) * rng.randint(7, 14)  # of 256: 10 to 20 degrees
    hue, *others = colours.convert("HSV").split()
    hue = ImageChops.add_modulo(hue, Image.new("L", hue.size, turn % 256))
    return Image.merge("HSV", (hue, *others)).convert("RGB")


def grayed(colours: Image.Image, rng: random.Random) -> Image.Image:
    return Image.blend(colours.convert("L").convert("RGB"), colours, rng.uniform(0, 0.3))


def posterised(colours: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.posterize(colours, rng.choice((2, 3)))


def contrasted(colours: Image.Image, rng: random.Random) -> Image.Image:
    gray = Image.new("RGB", colours.size, (128, 128, 128))
    return Image.blend(gray, colours, rng.choice((rng.uniform(0.5, 0.8), rng.uniform(1.2, 1.5))))


def textured(colours: Image.Image, rng: random.Random) -> Image.Image:
    """Stripes, blots or grain."""
    width, height = rng.choice(((1, 14), (14, 1), (6, 6), (30, 30), colours.size))
    grain = Image.frombytes("L", (width, height), rng.randbytes(width * height))
    return Image.blend(colours, grain.resize(colours.size).convert("RGB"), rng.uniform(0.08, 0.25))


def lit(picture: Image.Image, rng: random.Random) -> Image.Image:
    gamma, bright = rng.uniform(0.8, 1.25), rng.uniform(0.9, 1.1)
    return picture.point([min(255, 255 * bright * (value / 255) ** gamma) for value in range(256)] * 3)


def vignetted(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Darker towards the corners."""
    strength, distance = rng.uniform(0.15, 0.35), DISTANCE.resize(picture.size, Image.Resampling.NEAREST)
    shade = distance.point(lambda value: strength * value * value / 255)
    return Image.composite(Image.new("RGB", picture.size), picture, shade)


def sharpened(picture: Image.Image, rng: random.Random) -> Image.Image:
    return Image.blend(picture.filter(ImageFilter.SMOOTH), picture, rng.uniform(1.5, 3))


def shrunk(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Drawn with sides of 48 to 96 pixels, and enlarged."""
    share = rng.uniform(48, 96) / 112
    small = picture.resize([round(share * side) for side in picture.size], Image.Resampling.BOX)
    return small.resize(picture.size, rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC)))


def framed(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A bar along one edge, as in a screenshot, or a frame of half its width: at most 6 or 3 % of the side."""
    picture, (width, height), colour = picture.copy(), picture.size, rng.choice(rng.choice((DARK, LIGHT)))
    bar = max(1, int(rng.uniform(0.01, 0.06) * min(width, height)))
    if rng.random() < 0.5:
        ImageDraw.Draw(picture).rectangle((0, 0, width - 1, height - 1), outline=colour, width=max(1, bar // 2))
    else:
        x, y = rng.choice(((0, bar - height), (0, height - bar), (bar - width, 0), (width - bar, 0)))
        picture.paste(colour, (x, y, x + width, y + height))
    return picture


def compressed(picture: Image.Image, rng: random.Random) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=rng.randint(15, 60), subsampling=0)
    return Image.open(file).convert("RGB")


# The chance of each look. At most one of each table occurs: several in a row would leave nothing to recognise.
DRAWING_LOOKS = {flat: 0.04, line_drawing: 0.04, outlined: 0.12}
COLOUR_LOOKS = {turned_hue: 0.08, grayed: 0.05, posterised: 0.05, contrasted: 0.08, textured: 0.08}
PICTURE_LOOKS = {lit: 0.12, vignetted: 0.06, sharpened: 0.06, shrunk: 0.1, framed: 0.06, compressed: 0.12}
TILTED, MARGIN = 0.1, 3  # the chance that a thing is tilted more; pixels around a drawing, for its outline


def vary(picture: Image.Image, chances: dict[Look, float], rng: random.Random, margin: int = 0) -> Image.Image:
    """A picture with one of the looks, after it got a margin of so many pixels, or unchanged."""
    left = rng.random()
    for look, chance in chances.items():
        left -= chance
        if left < 0:
            return look(ImageOps.expand(picture, margin) if margin else picture, rng)
    return picture


def more_tilt(rng: random.Random) -> float:  # degrees
    return rng.uniform(-40, 40) if rng.random() < TILTED else 0
