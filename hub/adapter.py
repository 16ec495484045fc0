"""LoRA adapters as files: reads those of PEFT and of LLaVA's authors, applies them to a model, and writes PEFT's form.

    W' = W + scale * B A        A (r, in), B (out, r); scale = alpha / r, with rslora alpha / sqrt(r)

An adapter adds products of rank r to some matrices of a base model, and may replace other tensors, such as the
projector's. Its folder holds adapter_config.json, and adapter_model.safetensors or .bin with

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight     and ...lora_B.weight
    base_model.model.model.multi_modal_projector.linear_1.weight                      a whole tensor

After `base_model.model.` comes the tensor's name in any layout that load_weights.py reads. LLaVA's own folders have
whole tensors in non_lora_trainables.bin.
A floating-point matrix is replaced by W'. A quantized one keeps its numbers, and the adapter stays beside it. PEFT has
many variants of LoRA: a setting that is not supported raises an error that names it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hub.files import file_errors_as_value_error, find_checkpoint, read_json, read_pickle
from hub.tensors import DTYPES
from hub.writer import check_finite, replaced_files, write_json, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
LLAVA_WHOLE = "non_lora_trainables.bin"
# Settings that change nothing when an adapter is applied, or that are read below. All others must be empty or false.
KNOWN = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "init_lora_weights", "bias"),
    *("base_model_name_or_path", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("exclude_modules", "lora_dropout", "megatron_core", "qalora_group_size", "eva_config"),
}
INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others also change the base
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # not the tower's q, k, v
PROJECTOR = "multi_modal_projector"


class AdaptedLinear(nn.Module):
    """A linear with an adapter beside it: y = base(x) + scale * B(A(x))."""

    def __init__(self, base: nn.Module, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Adapter:
    folder: Path
    rank: int
    alpha: float
    rslora: bool
    pairs: dict[str, tuple[Tensor, Tensor]]  # our name of a matrix -> A (r, in), B (out, r)
    whole: dict[str, Tensor]  # our name of a parameter -> what replaces it

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """rslora keeps the size of B A x the same for every rank (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def read_adapter_config(folder: str | Path) -> dict:
    """Read adapter_config.json. Raises FileNotFoundError or ValueError if it does not describe a supported LoRA."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, so it is not the folder of an adapter")
    settings = read_json(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"the adapter {folder} is of type {settings.get('peft_type')!r}: only LORA is implemented")
    extra = {name: value for name, value in settings.items() if name not in KNOWN and value}
    if settings.get("bias", "none") != "none":
        extra["bias"] = settings["bias"]
    if settings.get("init_lora_weights") not in INITS:
        extra["init_lora_weights"] = settings["init_lora_weights"]
    if extra:
        name, value = next(iter(extra.items()))
        raise ValueError(f"the adapter {folder} needs {name} {str(value)[:80]!r}, which is not implemented")
    rank, alpha = settings.get("r"), settings.setdefault("lora_alpha", 8)
    if type(rank) is not int or not 1 <= rank <= 2**16:
        raise ValueError(f"the adapter {folder} has the rank {str(rank)[:80]}: r must be a whole number of at least 1")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"the adapter {folder} has the lora_alpha {str(alpha)[:80]}, which is not a number")
    return settings


def read_adapter(folder: str | Path, our_name: Callable[[str], str]) -> Adapter:
    """An adapter's tensors, by the names that `our_name` gives. Errors as for read_adapter_config."""
    folder = Path(folder)
    settings = read_adapter_config(folder)
    halves, whole = {}, {}
    for name, tensor in stored_tensors(folder):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the adapter {folder} is broken: {name} holds {tensor.dtype}")
        ours = our_name(name.removeprefix("base_model.model.")).replace(".base_layer.", ".")  # in a head with a LoRA
        half = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", ours)
        place, key = (halves.setdefault(half[1], {}), half[2]) if half else (whole, ours)
        if key in place:
            raise ValueError(f"the adapter {folder} has two tensors for {ours}")
        place[key] = tensor
    for name, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"the adapter {folder} has only one of lora_A and lora_B for {name}")
    if not halves:
        raise ValueError(f"the adapter {folder} has no tensor of a LoRA")
    pairs = {name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}
    return Adapter(folder, settings["r"], settings["lora_alpha"], bool(settings.get("use_rslora")), pairs, whole)


def stored_tensors(folder: Path) -> list[tuple[str, Tensor]]:
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()][:1]
    if not files:
        raise FileNotFoundError(f"the adapter {folder} has no weights ({' or '.join(WEIGHTS)})")
    if (folder / LLAVA_WHOLE).is_file():
        files.append(folder / LLAVA_WHOLE)
    found = []
    for file in files:
        try:
            found += read_file(file).items()
        except ValueError as error:
            raise ValueError(f"the adapter cannot be read: {error}") from error
    return found


def read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        return read_pickle(file)
    with file_errors_as_value_error(file), safe_open(file, framework="pt", device="cpu") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def base_of(folder: str | Path) -> str:
    """The base that adapter_config.json names: a folder, or a hub id in the local cache. Nothing is downloaded."""
    name = read_adapter_config(folder).get("base_model_name_or_path")
    try:
        find_checkpoint(name if isinstance(name, str) and name else "?", download=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"the adapter {folder} is for {name!r}, which was not found: give --model") from error
    return name


def warning_of_another_base(folder: str | Path, model: str | Path) -> str | None:
    """A sentence if the base that adapter_config.json names has another name than `model`, a folder or a hub id.

    Only the last parts of the names are compared, without -hf: a copy or a quantized checkpoint may have another name.
    """
    base, path = read_adapter_config(folder).get("base_model_name_or_path"), Path(model)
    given = path.resolve() if path.is_dir() else path
    if not isinstance(base, str) or not base or short_name(Path(base)) == short_name(given):
        return None
    is_for = f"warning: the adapter {folder} is for {base[:200]!r}, and the model is {model}"
    return f"{is_for}: the results are wrong if the two have different weights"


def short_name(path: Path) -> str:
    in_cache = path.parent.name == "snapshots"  # models--OWNER--NAME/snapshots/COMMIT
    name = path.parent.parent.name.rpartition("--")[2] if in_cache else path.name
    return name.lower().removesuffix("-hf")


# --- Applying --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def apply_adapter(model: nn.Module, folder: str | Path, our_name: Callable[[str], str], device, dtype) -> None:
    """Merge an adapter into a loaded model; a quantized matrix is wrapped in an AdaptedLinear instead.

    Call it before model.to(device, dtype): W + scale BA is computed in float32 and rounded to `dtype` once.
    """
    adapter = read_adapter(folder, our_name)
    untie(model, adapter)
    unpack_replaced(model, adapter)
    check_fits(model, adapter)
    for name, tensor in adapter.whole.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(tensor))
    for name, (A, B) in adapter.pairs.items():
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            precise = torch.promote_types(linear.weight.dtype, torch.float32)
            W, A, B = (tensor.to(device, precise) for tensor in (linear.weight, A, B))
            linear.weight = nn.Parameter((W + adapter.scale * B @ A).to(dtype))
        else:
            beside = AdaptedLinear(linear, adapter.rank, adapter.scale)
            beside.lora_A.weight, beside.lora_B.weight = nn.Parameter(A), nn.Parameter(B)
            model.set_submodule(name, beside.requires_grad_(False))


def untie(model: nn.Module, adapter: Adapter) -> None:
    """Give a tied head its own matrix if the adapter changes it or the embedding, as PEFT does."""
    tied = {"lm_head", "lm_head.weight", "language_model.embed_tokens.weight"}
    if model.config.tie_word_embeddings and tied & {*adapter.pairs, *adapter.whole}:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False


def unpack_replaced(model: nn.Module, adapter: Adapter) -> None:
    """Turn quantized matrices that the adapter replaces, such as the head, back into nn.Linear."""
    for name in adapter.whole:
        linear = dict(model.named_modules()).get(name.removesuffix(".weight"))
        if name.endswith(".weight") and hasattr(linear, "dequantize"):
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
            plain.bias = linear.bias
            model.set_submodule(name.removesuffix(".weight"), plain)


def check_fits(model: nn.Module, adapter: Adapter) -> None:
    """Raise ValueError, naming a tensor, unless the model has all that the adapter changes, in the same shapes."""
    modules, parameters, r = dict(model.named_modules()), dict(model.named_parameters()), adapter.rank
    for name, (A, B) in adapter.pairs.items():
        linear = modules.get(name)
        if not (isinstance(linear, nn.Linear) or hasattr(linear, "dequantize")):
            raise ValueError(f"the adapter {adapter.folder} changes {name}, but the model has no such matrix")
        wanted, given = [[r, linear.in_features], [linear.out_features, r]], [list(A.shape), list(B.shape)]
        if given != wanted:
            raise ValueError(
                f"the adapter {adapter.folder} does not fit: its A and B for {name} are {given[0]} and {given[1]}, "
                f"but the base and the rank {r} make them {wanted[0]} and {wanted[1]}"
            )
    for name, tensor in adapter.whole.items():
        if name not in parameters:
            raise ValueError(f"the adapter {adapter.folder} has a tensor for {name}, which the model does not have")
        if tensor.shape != parameters[name].shape:
            why = f"{name} is {list(tensor.shape)} there and {list(parameters[name].shape)} in the base"
            raise ValueError(f"the adapter {adapter.folder} does not fit: {why}")
    tensors = [*adapter.pairs.items(), *((name, (tensor,)) for name, tensor in adapter.whole.items())]
    for name, parts in tensors:  # after the shapes: a hostile pickle may hold a tensor of any size in a few bytes
        if not all(part.isfinite().all() for part in parts):
            raise ValueError(f"the adapter {adapter.folder} is broken: {name} has numbers that are not finite")


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_adapter(model: nn.Module, folder: Path, lora, base: str) -> None:
    """Write the adapter that training/lora.py put on a model, and the projector, in PEFT's form and in float32.

    `lora` has its settings: rank, alpha, rslora, dropout. `base` is the checkpoint that it belongs to.
    """
    learned = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n or n.startswith(PROJECTOR)}
    tensors = {f"base_model.model.model.{name}": tensor.float().cpu().contiguous() for name, tensor in learned.items()}
    check_finite(tensors)
    settings = {
        **{"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True},
        **{"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "lora_dropout": lora.dropout},
        **{"bias": "none", "fan_in_fan_out": False},
        **{"target_modules": TARGETS, "modules_to_save": [PROJECTOR], "init_lora_weights": True},
    }
    with replaced_files(folder) as scratch:
        write_tensors(tensors, scratch / WEIGHTS[0])
        write_json(scratch / CONFIG, settings)
