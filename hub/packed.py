"""Quantized checkpoints in the compressed-tensors format, which transformers and vLLM read too.

config.json describes the scheme in "quantization_config". Instead of NAME.weight (out, in) a file holds

    NAME.weight_packed   int32 (out, in * bits / 32)   q + 2^(bits - 1), unsigned; the first number in the lowest bits
    NAME.weight_scale    (out, in / group)             (out, 1) if a row is one group
    NAME.weight_shape    (2,)                          out, in; not read: config.json has the sizes

The format has many more options. Those that are not implemented raise a ValueError that names the setting.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from hub.files import file_errors_as_value_error, weight_files

METHOD, FORMAT = "compressed-tensors", "pack-quantized"


class Scheme(NamedTuple):
    bits: int  # 4 or 8
    group: int | None  # numbers that share a scale; None: a whole row


def scheme_json(scheme: Scheme, ignore: list[str]) -> dict:
    """The quantization_config of a checkpoint whose matrices are quantized, except those that `ignore` names."""
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        **{"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed"},
        **{"config_groups": groups, "ignore": ignore},
    }


def read_scheme(settings: dict, file: Path) -> Scheme:
    """The one scheme of a quantization_config. Raises ValueError, naming the setting, for what is not implemented."""
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: quantization_config is not a JSON object")
    wanted = {"quant_method": (METHOD,), "format": (FORMAT, None), "quantization_status": ("compressed", None),
              "kv_cache_scheme": (None,), "sparsity_config": (None, {})}  # fmt: skip
    require_all(settings, wanted, file)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{file}: quantization_config has no config_groups")
    schemes = {read_group(group, file) for group in groups.values()}
    if len(schemes) > 1:
        raise ValueError(f"{file}: different schemes in one checkpoint are not implemented")
    return schemes.pop()


def read_group(group: dict, file: Path) -> Scheme:
    require_all(group, {"input_activations": (None,), "output_activations": (None,), "format": (FORMAT, None)}, file)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"{file}: quantization_config does not say how weights are quantized")
    wanted = {"num_bits": (4, 8), "type": ("int", None), "symmetric": (True, None), "strategy": ("group", "channel"),
              "actorder": (None, "static", "weight"), "dynamic": (False, None)}  # fmt: skip
    require_all(weights, wanted, file)
    size = weights.get("group_size")
    if weights["num_bits"] == 8 and weights["strategy"] == "group":
        raise ValueError(f"{file}: 8 bits with groups are not implemented, only with one scale for each row")
    if weights["strategy"] == "channel":
        return Scheme(weights["num_bits"], None)
    if type(size) is not int or size < 1:
        raise ValueError(f"{file}: group_size must be a whole number of at least 1, not {size!r}")
    return Scheme(weights["num_bits"], size)


def require_all(settings: dict, wanted: dict[str, tuple], file: Path) -> None:
    for name, choices in wanted.items():
        if (value := settings.get(name)) not in choices:
            known = " or ".join(str(choice) for choice in choices if choice is not None) or "absent"
            raise ValueError(f"{file}: quantization with {name} {value!r} is not implemented: it must be {known}")


def packed_names(folder: Path) -> list[str]:
    """The names of the packed matrices in a checkpoint's files, without the suffix."""
    names = []
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with file_errors_as_value_error(file), safe_open(file, framework="pt") as tensors:
                names += [n.removesuffix(".weight_packed") for n in tensors.keys() if n.endswith(".weight_packed")]  # noqa: SIM118
    return names


def packed_tensors(name: str, data: Tensor, scale: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of the matrix `name`. data: the bytes (out, in * bits / 8) of its numbers, each q + 2^(bits - 1)."""
    return {
        f"{name}.weight_packed": data.view(torch.int32),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(shape),
    }
