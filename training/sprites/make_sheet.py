"""Make sprites/*.webp: a sheet for each style, with a cell for each thing of emoji_world.OBJECTS, in their order.

The drawings come from seven packages; NOTICE names their authors. On Debian, from the root of the repository:

    apt-get install fonts-noto-color-emoji openclipart-png
    npm pack @lobehub/fluent-emoji-3d && npm pack fluentui-emoji && npm pack emojibase-data
    mkdir 3d ui names && tar xzf lobehub-*.tgz -C 3d && tar xzf fluentui-*.tgz -C ui && tar xzf emojibase-*.tgz -C names
    npm pack @iconify-json/emojione @iconify-json/fxemoji @iconify-json/noto-v1
    for s in emojione fxemoji noto-v1; do mkdir -p icons/$s && tar xzf iconify-json-$s-*.tgz -C icons/$s; done
    pip install resvg-py
    python -m training.sprites.make_sheet --noto /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \\
        --fluent 3d/package/assets --svg ui/package/icons --names names/package/en/data.json \\
        --clipart /usr/share/openclipart/png --icons icons

Only the styles whose inputs are given are made, and the sheets of others stay.
"""

import argparse
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from training.emoji_world import CELL, COLUMNS, OBJECTS

HERE = Path(__file__).parent
INPUTS = {
    "noto": "NotoColorEmoji.ttf, the one with bitmaps",
    "fluent": "the folder of Fluent 3D drawings",
    "svg": "the folder with flat/ and modern/; needs --names",
    "names": "emojibase's en/data.json",
    "clipart": "openclipart's folder png/",
    "icons": "the folder with emojione/, fxemoji/ and noto-v1/",
}


def noto_drawing(font: ImageFont.FreeTypeFont, name: str) -> Image.Image:
    drawing = Image.new("RGBA", (136, 128))  # the font's bitmaps have this one size
    ImageDraw.Draw(drawing).text((0, 0), OBJECTS[name], font=font, embedded_color=True)
    return drawing


def fluent_drawing(folder: Path, name: str) -> Image.Image:
    """Files are named by code point; some names add fe0f, which selects the coloured form of an old text symbol."""
    emoji = OBJECTS[name]
    for file in (f"{ord(emoji):x}.webp", f"{ord(emoji):x}-fe0f.webp"):
        if (folder / file).exists():
            return Image.open(folder / file).convert("RGBA")
    raise FileNotFoundError(f"{folder} has no drawing of {emoji}")


def svg_drawing(folder: Path, labels: dict[str, str], name: str) -> Image.Image:
    """Files are named by Unicode's label for the emoji, with -default if there are skin tones."""
    slug = labels[OBJECTS[name]].lower().replace(" ", "-").replace("’", "")
    for file in (f"{slug}.svg", f"{slug}-default.svg"):
        if (folder / file).exists():
            return render(svg_path=str(folder / file))
    raise FileNotFoundError(f"{folder} has no {slug}.svg")


def icon_drawing(icons: dict, picks: dict[str, str], name: str) -> Image.Image | None:
    """A style is one JSON file, in which an icon is what stands inside <svg>."""
    if name not in picks:
        return None
    icon = icons["icons"][picks[name]]
    box = " ".join(str(icon.get(key, icons.get(key, 0))) for key in ("left", "top", "width", "height"))
    return render(svg_string=f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>')


def render(**svg: str) -> Image.Image:
    import resvg_py  # only needed to make the sheets

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(**svg, width=256, height=256)))).convert("RGBA")


def clipart_drawing(folder: Path, picks: dict[str, list[str]], number: int, name: str) -> Image.Image | None:
    files = picks.get(name, [])
    return Image.open(folder / files[number]).convert("RGBA") if number < len(files) else None


def read_labels(file: Path) -> dict[str, str]:
    labels = {}
    for entry in json.loads(file.read_text()):
        for form in filter(None, (entry.get("emoji"), entry.get("text"))):
            labels[form.replace("\ufe0f", "").replace("\ufe0e", "")] = entry["label"]
    return labels


def styles(args: argparse.Namespace) -> dict[str, Callable[[str], Image.Image | None]]:
    """Style -> a function that draws a thing in it, or returns None. Only the styles whose inputs are given."""
    found, picks, icons = {}, *(json.loads((HERE / file).read_text()) for file in ("clipart.json", "iconify.json"))
    if args.noto:
        found["noto"] = partial(noto_drawing, ImageFont.truetype(args.noto, 109))
    if args.fluent:
        found["fluent-3d"] = partial(fluent_drawing, args.fluent)
    if args.svg and args.names:
        labels = read_labels(args.names)
        found |= {f"fluent-{style}": partial(svg_drawing, args.svg / style, labels) for style in ("flat", "modern")}
    if args.clipart:
        found |= {f"clipart-{n + 1}": partial(clipart_drawing, args.clipart, picks, n) for n in range(3)}
    if args.icons:
        for style, chosen in icons.items():
            file = args.icons / style / "package" / "icons.json"
            found[style] = partial(icon_drawing, json.loads(file.read_text()), chosen)
    return found


def fit(drawing: Image.Image, side: int) -> Image.Image:
    """Crop the empty border, so that a size in a scene is that of the visible drawing, and centre it on a square."""
    box = drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 40)).getbbox()
    if box is None:
        raise ValueError("an empty drawing: does the font have this emoji?")
    ink = drawing.crop(box)
    scale = (side - 2) / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


def read_arguments(description: str, required: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    for name, what in INPUTS.items():
        parser.add_argument(f"--{name}", type=Path, required=required, help=what)
    return parser.parse_args()


def main() -> None:
    for style, draw in styles(read_arguments("Make the sprite sheets of emoji_world.py.")).items():
        sheet, drawn = Image.new("RGBA", (COLUMNS * CELL, -(-len(OBJECTS) // COLUMNS) * CELL)), 0
        for i, name in enumerate(OBJECTS):
            if drawing := draw(name):
                sheet.paste(fit(drawing, CELL), (i % COLUMNS * CELL, i // COLUMNS * CELL))
                drawn += 1
        sheet.save(HERE / f"{style}.webp", quality=85, alpha_quality=90, method=6)
        print(f"{style}.webp: {drawn} drawings, {(HERE / f'{style}.webp').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
