"""Activation checkpointing: a decoder layer keeps only its input for the backward pass, and recomputes the rest.

Without it, autograd keeps 20 to 45 tensors of the size of the input (B, T, D) in every layer until the backward
pass. With it, it keeps one in every layer, and the others of one layer at a time; a step takes one forward pass longer.
PyTorch and the papers call it checkpointing, a word that here means the files of a model. Chen et al. 2016,
https://arxiv.org/abs/1604.06174.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint

from llava import LlavaForConditionalGeneration


def recompute_layers(model: LlavaForConditionalGeneration) -> None:
    """Make each layer of the decoder compute its activations twice.

    Nothing in a layer is random in a way that depends on when it runs: LoRA's dropout (dropout.py) is computed from the
    sample's number, so the second computation has the same masks, and PyTorch's random state need not be restored.
    """
    for layer in model.language_model.layers:
        formula = partial(type(layer).forward, layer)  # and not layer.forward, which may be swapped already
        layer.forward = partial(checkpoint, formula, use_reentrant=False, preserve_rng_state=False)
