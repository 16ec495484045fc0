"""Where a checkpoint keeps its chat template, a program in Jinja2's language. family/chat_template.py runs it."""

from pathlib import Path

from hub.files import read_json

# In the order of transformers: its processors read the first three, its tokenizers the last two.
FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
MAX_TEMPLATE = 100_000  # characters


def find_chat_template(folder: str | Path) -> str | None:
    """The chat template in a checkpoint's folder, or None. Raises ValueError for one that cannot be used."""
    return next((template for name in FILES if (template := read_template(Path(folder, name)))), None)


def read_template(file: Path) -> str | None:
    """The chat template in one file; None or "" if there is none."""
    is_text = file.suffix == ".jinja" and file.is_file()
    template = file.read_text("utf-8", "replace") if is_text else read_json(file).get("chat_template")
    if isinstance(template, list):  # of {"name": ..., "template": ...}
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1] if named else 0
    template = template.get("default", 0) if isinstance(template, dict) else template
    if not isinstance(template, str | None):
        raise ValueError(f"{file}: chat_template must be a text, or templates by name with one named default")
    if template and len(template) > MAX_TEMPLATE:
        raise ValueError(f"{file}: the chat template has {len(template)} characters, and the limit is {MAX_TEMPLATE}")
    return template


def special_tokens(folder: Path) -> dict[str, str]:
    """The variables bos_token, eos_token and so on of a chat template, from tokenizer_config.json."""
    names = {}
    for key, value in read_json(folder / "tokenizer_config.json").items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            names[key] = text
    return names
