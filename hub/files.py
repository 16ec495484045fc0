"""Where a checkpoint's files are: a folder, or a hub id in the local cache; its weights; its JSON."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor
from torch import Tensor

SPACE = "\u2581"  # sentencepiece's visible space, "▁"
BUNDLED = Path(__file__).parent.parent / "checkpoints" / "tiny-llava"  # the model that comes with the project


def read_json(path: Path) -> dict:
    """The JSON object in an optional file; {} if the file does not exist. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not a JSON object")
    return settings


def open_sentencepiece(model: bytes) -> tuple[SentencePieceProcessor, dict[str, int]]:
    """A tokenizer.model, and the ids of its control tokens and of <unk>. Raises ValueError if it cannot be used."""
    try:
        sp = SentencePieceProcessor(model_proto=model or b"empty")
        pieces = sp.id_to_piece(list(range(sp.vocab_size())))
        special = {piece: i for i, piece in enumerate(pieces) if sp.is_control(i)}
        special[sp.id_to_piece(sp.unk_id())] = sp.unk_id()
    except (RuntimeError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer.model is not a sentencepiece model ({error})") from error
    if min(sp.bos_id(), sp.eos_id()) < 0:
        raise ValueError("tokenizer.model has no <s>, or no </s>")
    return sp, special


def find_checkpoint(path: str | Path, download: bool = True) -> Path:
    """The folder of a checkpoint, given as a folder or as a hub id such as llava-hf/llava-1.5-7b-hf.

    A hub id is looked up in the local hub cache, or downloaded if huggingface_hub is installed; else FileNotFoundError.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise FileNotFoundError(f"{path} is neither a folder nor a hub id such as llava-hf/llava-1.5-7b-hf")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser() / f"models--{str(path).replace('/', '--')}"
    if (cache / "refs" / "main").is_file():
        snapshot = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
        if (snapshot / "config.json").is_file():
            return snapshot
    if not download:
        raise FileNotFoundError(f"{path} is not in the hub cache")
    try:
        from huggingface_hub import snapshot_download

        files = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.bin"]
        return Path(snapshot_download(str(path), allow_patterns=files))
    except Exception as error:  # not installed, no network, no such id: the user's next step is the same
        get = f"pip install huggingface_hub && hf download {path}"
        why = f"is not a folder here, not in the hub cache, and could not be downloaded ({type(error).__name__})"
        raise FileNotFoundError(f"{path} {why}; if it is a hub id, run: {get}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: one file, or the shards listed in an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
                raise ValueError(f"{index} does not map tensors to files of its own folder")
            files = [folder / shard for shard in sorted(set(shards.values()))]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing, but {index.name} lists it")
            return files
    raise FileNotFoundError(f"{folder} has no weights (model.safetensors or pytorch_model.bin): download them too")


def tensor_files(folder: Path) -> list[tuple[Path, str]]:
    """A checkpoint's weight files, each with the prefix of the names to read from it ("" for all).

    In the layout of LLaVA's authors the vision tower may be a checkpoint of its own, a whole CLIP.
    """
    files = [(file, "") for file in weight_files(folder)]
    config = read_json(folder / "config.json")
    if "mm_vision_tower" not in config:
        return files
    from hub.authors import names_in, tower_folder

    if any(".vision_tower." in name for file, _ in files for name in names_in(file)):
        return files
    return files + [(file, "vision_model.") for file in weight_files(tower_folder(config, folder))]


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch pickle that holds tensors and nothing else, mapped into memory."""
    with file_errors_as_value_error(file):
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict) or {type(value) for item in tensors.items() for value in item} != {str, Tensor}:
        raise ValueError(f"{file} does not hold tensors by name")
    if odd := [name for name, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_meta]:
        raise ValueError(f"{file}: tensor {odd[0]} is sparse or has no data")
    return tensors


@contextmanager
def file_errors_as_value_error(file: Path) -> Iterator[None]:
    """Turns the various errors that readers of weight files raise into a ValueError of one line."""
    try:
        yield
    except SafetensorError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{file} is truncated or not a safetensors file ({why})") from error
    except Exception as error:
        raise ValueError(f"{file} is broken, or holds more than tensors and is rejected as unsafe") from error
