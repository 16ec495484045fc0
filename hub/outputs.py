"""The containers of transformers' interface: outputs that are an object, a dictionary and a tuple; inputs with `to`."""

from collections.abc import Iterator, Mapping
from dataclasses import fields

import torch
from torch import Tensor


class ModelOutput(Mapping):
    """Base of a dataclass of outputs: `out.logits`, `out["logits"]`, or `out[i]` for the i-th one present.

    An output that was not asked for is None as an attribute, and is neither counted nor among the keys.
    """

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in fields(self) if getattr(self, f.name) is not None)

    def __len__(self) -> int:
        return len(tuple(self))

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __getitem__(self, key: str | int | slice):
        if isinstance(key, str) and key not in self:
            raise KeyError(key)
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, name) for name in self)


class Inputs(dict):
    """What the processor returns: tensors by name, as `inputs.input_ids` or `inputs["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(f"there is no {name} here, only {', '.join(self)}")
        return self[name]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Inputs":
        """Move all tensors, in place; only floating-point tensors change their dtype. `to(dtype)` works too."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self.update({k: v.to(device, dtype if v.is_floating_point() else None) for k, v in self.items()})
        return self
