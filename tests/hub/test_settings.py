"""How the settings of a decoder are read. Whole folders in every layout are in core/test_load_weights.py."""

import pytest

from llava import LlavaConfig

pytestmark = pytest.mark.quick


def decoder(settings: dict):
    return LlavaConfig(text_config=settings).text_config


def test_absent_settings_take_the_familys_defaults():
    llama, mistral = decoder({}), decoder({"model_type": "mistral", "hidden_size": 64})
    assert (llama.hidden_size, llama.num_key_value_heads, llama.head_dim, llama.sliding_window) == (4096, 32, 128, None)
    assert (mistral.intermediate_size, mistral.num_key_value_heads, mistral.sliding_window) == (14336, 8, 4096)
    assert mistral.model_type == "mistral" and mistral.head_dim == 2
    assert decoder({"model_type": "mistral", "sliding_window": None}).sliding_window is None


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_old_and_new_files_say_the_same_of_rope(kind):
    old = decoder({"rope_theta": 500.0, "rope_scaling": {kind: "linear", "factor": 3.0}})
    new = decoder({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}})
    assert (old.rope_theta, old.rope_factor) == (new.rope_theta, new.rope_factor) == (500.0, 3.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_scaling": {"type": "dynamic"}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 5}, "share 5"),
    ],
    ids=str,
)
def test_settings_that_are_not_implemented_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        decoder(settings)
