"""Writes a model and its processor to a folder in the hub's layout, which transformers opens too.

Besides the weights and config.json, these are the tokenizer in two forms (sentencepiece's own file, which we read, and
the JSON of the library `tokenizers`, which transformers reads), the prompt template and the image settings. The objects
are passed in: nothing here imports the model.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from hub.files import SPACE

# A prefix of our names, and its replacement in the hub's files.
HUB = [
    ("language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("image_newline", "image_newline"),
]


def save(model: nn.Module, processor, folder: str | Path, shard_bytes: float = 5e9) -> None:
    """Write a complete checkpoint of a LLaVA and its processor. Nothing in `folder` changes until all is written.

    transformers cannot open a model that was loaded from LLaVA's authors' layout, which has no embedding for <image>.
    Raises ValueError for a quantized model, which quantize.py writes, and for numbers that are not finite.
    """
    check_can_save(model, processor)
    check_finite(dict(model.named_parameters()))
    with replaced_files(Path(folder)) as scratch:
        weights = ((hub_name(name), tensor) for name, tensor in model.named_parameters())
        write_shards([weights], scratch, shard_bytes)
        dtype = str(model.dtype).removeprefix("torch.")
        write_json(scratch / "config.json", config_json(model.config) | {"torch_dtype": dtype})
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: getattr(processor.tokenizer, name) for name in ids}
        write_json(scratch / "generation_config.json", generation | model.generation_config)
        write_processor(processor, model.config, scratch)
        write_tokenizer(processor.tokenizer, scratch)


def check_can_save(model: nn.Module, processor) -> None:
    if not all(tensor.is_floating_point() for tensor in model.parameters()):
        raise ValueError("a quantized model cannot be saved: quantize.py writes its checkpoint")
    is_like_llava = hasattr(processor.tokenizer, "sp") and hasattr(processor.template, "system")
    is_clip = model.config.vision_config.model_type == "clip_vision_model" and not model.config.image_grid_pinpoints
    if not is_like_llava or not is_clip:
        parts = "with CLIP, a tokenizer.model, and LLaVA-1.5's prompts and pictures"
        raise ValueError(f"only a model {parts} can be trained and saved")


def check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite in {tensor.dtype}, perhaps because training diverged")


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files are moved into `folder` when the block ends, or deleted if it fails."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
            yield Path(scratch)
            move_files(Path(scratch), folder)
    except BaseException:
        if is_new:
            with suppress(OSError):  # one that is not empty stays
                folder.rmdir()
        raise


def move_files(scratch: Path, folder: Path) -> None:
    files = sorted(scratch.iterdir())
    for file in files:
        os.replace(file, folder / file.name)
    names = {file.name for file in files}
    if any(name.startswith("model") for name in names):  # new weights, and not an adapter beside the old ones
        for old in (*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors*")):
            if old.name not in names:  # shards of what was here before
                old.unlink()


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file, which replaces an old one when it is complete and keeps the old one's permissions.

    A link stays a link. Lone surrogates, which UTF-8 cannot encode, are written as \\udcff, their escape in JSON.
    """
    path = Path(os.path.realpath(path))
    scratch = path.with_name(f".unfinished-{os.getpid()}")
    try:
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))
        if path.exists():
            shutil.copymode(path, scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def hub_name(name: str) -> str:
    prefix, hub = next((prefix, hub) for prefix, hub in HUB if name.startswith(prefix))
    return hub + name.removeprefix(prefix)


def write_shards(groups: list[Iterable[tuple[str, Tensor]]], folder: Path, shard_bytes: float) -> int:
    """Write named tensors in their order to files of at most `shard_bytes` each. Returns the total size in bytes.

    Every group begins a new file: a mapped file stays in memory as long as one of its tensors is used.
    """
    names, total = [], 0  # the names in each file
    for group in groups:
        shard, size = {}, 0
        for name, tensor in group:
            if shard and size + tensor.nbytes > shard_bytes:
                names.append(write_shard(shard, folder, len(names)))
                shard, size = {}, 0
            shard[name] = tensor.detach().contiguous()
            size, total = size + tensor.nbytes, total + tensor.nbytes
        if shard:
            names.append(write_shard(shard, folder, len(names)))
    files = ["model.safetensors"]
    if len(names) > 1:
        files = [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
        places = {name: file for file, held in zip(files, names, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
    for i, file in enumerate(files):
        (folder / f"shard-{i}").rename(folder / file)
    return total


def write_shard(tensors: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    write_tensors(tensors, folder / f"shard-{number}")
    return list(tensors)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a new safetensors file with the permissions that the umask gives; save_file alone makes it private."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def config_json(config) -> dict:
    text = asdict(config.text_config)
    kind, factor = text.pop("rope_type"), text.pop("rope_factor")
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    llama3 = {name: text.pop(name) for name in names}
    text["rope_parameters"] = {"rope_type": kind, "rope_theta": text["rope_theta"]}
    if kind != "default":
        text["rope_parameters"] |= {"factor": factor} | (llama3 if kind == "llama3" else {})
    if text.pop("qkv_bias"):  # Qwen2 in the reference, which has a flag for windows
        text["use_sliding_window"] = text["sliding_window"] is not None
    if text["layer_types"] is None:
        del text["layer_types"]
    head = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    settings = {name: value for name, value in asdict(config).items() if name != "image_grid_pinpoints"}
    return head | settings | {"text_config": text, "image_seq_length": config.image_seq_length}


def write_processor(processor, config, folder: Path) -> None:
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": 1,  # CLIP's class token
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    # in transformers only LlavaImageProcessor supports do_pad
    kind = "LlavaImageProcessor" if processor.image_processor.do_pad else "CLIPImageProcessor"
    image_settings = {"image_processor_type": kind, "do_convert_rgb": True, **asdict(processor.image_processor)}
    write_json(folder / "processor_config.json", settings)
    write_json(folder / "preprocessor_config.json", image_settings | {"processor_class": "LlavaProcessor"})
    (folder / "chat_template.jinja").write_text(jinja(processor.template), "utf-8")


def jinja(template) -> str:
    """A template as the Jinja2 source of chat_template.jinja."""
    texts = template.system + " ", template.user, template.user_end, template.assistant, template.assistant_end
    system, user, user_end, assistant, assistant_end = map(json.dumps, texts)
    opening = "{% if messages[0]['role'] != 'system' %}{{ " + system + " }}{% endif %}" if template.system else ""
    return (
        opening + "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ " + user + " }}"
        "{% elif message['role'] == 'assistant' %}{{ " + assistant + " }}{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') }}"
        "{% endif %}"
        "{% if message['role'] == 'user' %}{{ " + user_end + " }}"
        "{% elif message['role'] == 'assistant' %}{{ " + assistant_end + " }}{% else %}{{ ' ' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ " + json.dumps(template.assistant.rstrip()) + " }}{% endif %}"
    )  # fmt: skip


def write_tokenizer(tokenizer, folder: Path) -> None:
    tokens = [
        {"id": i, "content": name, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, name in sorted(tokenizer.special_names.items())
    ]
    keys = ("bos_token", "eos_token", "pad_token", "image_token")
    names = {key: tokenizer.special_names[getattr(tokenizer, f"{key}_id")] for key in keys} | {"unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # LlamaTokenizer would ignore tokenizer.json's normalizer
        "added_tokens_decoder": {t["id"]: {k: v for k, v in t.items() if k != "id"} for t in tokens},
        **names,
        "add_bos_token": True,
        "padding_side": "left",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    (folder / "tokenizer.model").write_bytes(tokenizer.sp.serialized_model_proto())
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer, tokens))


def tokenizer_json(tokenizer, tokens: list[dict]) -> dict:
    """The same tokenizer in the form of the library `tokenizers`: pairs of pieces in the order they merge."""
    vocab = {tokenizer.sp.id_to_piece(i): i for i in range(tokenizer.sp.vocab_size())}
    merges = [  # of all ways to cut a piece in two, those whose halves are pieces; the best-scored piece first
        (-tokenizer.sp.get_score(i), -cut, piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        if not (tokenizer.sp.is_byte(i) or piece in tokenizer.special_tokens)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    bos = tokenizer.special_names[tokenizer.bos_token_id]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab}
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    spaces = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {**model, "merges": [[left, right] for _, _, left, right in sorted(merges)]},
    }
