"""Make photographs/sheet.webp: photographs and abstract pictures, material for random crops outside the emoji world.

The pictures come from five packages; NOTICE names their authors and licences. On Debian 12, from the root of the
repository:

    mkdir pictures && cd pictures
    apt-get download gnome-backgrounds mate-backgrounds plasma-workspace-wallpapers
    for package in *.deb; do dpkg -x "$package" .; done
    pip download --no-deps scikit-image==0.26.0 scikit-learn==1.9.1
    for wheel in *.whl; do unzip -q "$wheel"; done
    pip install resvg-py && cd ..
    python -m training.photographs.make_sheet pictures
"""

import argparse
import io
from pathlib import Path

from PIL import Image, ImageOps

SIDE, COLUMNS = 256, 8  # the sheet is that of NOTICE: 8 pictures a row, each 256x256
HERE = Path(__file__).parent
GNOME, MATE = "usr/share/backgrounds/gnome/{}", "usr/share/backgrounds/mate/{}"
PLASMA = "usr/share/wallpapers/{}/contents/images/"

# (path, names), in the order of the sheet, which is that of their licences: public domain, then CC BY, CC BY-SA,
# LGPL and GPL.
PICTURES = (
    ("skimage/data/{}.png", "astronaut camera coins text brick gravel"),
    ("skimage/data/{}.jpg", "hubble_deep_field retina"),
    ("sklearn/datasets/images/{}.jpg", "china flower"),
    (GNOME, "oceans.svg blobs-l.svg drool-l.svg adwaita-l.webp grid-l.webp wood-l.webp"),
    (MATE, "desktop/Ubuntu-Mate-Warm-no-logo.png"),
    (PLASMA + "5120x2880.png", "Altai IceCold Kay MilkyWay Patak"),
    (PLASMA + "5120x2880.jpg", "Flow Honeywave Shell Volna"),
    (PLASMA + "3840x2160.png", "Canopee Cascade Cluster Kokkini"),
    (PLASMA + "3200x2000.jpg", "PastelHills"),
    (PLASMA + "2560x1600.jpg", "Autumn BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey"),
    (PLASMA + "2560x1600.jpg", "Kite OneStandsOut Path summer_1am"),
    (MATE, "abstract/Elephants.jpg nature/Aqua.jpg nature/Blinds.jpg nature/Dune.jpg nature/FreshFlower.jpg"),
    (MATE, "nature/Garden.jpg nature/GreenMeadow.jpg nature/LadyBird.jpg nature/RainDrops.jpg nature/Storm.jpg"),
    (MATE, "nature/TwoWings.jpg nature/Wood.jpg nature/YellowFlower.jpg"),
)


def read_picture(file: Path) -> Image.Image:
    if file.suffix == ".svg":
        import resvg_py  # only needed to make the sheet

        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(file), width=1024)))).convert("RGB")
    return Image.open(file).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sheet of photographs and abstract pictures.")
    parser.add_argument("folder", type=Path, help="the folder in which the packages were unpacked")
    folder = parser.parse_args().folder
    files = [folder / path.format(name) for path, names in PICTURES for name in names.split()]
    sheet = Image.new("RGB", (COLUMNS * SIDE, -(-len(files) // COLUMNS) * SIDE))
    for i, file in enumerate(files):
        square = ImageOps.fit(read_picture(file), (SIDE, SIDE), Image.Resampling.LANCZOS)  # the central square
        sheet.paste(square, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    sheet.save(HERE / "sheet.webp", quality=90, method=6)
    print(f"sheet.webp: {len(files)} pictures, {(HERE / 'sheet.webp').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
