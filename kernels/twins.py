"""What the twins share: replacing a module, and one product for several matrices with the same input.

A twin has the parameters and the children of the plain module, under the same names.
"""

import copy
import math

import torch
from torch import Tensor, nn


def adopt(twin: nn.Module, plain: nn.Module) -> None:
    """Give `twin` the parameters, children and settings of `plain`, under the same names."""
    nn.Module.__init__(twin)
    vars(twin).update(vars(plain))


def formula_needed() -> bool:
    """Whether twins must run the plain formula: gradients are recorded, or autocast chooses the dtypes."""
    return torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()


class FusedLinears:
    """Several linears with the same input as one module, because one large product is faster than several.

    In every parameter (weight and bias of an nn.Linear, q and scale of an Int8Linear) a row belongs to one output. The
    parameters are concatenated by rows, and those of each linear become views of the result: nothing is stored twice,
    and writing to them takes effect. When a linear or a parameter has been replaced or moved, by an adapter, .to() or
    load_state_dict(assign=True), the next use fuses them again.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...], largest: float = math.inf):
        self.owner, self.names, self.largest = owner, names, largest  # children of `owner`; bytes of all together
        self.forget()

    def __reduce__(self):  # copy.deepcopy and pickle make an empty one: the copied linears have memory of their own
        return FusedLinears, (self.owner, self.names, self.largest)

    def forget(self) -> None:
        """Release the fused parameters, so that moving the linears frees the old memory."""
        # The linears, where their parameters were, and the result. One tuple, because other threads read it.
        self.made: tuple[list[nn.Module], list[tuple[dict, str, int]], nn.Module | None] = ([], [], None)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:  # (..., in) -> (..., out) of each linear
        whole = self.module()
        if whole is None:
            return tuple(getattr(self.owner, name)(x) for name in self.names)
        return whole(x).split(whole.sizes, dim=-1)

    def module(self) -> nn.Module | None:
        """The fused linears, or None if they are too large or not alike: they then have to run one by one."""
        linears, places, whole = self.made
        modules = self.owner._modules  # runs in every layer for every token, and attribute access on modules is slow
        if linears != [modules[name] for name in self.names]:
            return self.fuse()
        for parameters, name, place in places:
            if address(parameters.get(name)) != place:
                return self.fuse()
        return whole

    @torch.inference_mode(False)  # tensors made in inference mode could not be trained later
    @torch.no_grad()
    def fuse(self) -> nn.Module | None:
        """Fuse the current parameters of the linears."""
        linears, whole = [getattr(self.owner, name) for name in self.names], None
        size = sum(p.nbytes for linear in linears for p in linear.parameters())
        if alike(linears) and size <= self.largest:
            whole = copy.copy(linears[0])  # its class and settings; the parameters follow
            whole._parameters, whole.sizes = dict(linears[0]._parameters), []
            for name, _ in linears[0].named_parameters():
                parts = [getattr(linear, name) for linear in linears]
                joined, whole.sizes = torch.cat([part.detach() for part in parts]), [len(part) for part in parts]
                whole._parameters[name] = nn.Parameter(joined, requires_grad=False)
                for part, view in zip(parts, joined.split(whole.sizes), strict=True):
                    part.data = view
        stored = [(linear._parameters, name) for linear in linears for name in linear._parameters]
        self.made = linears, [(parameters, name, address(parameters[name])) for parameters, name in stored], whole
        return whole


def address(parameter: nn.Parameter | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()


def alike(linears: list[nn.Module]) -> bool:
    """Whether all have the same class, and the parameters of an nn.Linear or an Int8Linear and no others."""
    stored = [dict(linear.named_parameters()) for linear in linears]
    kinds = {tuple((name, p.dtype, p.device) for name, p in parameters.items()) for parameters in stored}
    known = [name for name in stored[0] if name != "bias"] in (["weight"], ["q", "scale"])
    return known and len(kinds) == 1 and len({type(linear) for linear in linears}) == 1
