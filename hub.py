"""Where a checkpoint is: a folder, or an id on the hub, whose files lie in a cache that all programs share."""

import os
import re
from pathlib import Path


def find_checkpoint(path: str | Path) -> Path:
    """A folder as it is; a hub id such as llava-hf/llava-1.5-7b-hf from the local hub cache, or fetched into it."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path} is neither a folder nor a hub id such as llava-hf/llava-1.5-7b-hf")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser() / f"models--{str(path).replace('/', '--')}"
    if (cache / "refs" / "main").is_file():
        snapshot = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
        if (snapshot / "config.json").is_file():
            return snapshot
    try:
        from huggingface_hub import snapshot_download

        files = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.bin"]
        return Path(snapshot_download(str(path), allow_patterns=files))
    except Exception as error:  # not installed, no network, no such id: to the user it is all the same
        get = f"pip install huggingface_hub && hf download {path}"
        raise FileNotFoundError(f"{path} is no folder here, nor in the hub cache; if it is a hub id: {get}") from error
