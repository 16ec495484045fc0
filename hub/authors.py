"""The layout of LLaVA's authors (`liuhaotian/llava-v1.5-*`): one config.json, the decoder's with additions."""

from pathlib import Path

from safetensors import safe_open

from hub.files import file_errors_as_value_error, find_checkpoint, read_json, read_pickle


def hub_config(config: dict, folder: Path) -> dict:
    """The config.json of LLaVA's authors, which is the decoder's with additions, in the hub's form."""
    if config.get("image_aspect_ratio") == "anyres":
        raise ValueError(f"{folder} is LLaVA-1.6 in its authors' layout: use the hub's llava-hf/llava-v1.6-* instead")
    projector, aspect = config.get("mm_projector_type", "linear"), config.get("image_aspect_ratio", "square")
    if projector != "mlp2x_gelu" or aspect not in ("pad", "square"):
        raise ValueError(f"{folder} is not LLaVA-1.5: mm_projector_type is {projector}, image_aspect_ratio {aspect}")
    tower = read_json(tower_folder(config, folder) / "config.json")
    return {
        "vision_config": tower.get("vision_config", tower),
        "text_config": {**config, "model_type": "mistral" if "mistral" in str(config.get("model_type")) else "llama"},
        "image_token_index": config.get("vocab_size", 32000),  # the id after the last: it has no row of its own
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full"
        if config.get("mm_vision_select_feature") == "cls_patch"
        else "default",
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "torch_dtype": config.get("torch_dtype"),
    }


def tower_folder(config: dict, folder: Path) -> Path:
    """In the layout of LLaVA's authors the vision tower is a checkpoint of its own, named in config.json."""
    tower = config["mm_vision_tower"]
    if not isinstance(tower, str):
        raise ValueError(f"{folder / 'config.json'}: mm_vision_tower is not the path of a vision tower")
    return folder / tower if (folder / tower).is_dir() else find_checkpoint(tower)


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a weight file."""
    if file.suffix == ".bin":
        return list(read_pickle(file))
    with file_errors_as_value_error(file), safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
