"""CLIP's vision tower: a picture becomes a row of vectors.

LLaVA-1.5 does not train its own eyes. It takes those of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020), a
Vision Transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) that was trained to match pictures with
their captions. The picture is cut into square patches, every patch becomes a vector, and a stack of transformer layers
lets the patches look at each other. LLaVA reads the vectors one layer before the last, which its authors measured to be
better; they suppose that these hold more local detail, and the last more of the whole (https://arxiv.org/abs/2304.08485).

In every file, "the reference" is Hugging Face transformers, "the hub" is huggingface.co, and shapes have these letters:

    B batch    T tokens    D width    H heads    K key/value heads    d width of a head    P patches    V vocabulary

Here a picture is a row of T = 1 + P tokens, the class token first.

Left out: CLIP's text tower and its final projection. LLaVA uses neither.
"""

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

import kernels  # for a GPU; elsewhere usable() is False, and the plain line below it is all there is

LARGEST_RESIZE = 200_000_000  # pixels; of a larger result only what the crop keeps is computed, which is not bit-equal


def known_fields(cls: type, settings: dict) -> dict:
    """Keep the entries of a checkpoint's JSON that `cls` has a field for: files carry many that no model reads."""
    return {f.name: settings[f.name] for f in fields(cls) if f.init and f.name in settings}


@dataclass
class CLIPVisionConfig:
    """The tower's sizes, with the field names and defaults of a checkpoint's config.json."""

    hidden_size: int = 768  # D
    intermediate_size: int = 3072  # width inside the MLP
    projection_dim: int = 512  # width of CLIP's shared space; kept for the file, LLaVA never projects there
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H
    num_channels: int = 3
    image_size: int = 224  # side of the square the tower sees, in pixels
    patch_size: int = 32  # side of a patch, in pixels
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: str = field(default="clip_vision_model", init=False)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown: it must be one of {', '.join(ACTIVATIONS)}")

    @property
    def num_patches(self) -> int:  # P
        return (self.image_size // self.patch_size) ** 2


# --- From a file to pixels -------------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Image.Image:
    """Read any picture Pillow reads and return it as people see it: upright, opaque, 8-bit RGB.

    The reference only calls `convert("RGB")`, which turns transparent pixels black, lays phone pictures on their side
    and saturates 16-bit ones. Raises FileNotFoundError, or ValueError for a file that is not a whole picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a picture")
    try:
        with Image.open(path) as image:
            image.load()  # an animated picture gives its first frame
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's readers raise a dozen kinds on broken bytes
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if image.mode[0] in "IF":  # more than 8 bits a pixel, which Pillow would clip at 255
        levels = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        tops = [65535] if image.mode.startswith("I;16") else [1, 255, 65535, levels.max()]  # the others do not say
        white = next(top for top in tops if levels.max() <= top)
        image = Image.fromarray(np.rint(levels / white * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class ImageProcessor:
    """A checkpoint's preprocessor_config.json: how a picture becomes the tower's pixels."""

    size: dict = field(default_factory=lambda: {"shortest_edge": 224})
    crop_size: dict = field(default_factory=lambda: {"height": 224, "width": 224})
    image_mean: list = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    rescale_factor: float = 0.00392156862745098  # 1 / 255 as the reference's files write it
    resample: int = 3  # Pillow's number for bicubic
    do_pad: bool = False  # pad to a square before resizing, as LLaVA-1.5 was trained, instead of losing the edges
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.size, int):  # both spellings are in use
            self.size = {"shortest_edge": self.size}
        if isinstance(self.crop_size, int):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}

    def __call__(self, images: list[Image.Image]) -> Tensor:  # -> (number of pictures, 3, height, width)
        """Bit-equal to the reference's Pillow path, float32."""
        return torch.stack([torch.from_numpy(self.pixels(image)) for image in images])

    def pixels(self, image: Image.Image) -> np.ndarray:  # -> (3, height, width)
        image = self.fit(image.convert("RGB"))
        x = np.asarray(image)
        if self.do_rescale:  # in float64 and then rounded once, as the reference does
            x = x.astype(np.float64) * self.rescale_factor
        x = x.astype(np.float32)
        if self.do_normalize:
            x = (x - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return np.ascontiguousarray(x.transpose(2, 0, 1))

    def fit(self, image: Image.Image) -> Image.Image:
        """The picture as the tower will see it: padded, resized and cropped, still 8-bit RGB."""
        if self.do_pad:
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in self.image_mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.do_resize:
            image = self.resize(image)
        if self.do_center_crop:
            width, height = self.crop_size["width"], self.crop_size["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return image

    def resize(self, image: Image.Image) -> Image.Image:
        if "shortest_edge" in self.size:
            short, edge = min(image.size), self.size["shortest_edge"]
            width, height = (edge if side == short else int(edge * side / short) for side in image.size)
        else:
            width, height = self.size["width"], self.size["height"]
        if width * height <= LARGEST_RESIZE or not self.do_center_crop:
            return image.resize((width, height), self.resample)
        # A 5000x1 strip would become 1,680,000x336 only to lose its ends again: resize just the part that is kept.
        keep_w, keep_h = min(width, self.crop_size["width"]), min(height, self.crop_size["height"])
        left, top = (width - keep_w) // 2 * image.width / width, (height - keep_h) // 2 * image.height / height
        right, bottom = left + keep_w * image.width / width, top + keep_h * image.height / height
        image = image.resize((keep_w, image.height), self.resample, box=(left, 0, right, image.height))
        return image.resize((keep_w, keep_h), self.resample, box=(0, top, keep_w, bottom))


# --- The Vision Transformer ------------------------------------------------------------------------------------------


def quick_gelu(x: Tensor) -> Tensor:
    """Approximates GELU, up to 0.02 off (Hendrycks & Gimpel 2016, section 2). A tower needs the one it learnt with."""
    return x * torch.sigmoid(1.702 * x)


# F.gelu is the exact one, x times the normal distribution function (Hendrycks & Gimpel 2016); the projector uses it.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # three (B, H, T, d) -> (B, H, T, d)
    """softmax(q k^T / sqrt(d)) v: every token takes a mean over all tokens, weighted by how well they match.

    Vaswani et al. 2017, equation 1.
    """
    if q.requires_grad and q.device.type == "cpu":  # the formula as it stands; for a tiny tower the faster to train
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (B, H, T, T), each row sums to 1
        return weights @ v
    if kernels.usable(q):
        return kernels.attention(q, k, v, causal=False)
    return F.scaled_dot_product_attention(q, k, v)  # the same without holding the T x T weights


class CLIPAttention(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.n_heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, d)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(-2))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class CLIPEmbeddings(nn.Module):
    """Pictures to patch vectors: each patch through one linear map, a class token in front, positions added."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        # A convolution whose stride is its kernel is one matrix applied to every patch by itself.
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Embedding(1 + config.num_patches, width)

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, 3, height, width) -> (B, 1 + P, D)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, P, D)
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class CLIPVisionModel(nn.Module):
    """The tower. Its modules are named as the checkpoints name them, `pre_layrnorm` with its famous typo included."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))
        # Read only where a tower is trained (losses.ContrastiveLoss); LLaVA keeps it so that a checkpoint stays whole.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, depth: int | None = None) -> list[Tensor]:
        """Run the first `depth` layers (all by default) on pixel_values (B, 3, image_size, image_size).

        Returns depth + 1 hidden states of (B, 1 + P, D): before the first layer, then after each. Raises ValueError for
        pictures of another size, which would need other position vectors.
        """
        channels, side = self.config.num_channels, self.config.image_size
        if pixel_values.shape[1:] != (channels, side, side):
            raise ValueError(f"pixel_values are {list(pixel_values.shape)}, not [pictures, {channels}, {side}, {side}]")
        x = self.pre_layrnorm(self.embeddings(pixel_values.to(self.pre_layrnorm.weight.dtype)))
        hidden_states = [x]
        for layer in self.encoder.layers[:depth]:
            x = layer(x)
            hidden_states.append(x)
        return hidden_states
