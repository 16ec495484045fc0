"""What we save loads again, and transformers opens it; a failure leaves the folder as it was."""

import pytest
import torch
import transformers
from PIL import Image
from torch.testing import assert_close

from clip import ImageProcessor
from folders import close, load
from hub import writer
from llava import LlavaProcessor
from reference import reference_model
from tokenizer import Tokenizer

pytestmark = pytest.mark.parity


def processor_for(model, tokenizer_model):
    pictures = ImageProcessor(size={"shortest_edge": 28}, crop_size=28, do_pad=True)
    return LlavaProcessor(pictures, Tokenizer(tokenizer_model), model.config.image_seq_length, "v1")


@pytest.mark.parametrize(
    ("text", "top"),
    [
        ({}, {}),
        ({}, {"tie_word_embeddings": True}),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5}, {}),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}, {}),
        ({}, {"vision_feature_layer": [-2, 1]}),
    ],
    ids=["llama", "tied-head", "mistral", "linear-rope", "several-layers"],
)
def test_what_we_save_loads_again_and_answers_alike_in_the_reference(tmp_path, tokenizer_model, text, top):
    top = {"image_token_index": 300, "pad_token_id": 301, **top}
    reference_model({}, text | {"vocab_size": 320}, **top).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    processor = processor_for(model, tokenizer_model)
    writer.save(model, processor, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the picture?"}]}]
    their_processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    prompt = their_processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    inputs = their_processor(images=picture, text=prompt, return_tensors="pt")
    ours = LlavaProcessor.from_pretrained(tmp_path / "ours")(images=picture, text=prompt)
    assert torch.equal(ours.input_ids, inputs.input_ids)
    close(ours.pixel_values, inputs.pixel_values, 0.05)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **options), theirs.generate(**inputs, **options))


def test_saving_over_a_checkpoint_leaves_nothing_of_it(folder, tokenizer_model):
    model = load(folder)
    processor = processor_for(model, tokenizer_model)
    writer.save(model, processor, folder, shard_bytes=50e3)
    assert 5 < len(list(folder.glob("model-*.safetensors"))) < 20 and not (folder / "model.safetensors").exists()
    assert_close(load(folder).state_dict(), model.state_dict(), atol=0, rtol=0)
    (folder / "model_of_mine.safetensors").write_text("nothing that we wrote")
    writer.save(model, processor, folder)
    assert {file.name for file in folder.glob("model*")} == {"model.safetensors", "model_of_mine.safetensors"}
    assert_close(load(folder).state_dict(), model.state_dict(), atol=0, rtol=0)


def test_a_failure_while_saving_leaves_the_folder_as_it_was(folder, tokenizer_model, monkeypatch):
    model, written = load(folder), []
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(writer, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        writer.save(model, processor_for(model, tokenizer_model), folder, shard_bytes=50e3)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
