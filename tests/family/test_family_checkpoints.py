"""Whole checkpoints of other members of the family, as transformers saves them: from a picture and a question to an
answer."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.testing import assert_close
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import llava
from cli.answer import end_ids, render
from cli.chat import Chat
from first_difference import PICTURE, compare, first_difference
from folders import edit_json
from hub.files import BUNDLED
from hub.writer import write_tokenizer
from llava import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from reference import reference_model
from tokenizer import Tokenizer
from tokenizers_at_hand import SPECIAL, byte_level_tokenizer
from training.lora import Lora
from training.run import train_on_records
from training.run_stage import Place
from training.tune_adapter import train_adapter

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is the same?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Both show a cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which colours, naïve or 漢字?"}]},
]


@pytest.fixture(scope="module")
def interleave(tmp_path_factory):
    """A small llava-interleave-qwen (SigLIP, Qwen2 with a tied head, byte-level BPE): folder, model, processor."""
    folder = tmp_path_factory.mktemp("interleave")
    tokenizer = byte_level_tokenizer(SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    text = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 20}
    text |= {"tie_word_embeddings": True, "max_position_embeddings": 400}
    vision = {"model_type": "siglip", "vision_use_head": False}
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id}
    strategy = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    model = reference_model(vision, text, tie_word_embeddings=True, **strategy, **ids)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    side = {"height": 28, "width": 28}
    processor = transformers.LlavaProcessor(
        SiglipImageProcessorPil(size=side), tokenizer, patch_size=7, vision_feature_select_strategy="full",
        chat_template=CHATML, num_additional_image_tokens=0,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A small LLaVA with Llama 3.1: CLIP, its RoPE, a BOS token, a template for messages of plain text."""
    folder = tmp_path_factory.mktemp("llama3")
    headers = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>", "<pad>"]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<pad>"}
    tokenizer = byte_level_tokenizer(headers, **names)
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    text = {"vocab_size": len(tokenizer) + 8, "num_key_value_heads": 2, "rope_parameters": rope}
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id}
    model = reference_model({}, text, **ids)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model.save_pretrained(folder)
    tokenizer.chat_template = LLAMA3
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@torch.no_grad()
def test_a_prompt_begins_with_one_bos_and_a_template_for_text_gets_text(llama3):
    folder, reference, theirs = llama3
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhich colours?"}]
    expected = theirs.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
    prompt = render(processor, "Which colours?", 1, "Be brief.")
    assert "<|begin_of_text|>" + prompt == expected
    expected = expected.replace("<image>", "<image>" * 16)
    inputs = processor(text=prompt, images=pictures()[:1])
    assert inputs.input_ids[0].tolist() == theirs(expected, add_special_tokens=False).input_ids
    ids = model.generate(**inputs, max_new_tokens=8)
    theirs = reference.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert ids.tolist() == theirs.tolist() and len(model.generation_config["eos_token_id"]) == 2
    model.generation_config = {"eos_token_id": processor.tokenizer.bos_token_id}  # as some files have it
    assert end_ids(model, processor, {}) == [processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id]
    chat = Chat(model, processor, "Be brief.", max_new_tokens=2)
    assert processor.tokenizer.eos_token_id in chat.ends
    chat.pictures = [("a", pictures()[0])]
    assert chat.turn_ids("Which colours?") == inputs.input_ids[0].tolist()


# --- Special tokens with other names, and with the spaces around them ------------------------------------------------

JOYCAPTION = (  # it writes the picture's token itself, in front of the first question
    "{{ bos_token }}{% set ns = namespace(first=true) %}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'user' and ns.first %}{% set ns.first = false %}{{ '<|begin|><|picture|><|end|>' }}"
    "{{ message['content'].replace('<|picture|>', '').lstrip() }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@torch.no_grad()
def test_the_image_token_may_have_another_name(tmp_path, capsys):
    """A small JoyCaption: SigLIP, Llama 3.1, and a reserved token in the place of <image>."""
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin|>"]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"}
    tokenizer = byte_level_tokenizer([*special, "<|picture|>", "<|end|>"], **names)
    image_token = tokenizer.convert_tokens_to_ids("<|picture|>")
    text = {"vocab_size": len(tokenizer) + 8, "num_key_value_heads": 2, "max_position_embeddings": 400}
    ids = {"image_token_index": image_token, "vision_feature_select_strategy": "full"}
    reference = reference_model({"model_type": "siglip", "vision_use_head": False}, text, **ids)
    theirs = transformers.LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, patch_size=7, chat_template=JOYCAPTION,
        vision_feature_select_strategy="full", num_additional_image_tokens=0, image_token="<|picture|>",
    )  # fmt: skip
    reference.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    model, ours = LlavaForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    prompt = theirs.apply_chat_template([{"role": "user", "content": "Which colours?"}], add_generation_prompt=True)
    asked = render(ours, "Which colours?", 1, None)
    assert "<|begin_of_text|>" + asked.replace("<image>", "<|picture|>") == prompt
    inputs = ours(text=asked, images=pictures()[:1])
    expected = theirs(text=prompt, images=pictures()[:1], return_tensors="pt", add_special_tokens=False)
    assert torch.equal(inputs.input_ids, expected["input_ids"]) and (inputs.input_ids == image_token).sum() == 16
    assert_close(model(**inputs).logits, reference(**expected).logits, atol=2e-4, rtol=2e-4)
    assert ours.decode(inputs.input_ids[0]).count("<|picture|>") == 16
    chat = Chat(model, ours, max_new_tokens=2)
    chat.pictures = [("a", pictures()[0])]
    assert chat.turn_ids("Which colours?") == inputs.input_ids[0].tolist()
    assert differs_nowhere(tmp_path)
    with pytest.raises(ValueError, match="<image>"):  # this template writes it without a picture too
        ours(text=render(ours, "Which colours?", 0, None))
    edit_json(tmp_path / "config.json", image_token_index=7000)
    with pytest.raises(ValueError, match="<image> is token None for the tokenizer and token 7000"):
        AutoProcessor.from_pretrained(tmp_path)


def differs_nowhere(folder) -> bool:
    found = compare(folder, PICTURE, "Which colours?", 1e-4)
    return first_difference(found, 1e-4) is None and "language_model.layers.1.mlp" in found


def test_first_difference_compares_this_family_too(interleave):
    assert differs_nowhere(interleave[0])


def test_training_says_in_a_sentence_that_it_does_not(interleave, llama3, tmp_path):
    """Before it reads the conversations."""
    for folder in (interleave[0], llama3[0]):
        with pytest.raises(ValueError, match=r"only a model with CLIP, a tokenizer.model, .* can be trained and saved"):
            train_on_records(Place(tmp_path / "out"), tmp_path / "none.json", checkpoint=folder)
        with pytest.raises(ValueError, match=r"--lora needs a checkpoint with LLaVA-1.5's prompt template"):
            train_adapter(Place(tmp_path / "out"), tmp_path / "none.json", None, folder, 1, 1, 1e-4, 1e-5, Lora(2, 4))
    assert not (tmp_path / "out").exists()


def test_without_tokenizer_model_and_template_it_is_a_llava(tmp_path):
    """As bczhou's TinyLLaVA: the prompts are those of the hub's LLaVA-1.5, and the ids those of tokenizer.model."""
    whole = Tokenizer.from_pretrained(BUNDLED)
    text = {"vocab_size": max(whole.special_names) + 1}
    reference_model(text=text, image_token_index=whole.image_token_id, pad_token_id=0).save_pretrained(tmp_path)
    write_tokenizer(whole, tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    processor = AutoProcessor.from_pretrained(tmp_path)
    prompt = render(processor, "What is it?", 1, None)
    assert prompt == "USER: <image>\nWhat is it? ASSISTANT:"
    ids = processor(text=prompt, images=pictures()[:1]).input_ids[0].tolist()
    assert ids == whole.encode(prompt.replace("<image>", "<image>" * 16))


@pytest.fixture
def phi3(tmp_path):
    """The files of a tokenizer as Phi-3's: its special tokens include the spaces after them."""
    write_tokenizer(Tokenizer.from_pretrained(BUNDLED), tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens = settings["added_tokens"]
    for name in ("<|user|>", "<|end|>", "<|assistant|>"):
        tokens.append(tokens[-1] | {"id": tokens[-1]["id"] + 1, "content": name, "rstrip": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={token["id"]: token for token in tokens})
    return tmp_path


def test_special_tokens_may_include_the_spaces_after_them(phi3):
    assert (phi3 / "tokenizer.model").is_file()  # which tokenizer.py would read, but it knows no such tokens
    ours, theirs = AutoTokenizer.from_pretrained(phi3), transformers.AutoTokenizer.from_pretrained(phi3)
    texts = ["<|user|>\n<image>\nWhat is it?<|end|>\n<|assistant|>\n", "<|end|>  \n\n<s> a <|user|> b", "<|user|> "]
    for text in texts:
        assert ours.encode(text) == theirs(text).input_ids
    (phi3 / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.json, which is needed for '<\|user\|>' and the spaces"):
        AutoTokenizer.from_pretrained(phi3)


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (31, 50, 3), np.uint8)
    return [Image.fromarray(noise), Image.linear_gradient("L").convert("RGB")]


@torch.no_grad()
def test_prompt_pixels_logits_and_answer_are_the_references(interleave):
    folder, reference, theirs = interleave
    model, ours = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    prompt = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert ours.apply_chat_template(MESSAGES, add_generation_prompt=True) == prompt
    expected = theirs(text=[prompt, "<|im_start|>user"], images=pictures(), padding=True, return_tensors="pt")
    inputs = ours(text=[prompt, "<|im_start|>user"], images=pictures(), padding=True)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    for name in inputs:
        assert_close(inputs[name], expected[name], atol=0, rtol=0)
    real = inputs.attention_mask.bool()
    assert_close(model(**inputs).logits[real], reference(**expected).logits[real], atol=2e-4, rtol=2e-4)
    ids = model.generate(**inputs, max_new_tokens=12)
    assert ids.tolist() == reference.generate(**expected, max_new_tokens=12, do_sample=False).tolist()
    answer = ids[:, inputs.input_ids.shape[1] :]
    assert ours.batch_decode(answer, skip_special_tokens=True) == theirs.batch_decode(answer, skip_special_tokens=True)


def test_the_tokenizer_alone_needs_no_config(interleave, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((interleave[0] / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nWhich colours? naïve 漢字 <image>"
    assert tokenizer.encode(text) == interleave[2].tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@torch.no_grad()
def test_a_chat_has_the_tokens_of_the_rendered_conversation(interleave):
    model, processor = (cls.from_pretrained(interleave[0]) for cls in (LlavaForConditionalGeneration, AutoProcessor))
    chat = Chat(model, processor, max_new_tokens=4)
    chat.pictures = [("a", pictures()[0]), ("b", pictures()[1])]
    chat.say("What is the same?", lambda text: None)
    first = processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    expected = processor(text=first, images=pictures()).input_ids[0].tolist()
    assert chat.ids[: len(expected)] == expected
    answer = chat.ids[len(expected) :]
    chat.say("Which colours, naïve or 漢字?", lambda text: None)
    ids = chat.ids[len(expected) + len(answer) :]
    said = processor.decode(ids)
    assert said.startswith("<|im_end|><|im_start|>user \nWhich colours, naïve or 漢字?<|im_end|><|im_start|>assistant")
    assert expected + answer + ids == chat.ids and chat.cache.length in (len(chat.ids), len(chat.ids) - 1)


def run(capsys, *arguments) -> str:
    import cli

    code = cli.main(LlavaForConditionalGeneration, llava.LlavaProcessor, [str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_the_command_answers_describes_and_explains(interleave, capsys, tmp_path):
    picture = tmp_path / "a.png"
    pictures()[0].save(picture)
    asked = ("--model", interleave[0], "--image", picture, "--prompt", "Which colours?", "--max-new-tokens", 5)
    record = json.loads(run(capsys, *asked, "--json", "--system", "Be brief."))
    assert record["completion_tokens"] <= 5 and record["settings"]["template"] == "own"
    assert json.loads(run(capsys, *asked, "--json", "--quantize", "int8"))["settings"]["quantize"] == "int8"
    run(capsys, *asked, "--explain", tmp_path / "page.html")
    assert "</script>" in (tmp_path / "page.html").read_text()
    described = run(capsys, "--describe", interleave[0])
    assert "siglip_vision_model and qwen2" in described and "mismatches  none" in described
