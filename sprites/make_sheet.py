"""Makes noto.webp and fluent.webp: one cell for each thing of emoji_world.OBJECTS, in its order, eight to a row.

The drawings come from two packages; NOTICE says whose they are. On Debian, from the root of the repository:

    apt-get install fonts-noto-color-emoji
    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz
    python -m sprites.make_sheet --noto /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf --fluent package/assets
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emoji_world import CELL, COLUMNS, OBJECTS

HERE = Path(__file__).parent


def noto_drawing(font: ImageFont.FreeTypeFont, emoji: str) -> Image.Image:
    drawing = Image.new("RGBA", (136, 128))  # the font's bitmaps have this one size
    ImageDraw.Draw(drawing).text((0, 0), emoji, font=font, embedded_color=True)
    return drawing


def fluent_drawing(folder: Path, emoji: str) -> Image.Image:
    """Files are named by code point; some names add fe0f, which asks for the coloured form of an old text symbol."""
    for file in (f"{ord(emoji):x}.webp", f"{ord(emoji):x}-fe0f.webp"):
        if (folder / file).exists():
            return Image.open(folder / file).convert("RGBA")
    raise FileNotFoundError(f"{folder} has no drawing of {emoji}")


def styles(noto: Path, fluent: Path) -> dict[str, Callable[[str], Image.Image]]:
    return {"noto": partial(noto_drawing, ImageFont.truetype(noto, 109)), "fluent": partial(fluent_drawing, fluent)}


def fit(drawing: Image.Image, side: int) -> Image.Image:
    """Cut the empty border away, so that a size in a scene is the size of the ink, and centre it on a square."""
    box = drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox()
    if box is None:
        raise ValueError("an empty drawing: does the font have this emoji?")
    ink = drawing.crop(box)
    scale = (side - 2) / max(ink.size)
    ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sprite sheets of emoji_world.py.")
    parser.add_argument("--noto", type=Path, required=True, help="NotoColorEmoji.ttf, the one with bitmaps")
    parser.add_argument("--fluent", type=Path, required=True, help="the folder of Fluent 3D drawings")
    args = parser.parse_args()
    rows = -(-len(OBJECTS) // COLUMNS)
    for style, draw in styles(args.noto, args.fluent).items():
        sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
        for i, emoji in enumerate(OBJECTS.values()):
            sheet.paste(fit(draw(emoji), CELL), (i % COLUMNS * CELL, i // COLUMNS * CELL))
        sheet.save(HERE / f"{style}.webp", quality=92, alpha_quality=100, method=6)
        print(f"{style}.webp: {len(OBJECTS)} drawings, {(HERE / f'{style}.webp').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
