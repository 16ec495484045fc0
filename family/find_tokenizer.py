"""Chooses a checkpoint's tokenizer class by the checkpoint's files."""

from pathlib import Path

from hub.files import read_json
from tokenizer import Tokenizer


def find_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.model is used before tokenizer.json, unless a special token includes the spaces around it (Phi-3).

    Raises ValueError or FileNotFoundError for files that are missing, damaged or not implemented.
    """
    file, config = folder / "tokenizer.json", read_json(folder / "tokenizer_config.json")
    name = includes_spaces(config)
    if not file.is_file() and name:
        raise ValueError(f"{folder} has no tokenizer.json, which is needed for {name[:40]!r} and the spaces around it")
    if not file.is_file() or ((folder / "tokenizer.model").is_file() and not name):
        return Tokenizer.from_pretrained(folder)
    settings = read_json(file)
    model = settings.get("model")
    try:
        if isinstance(model, dict) and model.get("byte_fallback"):
            from family.sentencepiece_json import SentencePieceJsonTokenizer as Kind
        else:
            from family.byte_level_bpe import ByteLevelTokenizer as Kind
    except ModuleNotFoundError as error:
        raise ValueError(f"{file} needs {error.name}: pip install -r requirements-family.txt") from error
    return Kind.from_settings(settings, config, file)


def includes_spaces(config: dict) -> str | None:
    """The first special token of a tokenizer_config.json with lstrip or rstrip, or None."""
    added = config.get("added_tokens_decoder")
    tokens = added.values() if isinstance(added, dict) else ()
    found = [token for token in tokens if isinstance(token, dict) and (token.get("lstrip") or token.get("rstrip"))]
    return str(found[0].get("content")) if found else None
