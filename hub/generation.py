"""A checkpoint's generation_config.json together with the options of a call: how to choose tokens, and when to stop."""

import warnings
from dataclasses import dataclass, fields
from pathlib import Path

from hub.files import read_json


@dataclass
class GenerationConfig:
    """How to choose tokens and when to stop: the supported fields of generation_config.json."""

    max_new_tokens: int | None = None  # 20 if neither this nor max_length is given
    max_length: int | None = None  # the same limit, prompt included
    do_sample: bool = False  # False: always the most likely token (greedy)
    temperature: float = 1.0  # below 1 sharpens the distribution, above 1 flattens it
    top_k: int = 50  # sample among this many most likely tokens; 0 for all
    top_p: float = 1.0  # sample among the most likely tokens that together have this probability (Holtzman et al. 2019)
    repetition_penalty: float = 1.0  # above 1: tokens already present become less likely (Keskar et al. 2019)
    eos_token_id: int | list[int] = 2  # a row that produces one of these is finished; [] for none
    pad_token_id: int | None = None  # fills finished rows

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.do_sample and not self.temperature >= 1e-6:  # scores divided by less overflow
            raise ValueError(f"temperature must be at least 1e-6, not {self.temperature}, when sampling")
        if self.do_sample and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")

    @property
    def eos_ids(self) -> list[int]:
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    @property
    def pad_id(self) -> int:  # fills rows that are finished
        return self.pad_token_id if self.pad_token_id is not None else (self.eos_ids or [0])[0]

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may follow a prompt of this length."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens or 20
        if self.max_length <= prompt_length:
            raise ValueError(f"max_length {self.max_length} leaves no room for an answer after {prompt_length} tokens")
        return self.max_length - prompt_length

    @classmethod
    def merged(cls, defaults: dict, options: dict) -> "GenerationConfig":
        """A checkpoint's own settings, overridden by the caller's. `options` may also have a seed, which is not kept.

        Warns if the caller gave options for sampling but the result is greedy.
        """
        options = {name: value for name, value in options.items() if value is not None}
        known = {f.name for f in fields(cls)}
        if unknown := set(options) - known - {"seed"}:
            raise ValueError(f"generate accepts {', '.join(sorted(known))}, but not {', '.join(sorted(unknown))}")
        settings = {name: value for name, value in (defaults | options).items() if name in known and value is not None}
        config = cls(**settings)
        unused = sorted(set(options) & {"seed", "temperature", "top_k", "top_p"})
        if unused and not config.do_sample:
            warnings.warn(f"without do_sample=True these have no effect: {', '.join(unused)}", stacklevel=4)
        return config


def read_generation_settings(folder: Path) -> dict:
    """The entries of generation_config.json that are not null, checked. An eos token may also be in config.json."""
    file = folder / "generation_config.json"
    settings = {name: value for name, value in read_json(file).items() if value is not None}
    if "eos_token_id" not in settings:
        config = read_json(folder / "config.json")
        for part in (config.get("text_config"), config):
            if isinstance(part, dict) and part.get("eos_token_id") is not None:
                settings["eos_token_id"] = part["eos_token_id"]
    from hub.ranges import check_ranges

    return check_ranges(settings, file)
