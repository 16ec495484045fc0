"""LLaVA: CLIP's eyes, Llama's voice, and two matrices between them.

    picture -> clip.py -> (P, 1024) patches -> projector -> (P, 4096) vectors  \\
                                                                               merge -> llama.py -> the next word
    prompt  -> tokenizer.py -> (T,) ids -> embedding -> (T, 4096) vectors      /

The prompt holds one <image> token for every patch; the merge writes the projected patches over their embeddings. From
there on nothing knows that it is looking at a picture. Liu et al. 2023, "Visual Instruction Tuning"
(https://arxiv.org/abs/2304.08485) and "Improved Baselines with Visual Instruction Tuning", which is LLaVA-1.5
(https://arxiv.org/abs/2310.03744).

    B batch    T tokens    D width of the decoder    P patches of a picture    V vocabulary

`python llava.py --image x.jpg` answers about a picture. Classes and arguments have Hugging Face transformers' names.

Left out: gradient checkpointing, LLaVA-1.6's tiles, and pictures of other sizes than the tower was trained for.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports in silence; command.py takes it back

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import generate
from checkpoint import NoInit, as_dtype, find_checkpoint, read_config, read_generation_settings, read_processor_settings
from clip import ACTIVATIONS, CLIPVisionConfig, CLIPVisionModel, ImageProcessor, known_fields
from kernels import choose_kernels
from llama import KVCache, Linear, Llama, LlamaConfig, decoder_config
from load_weights import load
from tokenizer import TEMPLATES, Tokenizer

ROOM = 512  # tokens that a cache made by `forward` can take beyond those it was made with


@dataclass
class LlavaConfig:
    """A checkpoint's config.json. Without arguments it has the layer sizes of LLaVA-1.5 7B."""

    vision_config: CLIPVisionConfig | dict | None = None  # default: CLIP ViT-L/14 at 336 pixels
    text_config: LlamaConfig | dict | None = None  # default: Llama 7B
    ignore_index: int = -100  # labels with this value do not count in the loss
    image_token_index: int = 32000  # the id of <image>
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: str = "default"  # "default" drops the tower's class token, "full" keeps it
    vision_feature_layer: int | list[int] = -2  # which of the tower's hidden states is read; several are concatenated
    vocab_size: int = 32000  # old files have it; the decoder's own takes its place
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False  # the head shares the embedding's matrix

    def __post_init__(self) -> None:
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(1024, 4096, 768, 24, 16, image_size=336, patch_size=14)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**known_fields(CLIPVisionConfig, self.vision_config))
        if not isinstance(self.text_config, LlamaConfig):
            self.text_config = decoder_config(self.text_config or {})
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.vocab_size = self.text_config.vocab_size
        if self.projector_hidden_act not in ACTIVATIONS:
            act = repr(self.projector_hidden_act)
            raise ValueError(f"projector_hidden_act {act} is unknown: it must be one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def from_dict(cls, settings: dict) -> "LlavaConfig":
        try:
            return cls(**known_fields(cls, settings))
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"config.json does not describe a model ({error})") from error

    @property
    def image_seq_length(self) -> int:  # how many tokens a picture takes in the prompt
        return self.vision_config.num_patches + (self.vision_feature_select_strategy == "full")


class LlavaMultiModalProjector(nn.Module):
    """Two matrices with a GELU between: what the tower sees, as what the decoder reads (LLaVA-1.5, section 3)."""

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


@dataclass
class LlavaCausalLMOutputWithPast(dict):
    """What `forward` returns: `out.logits`, `out["logits"]`, or `out[i]` for the i-th that is there.

    An output that was not asked for is None as an attribute, and is neither counted nor among the keys.
    """

    loss: Tensor | None = None  # one number
    logits: Tensor | None = None  # (B, T, V)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # layers + 1 of (B, T, D), the last one after the final norm
    attentions: tuple[Tensor, ...] | None = None  # layers of (B, H, T, S)
    image_hidden_states: Tensor | None = None  # (pictures * P, D), what the projector made

    def __setattr__(self, name: str, value) -> None:  # what is there is an attribute and an item of the dict
        super().__setattr__(name, value)
        if value is not None:
            self[name] = value

    def __getitem__(self, key: str | int | slice):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        return tuple(self.values())


class LlavaForConditionalGeneration(nn.Module):
    """The whole model: tower, projector, decoder, head."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.generation_config: dict = {}  # the checkpoint's generation_config.json
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = Llama(config.text_config)
        self.lm_head = Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        quantize: str | None = None,
        kernels: str = "auto",
        torch_dtype: torch.dtype | str | None = None,
    ) -> "LlavaForConditionalGeneration":
        """Load a checkpoint: a folder or a hub id.

        `dtype` is a torch.dtype or its name; None or "auto" means config.json's, or else the first tensor's.
        `torch_dtype` is its old name.
        `quantize="int8"` keeps the decoder's matrices in a byte a weight (see quantize.py). `kernels`, "auto", "triton"
        or "torch", is for every model of this process (see kernels/__init__.py).
        Raises FileNotFoundError or ValueError, naming the file or tensor, for a checkpoint that is not whole.
        """
        dtype = as_dtype(torch_dtype if dtype is None else dtype)
        choose_kernels(kernels, device)
        folder = find_checkpoint(path)
        settings = read_config(folder)
        model = cls.without_weights(settings)
        load(model, folder, dtype or settings["dtype"], device, quantize)
        model.tie_weights()
        model.generation_config = read_generation_settings(folder)
        return model.eval()

    @classmethod
    def without_weights(cls, settings: dict) -> "LlavaForConditionalGeneration":
        """The model that a config.json describes, on the meta device: shapes without memory, for `load` to fill."""
        config = LlavaConfig.from_dict(settings)
        try:
            with torch.device("meta"), NoInit():
                return cls(config)
        except (TypeError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"config.json does not describe a model ({str(error).splitlines()[0]})") from error

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> Tensor:  # (pictures, 3, image_size, image_size) -> (pictures, P, D), or P + 1 where the strategy is "full"
        """See and project: the tower runs only as deep as the deepest layer that is read."""
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy must be default or full, not {strategy!r}")
        n = self.config.vision_config.num_hidden_layers
        if not all(-n - 1 <= layer <= n for layer in layers):
            raise ValueError(f"vision_feature_layer must lie from {-n - 1} to {n}, not {layers}")
        layers = [layer % (n + 1) for layer in layers]  # -2 is the output of the last layer but one
        hidden_states = self.vision_tower(pixel_values, depth=max(layers))
        first = 1 if strategy == "default" else 0  # 1: without the class token
        return self.multi_modal_projector(torch.cat([hidden_states[layer][:, first:] for layer in layers], dim=-1))

    def embed(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        table = self.language_model.embed_tokens
        if input_ids.shape[1] > 1:  # generation's single tokens fit; to look would make a GPU wait, which no graph can
            least, most = input_ids.aminmax()
            if least < 0 or most >= table.num_embeddings:
                raise ValueError(f"the ids {least} to {most} do not fit a vocabulary of {table.num_embeddings}")
        return table(input_ids)

    def merge(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, image_features: Tensor | None) -> Tensor:
        """Embed the prompt and write the picture's vectors (pictures * P, D) where <image> stands: (B, T, D)."""
        image_token = self.config.image_token_index
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if image_features is None:
            return self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if inputs_embeds is None:
            is_image = input_ids == image_token
            inputs_embeds = self.embed(input_ids.masked_fill(is_image, 0))  # <image> may have no row of its own
        else:
            if not 0 <= image_token < self.language_model.embed_tokens.num_embeddings:
                raise ValueError(f"<image>, token {image_token}, has no embedding: with pixel_values pass input_ids")
            is_image = (inputs_embeds == self.language_model.embed_tokens.weight[image_token]).all(-1)
        if (tokens := int(is_image.sum())) != len(image_features):
            counts = f"tokens: {tokens}, features: {len(image_features)}"
            raise ValueError(f"Image features and image tokens do not match, {counts}")
        return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T), one <image> token for every patch
        pixel_values: Tensor | None = None,  # (pictures, 3, image_size, image_size), in the order of the <image> tokens
        attention_mask: Tensor | None = None,  # (B, S), 0 on padding; S = T and what the cache holds
        position_ids: Tensor | None = None,  # (B or 1, T)
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,  # (B, T, D), instead of input_ids
        vision_feature_layer: int | list[int] | None = None,  # instead of the config's
        vision_feature_select_strategy: str | None = None,  # instead of the config's
        labels: Tensor | None = None,  # (B, T)
        use_cache: bool | None = None,  # None: yes, but not in training
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        logits_to_keep: int | Tensor = 0,  # the last so many positions go through the head, or these (n,); 0 for all
    ) -> LlavaCausalLMOutputWithPast | tuple:
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        if isinstance(keep, Tensor) and keep.ndim != 1:
            raise ValueError(f"logits_to_keep must be a number or a tensor (n,), not of shape {list(keep.shape)}")
        features = None
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, vision_feature_layer, vision_feature_select_strategy)
            features = features.flatten(0, 1)  # (pictures, P, D) -> (pictures * P, D)
        x = self.merge(input_ids, inputs_embeds, features)
        cache = past_key_values
        if cache is None and (use_cache or (use_cache is None and not self.training)):
            cache = KVCache(self.config.text_config, len(x), x.shape[1] + ROOM, x.dtype, x.device)
        hidden_states = [] if output_hidden_states else None
        attentions = [] if output_attentions else None
        x = self.language_model(x, attention_mask, position_ids, cache, hidden_states, attentions)
        logits = self.lm_head(x[:, keep])
        out = LlavaCausalLMOutputWithPast(
            loss=None if labels is None else self.loss(logits, labels),
            logits=logits,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            image_hidden_states=features,
        )
        return out if return_dict else out.to_tuple()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> one number
        """Mean cross-entropy of each label under the scores at the position before it, in float32."""
        logits, labels = logits[:, :-1].float(), labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.config.ignore_index)

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, **options) -> Tensor:
        """Prompt and answer as ids (B, T + new). All arguments: see generate.generate."""
        return generate.generate(self, input_ids, pixel_values, **options)


# --- Prompts and pictures to the model's inputs ----------------------------------------------------------------------


class Inputs(dict):
    """What the processor returns: tensors by name, `inputs.input_ids` or `inputs["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(f"there is no {name} here, only {', '.join(self)}")
        return self[name]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Inputs":
        """Move all tensors, in place; only those of floating-point numbers change their dtype. Also as `to(dtype)`."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self.update({k: v.to(device, dtype if v.is_floating_point() else None) for k, v in self.items()})
        return self


class LlavaProcessor:
    """Tokenizer and image processor in one: prompts and pictures in, the model's inputs out."""

    def __init__(
        self, image_processor: ImageProcessor | None, tokenizer: Tokenizer, image_seq_length=576, template="hub"
    ):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_seq_length = image_seq_length  # <image> tokens a picture
        self.template = TEMPLATES[template]
        self.batch_decode, self.decode = tokenizer.batch_decode, tokenizer.decode

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LlavaProcessor":
        """Read the settings of a checkpoint: a folder or a hub id. Errors as for the model."""
        folder = find_checkpoint(path)
        config, tokenizer = LlavaConfig.from_dict(read_config(folder)), Tokenizer.from_pretrained(folder)
        ours, theirs = tokenizer.image_token_id, config.image_token_index
        if ours != theirs:
            raise ValueError(f"{folder}: <image> is token {ours} for the tokenizer and token {theirs} in config.json")
        settings, template = read_processor_settings(folder)
        side = config.vision_config.image_size
        settings = {"size": {"shortest_edge": side}, "crop_size": side} | settings
        image_processor = ImageProcessor(**known_fields(ImageProcessor, settings))
        return cls(image_processor, tokenizer, config.image_seq_length, template)

    def __call__(
        self,
        images: Image.Image | list | None = None,
        text: str | list[str] | None = None,
        padding: bool = False,
        return_tensors: str = "pt",
    ) -> Inputs:
        """input_ids and attention_mask (B, T), and pixel_values (pictures, 3, height, width) where there are pictures.

        Pictures go to the <image> tokens of the prompts in order. Raises ValueError where their numbers differ, and for
        prompts of different lengths without `padding`.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = [] if images is None else flatten(images)
        n_tokens = sum(t.count("<image>") for t in texts)
        if texts and n_tokens != len(pictures):
            raise ValueError(f"The prompts hold {n_tokens} <image> tokens, but {len(pictures)} images were passed")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt' (PyTorch tensors), not {return_tensors!r}")
        inputs = Inputs()
        if texts:
            ids = [self.tokenizer.encode(t.replace("<image>", "<image>" * self.image_seq_length)) for t in texts]
            if len(set(map(len, ids))) > 1 and not padding:
                raise ValueError("The prompts differ in length: pass padding=True to fill the shorter ones up")
            inputs["input_ids"], inputs["attention_mask"] = self.tokenizer.pad(ids)
        if pictures:
            inputs["pixel_values"] = self.image_processor(pictures)
        return inputs

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """A conversation as the prompt that the checkpoint's files ask for. Messages: see tokenizer.Template."""
        return self.template.render(messages, add_generation_prompt)


AutoProcessor = LlavaProcessor


def flatten(images) -> list[Image.Image]:
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, list | tuple):
        return [image for part in images for image in flatten(part)]
    raise ValueError(f"images must be Pillow pictures or lists of them, not {type(images).__name__}")


if __name__ == "__main__":
    from command import main  # imports this file again, by its name: there the command finds the classes
    raise SystemExit(main())
