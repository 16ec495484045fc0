"""What the twins share: replacing a module, and one product for several matrices with the same input.

A twin has the parameters and the children of the plain module, under the same names.
"""

import copy
import math

import torch
from torch import Tensor, nn


def swap(model: nn.Module, name: str, twin: nn.Module) -> None:
    """Replace the module called `name` by `twin`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, twin)


def adopt(twin: nn.Module, plain: nn.Module) -> None:
    """Give `twin` the parameters, children and settings of `plain`, under the same names."""
    nn.Module.__init__(twin)
    vars(twin).update(vars(plain))


def formula_needed(x: Tensor) -> bool:
    """Whether a twin must run the plain formula: gradients are recorded, or autocast chooses the dtypes."""
    return torch.is_grad_enabled() or (not x.is_meta and torch.is_autocast_enabled(x.device.type))


class FusedLinears:
    """Several linears with the same input as one product, because one large product is faster than several.

    In every parameter (weight and bias of an nn.Linear, q and scale of an Int8Linear) a row belongs to one output. The
    parameters are concatenated by rows, and those of each linear become views of the result: nothing is stored twice,
    and writing to them takes effect. When they have been moved or replaced, by .to() or load_state_dict(assign=True),
    the next call fuses them again. Linears with more than `largest` bytes together, or of different kinds, are called
    one by one.
    """

    def __init__(self, largest: float = math.inf):
        self.largest = largest
        self.forget()

    def __reduce__(self):  # copy.deepcopy and pickle make an empty one: the copied linears have memory of their own
        return FusedLinears, (self.largest,)

    def forget(self) -> None:
        """Release the fused parameters, so that moving the linears frees the old memory."""
        # What was fused (see identity), and the result. One tuple, so that other threads read both or neither.
        self.made: tuple[list, nn.Module | None] = ([], None)

    def __call__(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:  # (..., in) -> (..., out) of each linear
        made_for, whole = self.made
        if made_for != identity(linears):
            whole = self.fuse(*linears)
        if whole is None:
            return tuple(linear(x) for linear in linears)
        return whole(x).split([rows(linear) for linear in linears], dim=-1)

    @torch.inference_mode(False)  # tensors made in inference mode could not be trained later
    @torch.no_grad()
    def fuse(self, *linears: nn.Module) -> nn.Module | None:
        """Make one module of the linears and remember it; None if they are too large or not alike."""
        whole = None
        if alike(linears) and sum(p.nbytes for linear in linears for p in linear.parameters()) <= self.largest:
            whole = copy.copy(linears[0])  # its class and settings; the parameters follow
            whole._parameters = dict(linears[0]._parameters)
            for name, _ in linears[0].named_parameters():
                parts = [getattr(linear, name) for linear in linears]
                joined = torch.cat([part.detach() for part in parts])
                whole._parameters[name] = nn.Parameter(joined, requires_grad=False)
                for part, view in zip(parts, joined.split([len(part) for part in parts]), strict=True):
                    part.data = view
        self.made = identity(linears), whole
        return whole


def identity(linears: tuple[nn.Module, ...]) -> list:
    """The linears' classes and the addresses of their parameters."""
    # nn.Module.parameters() is slower than the dictionary, and this runs in every layer for every token.
    stored = [p.data_ptr() for linear in linears for p in linear._parameters.values() if p is not None]
    return [type(linear) for linear in linears] + stored


def alike(linears: tuple[nn.Module, ...]) -> bool:
    """Whether all have one class and the parameters of an nn.Linear or an Int8Linear, and nothing else."""
    kinds = {(type(linear), *(name for name, _ in linear.named_parameters())) for linear in linears}
    return len(kinds) == 1 and next(iter(kinds))[1:] in (("weight",), ("weight", "bias"), ("q", "scale"))


def rows(linear: nn.Module) -> int:
    return len(next(iter(linear._parameters.values())))
