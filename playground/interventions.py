"""Interventions: change one thing inside a model, and see how its answer changes.

    with mute_heads(model, {0: [1]}):                        head 1 of layer 0 contributes nothing
        model.generate(**inputs)
    with knockout(model, [4, 5], queries, keys): ...         in these layers, positions do not see other positions
    with swap_features(model, features): ...                 the prompt's pictures are replaced by these vectors

    erase_patches(features, [17, 18])                        patches replaced by the mean patch
    keep_patches(features, 32, by="norm")                    only 32 patches
    logit_lens(model, out.hidden_states)                     what each layer would predict, at words and at patches
    blind(model, inputs)                                     predictions without the picture

For plain models, loaded with kernels="torch": faster twins do not run the modules that are changed here. The context
managers act in `forward` and in `generate`, with a cache or without, and leave no trace. Positions are counted from the
start of the sequence, <image> tokens included; in a batch of prompts of different lengths, padding counts too.

    B batch    T new tokens    S all tokens    D width    H heads    d head width    P patches    V vocabulary
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from llama import LlamaAttention, visible_keys


def plain_layers(model: nn.Module) -> list[nn.Module]:
    layers = list(model.language_model.layers)
    if any(type(layer.self_attn) is not LlamaAttention for layer in layers):
        raise ValueError('interventions need the plain model: load it with kernels="torch"')
    return layers


@contextmanager
def mute_heads(model: nn.Module, heads: dict[int, Collection[int]]) -> Iterator[None]:
    """Set the output of attention heads to zero, before o_proj mixes the heads. `heads`: layer -> its muted heads."""
    layers = plain_layers(model)

    def muted(columns: Tensor):
        def hook(o_proj: nn.Module, args: tuple[Tensor]) -> Tensor:
            return args[0].index_fill(-1, columns.to(args[0].device), 0)  # (B, T, H * d)

        return hook

    with ExitStack() as hooks:
        for layer, those in heads.items():
            attention = layers[layer].self_attn
            d, H = attention.head_dim, attention.o_proj.in_features // attention.head_dim
            if wrong := [head for head in those if not 0 <= head < H]:
                raise ValueError(f"layer {layer} has heads 0 to {H - 1}, and no head {wrong[0]}")
            columns = torch.tensor([head * d + i for head in those for i in range(d)], dtype=torch.long)
            hooks.callback(attention.o_proj.register_forward_pre_hook(muted(columns)).remove)
        yield


@contextmanager
def knockout(
    model: nn.Module, layers: Collection[int], queries: Collection[int] | None, keys: Collection[int] | None
) -> Iterator[None]:
    """In some layers, cut attention from the positions `queries` to the positions `keys` (Geva et al. 2023, section 4).

    None means all positions, generated ones included. A position always sees itself, so that it sees something.
    """
    plain = plain_layers(model)

    def among(positions: Tensor, chosen: Collection[int] | None) -> Tensor:
        if chosen is None:
            return torch.ones_like(positions, dtype=torch.bool)
        return torch.isin(positions, torch.as_tensor(list(chosen), dtype=torch.long, device=positions.device))

    def hook(attention: nn.Module, args: tuple) -> tuple:
        x, rope, mask, cache, *rest = args
        T, past = x.shape[1], cache.length if cache is not None else 0
        if mask is None:
            mask = visible_keys(torch.ones(1, past + T, dtype=torch.bool, device=x.device), past, T, None, x.device)
        every = torch.arange(past + T, device=x.device)
        i, j = every[past:, None], every[None]
        cut = among(every, queries)[past:, None] & among(every, keys)[None] & (i != j)  # (T, S)
        return x, rope, mask & ~cut, cache, *rest

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(plain[layer].self_attn.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def swap_features(model: nn.Module, features: Tensor) -> Iterator[None]:
    """Give the decoder these vectors (pictures, P, D), as get_image_features returns them, whatever the pictures."""
    plain_layers(model)
    model.get_image_features = lambda *args, **options: features
    try:
        yield
    finally:
        del model.get_image_features


def erase_patches(
    x: Tensor, patches: Collection[int], fill: Tensor | None = None, patch_size: int | None = None
) -> Tensor:
    """A copy in which some patches of every picture contain no information.

    `x` is features (pictures, P, D): the patches become `fill` (D,), by default the mean of the picture's patches. Or
    it is pixel_values (pictures, 3, height, width), with the tower's patch_size: the squares become `fill` (3,), by
    default the picture's mean colour. Patches are counted row by row.
    """
    if x.ndim == 3:
        fill = x.mean(1, keepdim=True) if fill is None else fill
        erased = torch.zeros(x.shape[1], 1, dtype=torch.bool, device=x.device)
        erased[list(patches)] = True
        return torch.where(erased, fill, x)
    if patch_size is None:
        raise ValueError("pixel_values need the patch_size of the tower: model.config.vision_config.patch_size")
    fill = x.mean((2, 3)) if fill is None else fill.expand(len(x), -1)
    x, columns = x.clone(), x.shape[3] // patch_size
    for row, column in (divmod(patch, columns) for patch in patches):
        rows, across = (slice(place * patch_size, (place + 1) * patch_size) for place in (row, column))
        x[:, :, rows, across] = fill[:, :, None, None]
    return x


def keep_patches(
    features: Tensor, n: int, by: str = "norm", attention: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The n patches of each picture that seem to matter most: their features (pictures, n, D), and which (pictures, n).

    `by`: "norm" takes the longest vectors, "random" any, "attention" those with the highest `attention` (pictures, P).
    They stay in their order. The prompt then needs n <image> tokens per picture: processor.image_seq_length = n.
    """
    if by == "norm":
        worth = features.norm(dim=-1)
    elif by == "random":
        worth = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(seed)).to(features.device)
    elif by == "attention" and attention is not None:
        worth = attention
    else:
        raise ValueError(f'by must be "norm", "random", or "attention" with the attention given, not {by!r}')
    kept = worth.topk(n, dim=1).indices.sort(dim=1).values
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1])), kept


@torch.no_grad()
def logit_lens(model: nn.Module, hidden_states: tuple[Tensor, ...]) -> Tensor:  # -> (layers + 1, B, T, V)
    """Scores of the next token before the first and after each layer, at every position, patches included.

    They are the final norm and the head applied to the `hidden_states` of an output (nostalgebraist 2020). The last of
    these is normed already, so the last scores are the model's own.
    """
    *inputs, last = hidden_states
    return torch.stack([model.lm_head(x) for x in (*map(model.language_model.norm, inputs), last)])


@torch.no_grad()
def blind(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:  # -> (B, T, V)
    """Probabilities of the next token at every position, with the <image> tokens hidden from all others.

    `inputs` are the processor's, or prompt and answer as input_ids. Positions are the same as with the picture.
    """
    input_ids = inputs["input_ids"]
    is_image = input_ids == model.config.image_token_index
    seen = inputs.get("attention_mask", torch.ones_like(input_ids)).masked_fill(is_image, 0)
    ids = input_ids.masked_fill(is_image, 0)  # any embedding: nothing reads it
    return model(ids, attention_mask=seen, use_cache=False).logits.float().softmax(-1)
