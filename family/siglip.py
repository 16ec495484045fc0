"""SigLIP's vision tower (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).

It is the Vision Transformer of CLIP with three differences: no class token, no norm in front of the first layer, and
a bias in the patch embedding. LLaVA uses the output of its last or second-to-last layer. Pictures are resized to a
square without keeping the ratio, and not cropped (hub/processor_settings.py).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clip import CLIPMLP, CLIPLayer, CLIPVisionConfig
from hub.interface import check_pixels


@dataclass
class SiglipVisionConfig(CLIPVisionConfig):
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True  # whether the file has the pooling head, which LLaVA never runs
    model_type: str = field(default="siglip_vision_model", init=False)

    @property
    def num_positions(self) -> int:
        return self.num_patches


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, 3, height, width) -> (B, P, D)
        patches = self.patch_embedding(pixel_values)  # (B, D, rows, columns)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipHead(nn.Module):
    """SigLIP's pooling head, which turns a picture into one vector to compare with a text's. It is never run here."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        D = config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, D))
        self.attention = nn.MultiheadAttention(D, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)


class SiglipVisionModel(nn.Module):
    """The tower, with the interface of clip.CLIPVisionModel."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # in the file, but not run
        if config.vision_use_head:
            self.head = SiglipHead(config)

    def forward(self, pixel_values: Tensor, depth: int | None = None) -> list[Tensor]:
        """Run the first `depth` layers (default: all) on pictures (B, 3, image_size, image_size).

        Returns hidden states, (B, P, D) each: the input of the first layer and the output of each layer that ran.
        """
        check_pixels(pixel_values, self.config)
        x = self.embeddings(pixel_values.to(self.post_layernorm.weight.dtype))
        hidden_states = [x]
        for layer in self.encoder.layers[:depth]:
            x = layer(x)
            hidden_states.append(x)
        return hidden_states
