"""LLaVA: CLIP's vision tower, Llama's decoder, and a projector of two matrices between them.

    picture -> clip.py -> (P, 1024) patches -> projector -> (P, 4096) vectors  \\
                                                                               merge -> llama.py -> scores of next token
    prompt  -> tokenizer.py -> (T,) ids -> embedding -> (T, 4096) vectors      /

LlavaProcessor repeats the prompt's <image> token once per patch, and the merge replaces the embeddings of these tokens
by the projected patches. To the decoder, patches are like words: they have consecutive positions and the causal mask.
LLaVA: Liu et al. 2023, https://arxiv.org/abs/2304.08485; LLaVA-1.5: Liu et al. 2023, https://arxiv.org/abs/2310.03744.

    B batch    T tokens    D width of the decoder    P patches of a picture    V vocabulary

`python llava.py --image x.jpg` describes a picture. Names are those of transformers; hub/ handles files and settings.
Not implemented: input sizes other than the tower's own.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports prints no traceback; cli resets it

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import generate
from clip import ACTIVATIONS, CLIPVisionConfig, ImageProcessor
from family import AutoTokenizer, llava_class, vision_classes
from hub import interface
from hub.files import find_checkpoint
from hub.generation import read_generation_settings
from hub.settings import as_value_error, decoder_settings, known_fields, read_config, require
from hub.tensors import as_dtype, no_weights
from llama import KVCache, Llama, LlamaConfig
from load_weights import load, our_name
from tokenizer import TEMPLATES, Tokenizer

EXTRA_CAPACITY = 512  # tokens that fit into a cache made by `forward`, beyond those it was called with


@dataclass
class LlavaConfig:
    """A checkpoint's config.json. Without arguments it has the layer sizes of LLaVA-1.5 7B."""

    vision_config: CLIPVisionConfig | dict | None = None  # default: CLIP ViT-L/14 at 336 pixels
    text_config: LlamaConfig | dict | None = None  # default: Llama 7B
    ignore_index: int = -100  # labels with this value do not count in the loss
    image_token_index: int = 32000  # the id of <image>
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: str = "default"  # "default" drops the first token, which is CLIP's class token
    vision_feature_layer: int | list[int] = -2  # the tower's hidden state to use (tiny: -1); several are concatenated
    vocab_size: int = 32000  # always text_config's; files that transformers wrote have it here too
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False  # the head shares the embedding's matrix
    image_grid_pinpoints: list | None = None  # LLaVA-1.6 only: how it cuts pictures into tiles (family/llava_next.py)

    def __post_init__(self) -> None:
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=24,
                num_attention_heads=16, image_size=336, patch_size=14,
            )  # fmt: skip
        elif isinstance(self.vision_config, dict):
            Config, _ = vision_classes(self.vision_config.get("model_type"))
            self.vision_config = Config(**known_fields(Config, self.vision_config))
        if not isinstance(self.text_config, LlamaConfig):
            self.text_config = LlamaConfig(**known_fields(LlamaConfig, decoder_settings(self.text_config or {})))
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.vocab_size = self.text_config.vocab_size
        require("projector_hidden_act", self.projector_hidden_act, ACTIVATIONS)

    @property
    def image_seq_length(self) -> int:  # <image> tokens per picture, or per tile of it
        return self.vision_config.num_positions - (self.vision_feature_select_strategy == "default")


class LlavaMultiModalProjector(nn.Module):
    """Two matrices with a GELU between them, from the tower's width to the decoder's (LLaVA-1.5, section 3.3)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        layers = config.vision_feature_layer
        features = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        D, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(features, D, bias=bias)
        self.linear_2 = nn.Linear(D, D, bias=bias)
        self.activation = ACTIVATIONS[config.projector_hidden_act]

    def forward(self, image_features: Tensor) -> Tensor:  # (pictures, P, features) -> (pictures, P, D)
        return self.linear_2(self.activation(self.linear_1(image_features)))


class LlavaForConditionalGeneration(nn.Module):
    """The whole model: tower, projector, decoder, head. With the default config it computes

        features = multi_modal_projector(vision_tower(pixel_values)[-2][:, 1:])     (pictures, P, D)
        x = language_model.embed_tokens(input_ids), features at <image> tokens      (B, T, D)
        logits = lm_head(language_model(x))                                         (B, T, V)
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.generation_config: dict = {}  # the checkpoint's generation_config.json
        _, Tower = vision_classes(config.vision_config.model_type)  # clip.CLIPVisionModel, or SigLIP's
        self.vision_tower = Tower(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = Llama(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.tie_weights()

    def get_image_features(
        self, pixel_values: Tensor, vision_feature_layer=None, vision_feature_select_strategy=None, image_sizes=None
    ) -> Tensor:  # (pictures, 3, image_size, image_size) -> (pictures, P, D), or P + 1 if the strategy is "full"
        """Encode and project pictures. The tower runs only up to the deepest layer that is used."""
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        n = self.config.vision_config.num_hidden_layers
        layers = interface.as_layers(layers, n, strategy)
        layers = [layer % (n + 1) for layer in layers]  # -2 -> n - 1; state 0: the input, state i: output of i-th layer
        hidden_states = self.vision_tower(pixel_values, depth=max(layers))
        first = 1 if strategy == "default" else 0  # 1 drops the class token
        return self.multi_modal_projector(torch.cat([hidden_states[layer][:, first:] for layer in layers], dim=-1))

    def embed(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        interface.check_ids(input_ids, self.config.vocab_size)
        return self.language_model.embed_tokens(input_ids)

    def merge(self, input_ids: Tensor, image_features: Tensor) -> Tensor:  # (B, T), (pictures * P, D) -> (B, T, D)
        """Embed a prompt and replace the embeddings of its <image> tokens by the projected patches, in order."""
        is_image = input_ids == self.config.image_token_index  # (B, T)
        interface.check_image_tokens(is_image, image_features)
        x = self.embed(input_ids.masked_fill(is_image, 0))  # any id: the table may have no row for <image>
        return x.masked_scatter(is_image[..., None], image_features.to(x.dtype))  # the n-th True gets the n-th patch

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T), one <image> token for every patch
        pixel_values: Tensor | None = None,  # (pictures, 3, image_size, image_size), of all prompts in reading order
        attention_mask: Tensor | None = None,  # (B, S), 0 on padding; S = tokens in the cache + T
        position_ids: Tensor | None = None,  # (B or 1, T)
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,  # (B, T, D), instead of input_ids
        vision_feature_layer: int | list[int] | None = None,  # instead of the config's
        vision_feature_select_strategy: str | None = None,  # instead of the config's
        labels: Tensor | None = None,  # (B, T): ids to predict, not shifted; ignore_index: not in the loss
        use_cache: bool | None = None,  # None: yes, but not in training
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        logits_to_keep: int | Tensor = 0,  # positions that get logits: the last n (0: all), or a tensor (n,)
        image_sizes: Tensor | None = None,  # (pictures, 2), height and width in pixels; only LLaVA-1.6 needs them
        cache: KVCache | None = None,  # the newer name of past_key_values
    ) -> interface.LlavaCausalLMOutputWithPast | tuple:
        """Scores for the next token at each position. With a cache, only the new tokens are passed."""
        interface.check_one_prompt(input_ids, inputs_embeds)
        pictures = features = None
        if pixel_values is not None and len(pixel_values):
            options = vision_feature_layer, vision_feature_select_strategy, image_sizes
            pictures = [*self.get_image_features(pixel_values, *options)]  # (P, D) each
            features = torch.cat(pictures)  # (pictures * P, D)
        if inputs_embeds is not None:
            x = inputs_embeds if features is None else interface.merge_embedded(self, inputs_embeds, features)
        else:
            x = self.embed(input_ids) if features is None else self.merge(input_ids, features)
        cache = past_key_values if cache is None else cache
        if cache is None and (use_cache or (use_cache is None and not self.training)):
            cache = self.language_model.new_cache(len(x), x.shape[1] + EXTRA_CAPACITY)
        hidden_states = [] if output_hidden_states else None
        attentions = [] if output_attentions else None
        x = self.language_model(x, attention_mask, position_ids, cache, hidden_states, attentions)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0: slice(0, None)
        logits = self.lm_head(x[:, kept])
        out = interface.LlavaCausalLMOutputWithPast(
            loss=None if labels is None else self.loss(logits, labels),
            logits=logits,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            image_hidden_states=features,
            image_outputs=pictures,
        )
        return out if return_dict else out.to_tuple()

    def step(self, input_ids: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:  # (B,), (B, 1) -> (B, V)
        """The scores after one new token per row. On a GPU a CUDA graph takes its place (kernels/graph.py)."""
        return self(input_ids[:, None], position_ids=position_ids, past_key_values=cache).logits[:, -1]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> one number
        """Mean cross-entropy in float32. The scores at position t predict the label at t + 1."""
        logits, labels = logits[:, :-1].float(), labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.config.ignore_index)

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, **options) -> Tensor:
        """Prompt and answer as ids (B, T + new). The arguments are those of generate.generate."""
        return generate.generate(self, input_ids, pixel_values, **options)

    # Loading and settings

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype=None, device="cpu", quantize=None, kernels="auto", torch_dtype=None, adapter=None
    ) -> "LlavaForConditionalGeneration":
        """Load a checkpoint from a folder or a hub id.

        `dtype` (old name `torch_dtype`): a torch.dtype or its name; None or "auto": config.json's, or the weights' own.
        `quantize`: "int8" or "int4" for the decoder's matrices (quantize.py). `adapter`: the folder of a LoRA.
        `kernels`: "torch" is the plain model, "auto" swaps in faster modules with the same results up to rounding,
        "triton" requires Triton's (kernels/__init__.py). FileNotFoundError or ValueError for bad checkpoints.
        """
        folder = find_checkpoint(path)
        settings = read_config(folder)
        model = cls.without_weights(settings)
        if quantize or settings.get("quantization_config"):
            from quantize import load_quantized
            load_quantized(model, folder, settings, quantize)
        else:
            load(model, folder)
        model.tie_weights()
        dtype = as_dtype(dtype or torch_dtype) or settings["dtype"] or model.dtype
        if adapter is not None:
            from hub.adapter import apply_adapter
            apply_adapter(model, adapter, our_name, device, dtype)
        model.to(device=device, dtype=dtype).eval()
        model.generation_config = read_generation_settings(folder)
        if kernels != "torch":
            from kernels import accelerate
            accelerate(model, kernels)
        return model

    @classmethod
    def without_weights(cls, settings: dict) -> "LlavaForConditionalGeneration":
        """The model that a config.json describes, on the meta device: shapes without memory, for `load` to fill."""
        with as_value_error(), no_weights():
            config = LlavaConfig(**known_fields(LlavaConfig, settings))
            return llava_class(cls, config)(config)

    dtype = property(lambda self: self.language_model.embed_tokens.weight.dtype)
    device = property(lambda self: self.language_model.embed_tokens.weight.device)


# --- Prompts and pictures to the model's inputs ----------------------------------------------------------------------


class LlavaProcessor:
    """Tokenizer and image processor together: from prompts and pictures to the model's inputs."""

    def __init__(self, image_processor: ImageProcessor, tokenizer: Tokenizer, image_seq_length=576, template="hub"):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_seq_length = image_seq_length  # <image> tokens per picture
        self.template = TEMPLATES[template] if isinstance(template, str) else template
        self.batch_decode, self.decode = tokenizer.batch_decode, tokenizer.decode

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LlavaProcessor":
        """Read the settings of a checkpoint: a folder or a hub id. Errors as for the model."""
        from family.processor import read_parts
        folder = find_checkpoint(path)
        with as_value_error():
            config = LlavaConfig(**known_fields(LlavaConfig, read_config(folder)))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor, template = read_parts(folder, config, tokenizer)
        return llava_class(cls, config)(image_processor, tokenizer, config.image_seq_length, template)

    def __call__(
        self,
        images: Image.Image | list | None = None,
        text: str | list[str] | None = None,
        padding: bool = False,
        return_tensors: str = "pt",
    ) -> interface.Inputs:
        """input_ids and attention_mask (B, T), and pixel_values (pictures, 3, height, width) if there are pictures.

        The <image> tokens of the prompts stand for the pictures in order. Raises ValueError if the counts differ, or if
        prompts differ in length and `padding` is False.
        """
        texts, pictures = interface.as_lists(text, images, return_tensors)
        inputs = interface.Inputs()
        if texts:
            ids = [self.tokenizer.encode(prompt) for prompt in self.expand(texts, pictures)]
            if len(set(map(len, ids))) > 1 and not padding:
                raise ValueError("The prompts differ in length: pass padding=True to pad the shorter ones")
            inputs["input_ids"], inputs["attention_mask"] = self.tokenizer.pad(ids)
        if pictures:
            inputs.update(self.encode_pictures(pictures))
        return inputs

    def expand(self, prompts: list[str], pictures: list[Image.Image]) -> list[str]:
        """Repeat each <image> token once per patch of its picture."""
        return [prompt.replace("<image>", "<image>" * self.image_seq_length) for prompt in prompts]

    def encode_pictures(self, pictures: list[Image.Image]) -> interface.Inputs:
        return interface.Inputs(pixel_values=self.image_processor(pictures))

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """A conversation as a prompt in the checkpoint's template. Messages: see tokenizer.Template."""
        return self.template.render(messages, add_generation_prompt)


AutoProcessor = LlavaProcessor


if __name__ == "__main__":
    import cli

    raise SystemExit(cli.main(LlavaForConditionalGeneration, LlavaProcessor))  # import llava would run this file again
