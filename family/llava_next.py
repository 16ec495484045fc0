"""LLaVA-1.6 (LLaVA-NeXT, `llava_next`): a picture is cut into tiles, so that small details stay visible.

    picture (H, W) -> best_size      the size (rows * side, columns * side) that fits it best, of those in config.json
                   -> tiles          tile 0: the whole picture, squashed to a square; then those of the grid, row by row
    tile           -> tower, projector, as in LLaVA-1.5                                                  (p * p, D)
    tiles          -> arrange        the grid's patches as one picture, (rows * p, columns * p), without its margins:
                                     (h, w), each row of it followed by the learned vector image_newline (D,)
                   -> tile 0's patches first, then these: p * p + h * w + h vectors, at most 2,928 in the 7B

The number of <image> tokens in a prompt thus depends on the picture's size, and the model needs the sizes: pixel_values
are (pictures, tiles, 3, side, side), with zeros after a picture's last tile, and image_sizes (pictures, 2) are (H, W).

The model and the processor are subclasses of LLaVA-1.5's, which are passed in: nothing here imports llava.py.
Liu et al. 2024, https://llava-vl.github.io/blog/2024-01-30-llava-next/; the tiles: Liu et al. 2023, LLaVA-1.5, section
3.4, https://arxiv.org/abs/2310.03744. Rounding is that of the reference.

    H, W height and width in pixels    rows, columns of tiles    h, w height and width in patches, without margins
    side of a tile in pixels           p patches on a side of a tile    D width of the decoder
"""

import math
import re
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor, nn

from clip import ImageProcessor
from hub.interface import Inputs

MOST_TILES = 100  # in a grid; in the 7B up to 4
MOST_SIZES = 1000


# --- Sizes in pixels, in tiles and in patches -------------------------------------------------------------------------


def check_sizes(config) -> None:
    """Raise ValueError unless a LlavaConfig's image_grid_pinpoints are sizes (H, W) in whole tiles."""
    side, p = config.vision_config.image_size, patches_on_a_side(config)
    sizes = config.image_grid_pinpoints
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= MOST_SIZES:
        raise ValueError(f"image_grid_pinpoints must be a list of 1 to {MOST_SIZES} pairs (height, width)")
    for size in sizes:
        pair = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if not pair or size[0] % side or size[1] % side or size[0] * size[1] > MOST_TILES * side * side:
            wanted = f"(height, width) in multiples of {side}, the tower's image_size, with at most {MOST_TILES} tiles"
            raise ValueError(f"image_grid_pinpoints must be {wanted}, not {str(size)[:40]}")
    if config.image_seq_length != p * p:
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        raise ValueError(f"vision_feature_select_strategy {strategy!r} of a {tower} does not give {p} x {p} patches")


def patches_on_a_side(config) -> int:  # p
    return config.vision_config.image_size // config.vision_config.patch_size


def best_size(height: int, width: int, sizes: list) -> tuple[int, int]:
    """The size (H, W) that shows the most of a picture's pixels; of several, the smallest."""

    def worth(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)  # enlarging shows nothing more
        return shown, -size[0] * size[1]

    return tuple(max(sizes, key=worth))


def margins(height: int, width: int, down: int, across: int) -> tuple[int, int]:
    """How many rows of patches above and below, and columns on the left and right, only show the picture's margins.

    `down` and `across` count the patches of the whole grid.
    """
    if width / height > across / down:
        kept = int(round(height * (across / width), 7))  # 7 digits: a kept row must not be lost to rounding
        return (down - kept) // 2, 0
    kept = int(round(width * (down / height), 7))
    return 0, (across - kept) // 2


def count_tokens(height: int, width: int, config) -> int:
    """How many <image> tokens a picture of this size takes: p * p + h * w + h."""
    side, p = config.vision_config.image_size, patches_on_a_side(config)
    H, W = best_size(height, width, config.image_grid_pinpoints)
    down, across = H // side * p, W // side * p
    above, left = margins(height, width, down, across)
    h, w = down - 2 * above, across - 2 * left
    return p * p + h * w + h


def most_tokens(config) -> int:
    """The <image> tokens of a picture that fills the largest of the sizes."""
    return max(count_tokens(*size, config) for size in config.image_grid_pinpoints)


# --- Pictures to tiles ------------------------------------------------------------------------------------------------


@dataclass
class LlavaNextImageProcessor(ImageProcessor):
    """Cuts a picture into tiles. Each tile becomes pixels as a whole picture does in LLaVA-1.5."""

    config: object = None  # a LlavaConfig, which has the sizes

    def __post_init__(self) -> None:
        super().__post_init__()
        self.do_pad = False  # in LLaVA-1.6's files it means the zeros after the last tile

    @classmethod
    def of(cls, plain: ImageProcessor, config) -> "LlavaNextImageProcessor":
        """The settings of a checkpoint's files and its LlavaConfig together. Raises ValueError if they do not fit."""
        check_sizes(config)
        side = config.vision_config.image_size
        if (plain.crop_size["height"], plain.crop_size["width"]) != (side, side):
            raise ValueError(f"crop_size must be {side} x {side}, the size of a tile, not {plain.crop_size}")
        return cls(**vars(plain), config=config)

    def tiles(self, image: Image.Image) -> list[Image.Image]:
        """The whole picture as a square, and the tiles of its grid, black where the picture does not reach."""
        image, side = image.convert("RGB"), self.config.vision_config.image_size
        H, W = best_size(image.height, image.width, self.config.image_grid_pinpoints)
        scale_w, scale_h = W / image.width, H / image.height
        if scale_w < scale_h:
            w, h = W, min(math.ceil(image.height * scale_w), H)
        else:
            w, h = min(math.ceil(image.width * scale_h), W), H
        canvas = Image.new("RGB", (W, H))
        canvas.paste(image.resize((w, h), self.resample), ((W - w) // 2, (H - h) // 2))
        corners = [(left, top) for top in range(0, H, side) for left in range(0, W, side)]
        edge = self.size.get("shortest_edge", 0)
        whole = image.resize((self.size.get("width", edge), self.size.get("height", edge)), self.resample)
        return [whole, *(canvas.crop((left, top, left + side, top + side)) for left, top in corners)]

    def __call__(self, images: list[Image.Image]) -> Tensor:  # -> (pictures, tiles, 3, side, side)
        pictures = [super(LlavaNextImageProcessor, self).__call__(self.tiles(image)) for image in images]
        return nn.utils.rnn.pad_sequence(pictures, batch_first=True)


# --- The subclasses ---------------------------------------------------------------------------------------------------


class NextProcessor:
    """The parts of a LlavaProcessor that LLaVA-1.6 changes."""

    def __init__(self, image_processor: LlavaNextImageProcessor, tokenizer, image_seq_length: int, template="hub"):
        super().__init__(image_processor, tokenizer, most_tokens(image_processor.config), template)

    def expand(self, prompts: list[str], pictures: list[Image.Image]) -> list[str]:
        """Repeat each <image> token once per vector of its picture. Tokens and pictures are in the same order.

        Raises ValueError if the numbers of tokens and pictures differ.
        """
        if (tokens := sum(prompt.count("<image>") for prompt in prompts)) != len(pictures):
            raise ValueError(f"the prompts have {tokens} <image> tokens, but the number of pictures is {len(pictures)}")
        config = self.image_processor.config
        counts = iter([count_tokens(picture.height, picture.width, config) for picture in pictures])
        return [re.sub("<image>", lambda _: "<image>" * next(counts), prompt) for prompt in prompts]

    def encode_pictures(self, pictures: list[Image.Image]) -> Inputs:
        sizes = torch.tensor([(picture.height, picture.width) for picture in pictures])
        return Inputs(pixel_values=self.image_processor(pictures), image_sizes=sizes)


class NextModel:
    """The parts of a LlavaForConditionalGeneration that LLaVA-1.6 changes."""

    def __init__(self, config):
        check_sizes(config)
        super().__init__(config)
        self.most_image_tokens = most_tokens(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))

    def get_image_features(
        self, pixel_values: Tensor, vision_feature_layer=None, vision_feature_select_strategy=None, image_sizes=None
    ) -> list[Tensor]:  # (pictures, tiles, 3, side, side), sizes (pictures, 2) -> (p * p + h * w + h, D) of each
        sizes, grids = self.sizes_and_grids(pixel_values, image_sizes)
        counts = [1 + rows * columns for rows, columns in grids]
        tiles = torch.cat([picture[:count] for picture, count in zip(pixel_values, counts, strict=True)])
        features = super().get_image_features(tiles, vision_feature_layer, vision_feature_select_strategy)
        if features.shape[1] != patches_on_a_side(self.config) ** 2:
            raise ValueError("vision_feature_select_strategy does not give one vector for each patch of a tile")
        return [self.arrange(*each) for each in zip(features.split(counts), sizes, grids, strict=True)]

    def sizes_and_grids(self, pixel_values: Tensor, image_sizes: Tensor | None) -> tuple[list, list]:
        """Each picture's (H, W) in pixels, and its grid's (rows, columns) of tiles. ValueError if they do not fit."""
        if image_sizes is None:
            raise ValueError("LLaVA-1.6 needs image_sizes with pixel_values: the height and width of each picture")
        image_sizes, side = torch.as_tensor(image_sizes), self.config.vision_config.image_size
        if pixel_values.ndim != 5 or image_sizes.shape != (len(pixel_values), 2):
            shapes = f"{list(pixel_values.shape)} and {list(image_sizes.shape)}"
            wanted = f"[pictures, tiles, 3, {side}, {side}] and [pictures, 2]"
            raise ValueError(f"pixel_values and image_sizes are {shapes}, not {wanted}")
        sizes = image_sizes.tolist()
        if image_sizes.is_floating_point() or min(map(min, sizes)) < 1:
            raise ValueError(f"image_sizes must be whole numbers of at least 1, not {sizes}")
        pinpoints = self.config.image_grid_pinpoints
        grids = [tuple(n // side for n in best_size(*size, pinpoints)) for size in sizes]
        if (most := max(1 + rows * columns for rows, columns in grids)) > pixel_values.shape[1]:
            raise ValueError(f"pixel_values have {pixel_values.shape[1]} tiles for each picture, but one needs {most}")
        return sizes, grids

    def arrange(self, tiles: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """A picture's tiles (1 + rows * columns, p * p, D) as one sequence: the whole picture, then its grid."""
        whole, p = tiles[0], patches_on_a_side(self.config)
        x = tiles[1:].unflatten(0, grid).unflatten(2, (p, p))  # (rows, columns, p, p, D)
        x = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows * p, columns * p, D)
        above, left = margins(*size, *x.shape[:2])
        x = x[above : x.shape[0] - above, left : x.shape[1] - left]  # (h, w, D)
        newline = self.image_newline.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([whole, torch.cat([x, newline], dim=1).flatten(0, 1)])


@cache
def next_class(Plain: type) -> type:
    """The subclass of a LlavaForConditionalGeneration or a LlavaProcessor for LLaVA-1.6.

    They are named LlavaNextForConditionalGeneration and LlavaNextProcessor.
    """
    if issubclass(Plain, NextModel | NextProcessor):
        return Plain
    Changes = NextModel if issubclass(Plain, nn.Module) else NextProcessor
    return type(Plain.__name__.replace("Llava", "LlavaNext"), (Changes, Plain), {"__doc__": Changes.__doc__})
