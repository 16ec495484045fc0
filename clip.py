"""CLIP's vision tower: a picture becomes a sequence of vectors.

LLaVA-1.5 uses the pretrained, frozen vision encoder of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020), a
Vision Transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) trained to match pictures with captions.
The picture is cut into square patches, each patch becomes a vector, and transformer layers let the patches exchange
information. One more vector, the class token, stands for the whole picture; CLIP's training compares it with the
caption. LLaVA drops it and uses the output of the second-to-last layer, `hidden_states[-2]`. Its authors suggest that
the last layer represents more global and abstract properties of a picture, and the layer before it more local ones,
which help with details (Liu et al. 2023, https://arxiv.org/abs/2304.08485, section 5.2).

In the six core files "the reference" is Hugging Face transformers and "the hub" is huggingface.co; the folder hub/ is
ours, and can be skipped. Shapes use these letters:

    B batch    T tokens    D width    H heads    K key/value heads    d head width    P patches    V vocabulary

In this file T = 1 + P, the class token first. Not implemented, because LLaVA uses neither: CLIP's text encoder, and the
projection into the space that it shares with the vision tower.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hub.interface import check_pixels
from hub.settings import require


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation of GELU (Hendrycks & Gimpel 2016, section 2) that OpenAI's CLIP uses.

    It differs from the exact GELU by up to 0.02. A tower needs the one it was trained with.
    """
    return x * torch.sigmoid(1.702 * x)


# F.gelu is the exact one, x times the standard normal distribution function at x. LLaVA's projector uses it.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


@dataclass
class CLIPVisionConfig:
    """The tower's sizes: the fields of a checkpoint's config.json, with the reference's defaults for absent ones."""

    hidden_size: int = 768  # D
    intermediate_size: int = 3072  # width inside the MLP
    projection_dim: int = 512  # width of the space shared with text; in the file, but unused by LLaVA
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H
    num_channels: int = 3
    image_size: int = 224  # side of the square input, in pixels
    patch_size: int = 32  # side of a patch, in pixels
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: str = field(default="clip_vision_model", init=False)  # family/ chooses the tower's class by it

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        require("hidden_act", self.hidden_act, ACTIVATIONS)

    @property
    def num_patches(self) -> int:  # P
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:  # T: the patches and the class token
        return self.num_patches + 1


# --- Pictures to pixels ----------------------------------------------------------------------------------------------


@dataclass
class ImageProcessor:
    """A checkpoint's preprocessor_config.json: how a picture becomes the tower's input."""

    size: dict = field(default_factory=lambda: {"shortest_edge": 224})
    crop_size: dict = field(default_factory=lambda: {"height": 224, "width": 224})
    image_mean: list = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])  # red, green, blue
    image_std: list = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    rescale_factor: float = 0.00392156862745098  # 1 / 255 as the reference's files write it
    resample: int = 3  # Pillow's number for bicubic
    do_pad: bool = False  # pad to a square first, as LLaVA-1.5 was trained, instead of cropping the edges away
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def __post_init__(self) -> None:  # older files write a number instead of a dictionary
        if isinstance(self.size, int):
            self.size = {"shortest_edge": self.size}
        if isinstance(self.crop_size, int):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}

    def __call__(self, images: list[Image.Image]) -> Tensor:  # -> (number of pictures, 3, height, width)
        """Normalised pixels in float32, bit-equal to the reference's Pillow path."""
        return torch.stack([torch.from_numpy(self.pixels(image)) for image in images])

    def pixels(self, image: Image.Image) -> np.ndarray:  # -> (3, height, width) in float32
        x = np.asarray(self.fit(image.convert("RGB")))
        if self.do_rescale:  # computed in float64 and rounded once, as the reference does
            x = x.astype(np.float64) * self.rescale_factor
        x = x.astype(np.float32)
        if self.do_normalize:
            x = (x - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return np.ascontiguousarray(x.transpose(2, 0, 1))

    def fit(self, image: Image.Image) -> Image.Image:
        """Pad, resize and crop an RGB picture to what the tower will see, still in 8 bits."""
        if self.do_pad:
            side = max(image.size)  # the padding has the mean colour, which is about 0 after normalisation
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in self.image_mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        width, height = self.crop_size["width"], self.crop_size["height"]
        if self.do_resize:
            if "shortest_edge" in self.size:  # the shorter side gets this length, and the longer one keeps the ratio
                short, edge = min(image.size), self.size["shortest_edge"]
                new_size = tuple(edge if side == short else int(edge * side / short) for side in image.size)
            else:
                new_size = self.size["width"], self.size["height"]
            from hub.strips import resize  # Image.resize, but only of what the crop keeps if the result is huge
            image = resize(image, new_size, self.resample, (width, height) if self.do_center_crop else None)
        if self.do_center_crop:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return image


# --- The Vision Transformer ------------------------------------------------------------------------------------------


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # three (B, H, T, d) -> (B, H, T, d)
    """softmax(q k^T / sqrt(d)) v, for each token a weighted mean over all tokens (Vaswani et al. 2017, equation 1)."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (B, H, T, T), each row sums to 1
    return weights @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # three (B, H, T, d) -> (B, H, T, d)
    """eager_attention as one PyTorch function, which need not store the weights. The model uses it; tests compare."""
    return F.scaled_dot_product_attention(q, k, v)


class CLIPAttention(nn.Module):
    attention = staticmethod(attention)  # an attribute, so that a faster function can replace it

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.n_heads, D = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, d)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attention(q, k, v).transpose(1, 2).flatten(-2))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
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
    """Each patch times one matrix, the class token in front, plus a vector per position (Dosovitskiy 2020, eq. 1)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        D, patch = config.hidden_size, config.patch_size
        # A convolution whose stride equals its kernel size applies one matrix to each patch separately.
        self.patch_embedding = nn.Conv2d(config.num_channels, D, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(D))
        self.position_embedding = nn.Embedding(config.num_positions, D)

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, 3, height, width) -> (B, 1 + P, D)
        patches = self.patch_embedding(pixel_values)  # (B, D, rows, columns)
        patches = patches.flatten(2).transpose(1, 2)  # (B, P, D), row by row
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class CLIPVisionModel(nn.Module):
    """The tower. Modules have the names of the checkpoints' tensors, including the misspelt `pre_layrnorm`."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))
        # LLaVA never runs it (CLIP applies it to the class token), but every checkpoint has its tensors.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, depth: int | None = None) -> list[Tensor]:
        """Run the first `depth` layers (default: all) on pictures (B, 3, image_size, image_size).

        Returns hidden states, (B, 1 + P, D) each: the input of the first layer and the output of each layer that ran.
        """
        check_pixels(pixel_values, self.config)
        x = self.pre_layrnorm(self.embeddings(pixel_values.to(self.pre_layrnorm.weight.dtype)))
        hidden_states = [x]
        for layer in self.encoder.layers[:depth]:
            x = layer(x)
            hidden_states.append(x)
        return hidden_states
