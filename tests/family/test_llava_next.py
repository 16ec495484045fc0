"""LLaVA-1.6 against the reference: sizes, pixels, prompts, every output and answers, for pictures of many shapes."""

import json
import random
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.testing import assert_close
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import cli
from cli import loading, memory
from cli.chat import Chat
from clip import ImageProcessor
from family.llava_next import LlavaNextImageProcessor, best_size, count_tokens, most_tokens
from first_difference import PICTURE, compare, first_difference
from folders import edit_json
from hub.files import BUNDLED
from hub.ranges import GRIDS
from hub.writer import save
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from load_weights import our_name
from quantize import quantize_model
from reference import DECODERS, TEXT, VISION, image_vectors
from training.lora import Lora
from training.run import train_on_records
from training.run_stage import Place
from training.tune_adapter import train_adapter

SIDE = VISION["image_size"]  # 28, in patches of 7: 4 x 4 patches in a tile
SMALL_GRIDS = [[n * SIDE // 336 for n in grid] for grid in GRIDS]
# (H, W), named by what they are in tiles of 28
SHAPES = {
    "one pixel": (1, 1),
    "a strip": (20, 300),
    "a thread": (1, 500),
    "an upright thread": (500, 1),
    "a tile": (28, 28),
    "one pixel less than a tile": (27, 28),
    "one pixel more than a tile": (28, 29),
    "exactly two tiles": (28, 56),
    "exactly four tiles": (56, 56),
    "exactly three tiles, upright": (84, 28),
    "one pixel more than four tiles": (57, 56),
    "wide": (31, 90),
    "tall": (101, 43),
    "large": (480, 640),
}
VARIANTS = {
    "llama": ({}, {}),
    "mistral": ({"model_type": "mistral", "num_key_value_heads": 2}, {"vision_feature_layer": [-2, 1]}),
}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def close(ours, theirs):
    assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def write_checkpoint(folder, text: dict, top: dict):
    """A random LLaVA-1.6 and its processor, saved by transformers, with the bundled tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    image_token, pad = (tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<pad>"))
    text = TEXT | {"vocab_size": len(tokenizer) + 10, "max_position_embeddings": 1000} | text
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=DECODERS[text.pop("model_type", "llama")](**text),
        **{"image_token_index": image_token, "pad_token_id": pad, "image_grid_pinpoints": SMALL_GRIDS} | top,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    model.generation_config.eos_token_id = 2
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=SMALL_GRIDS
    )
    template = transformers.AutoProcessor.from_pretrained(BUNDLED).chat_template
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.copyfile(BUNDLED / "tokenizer.model", folder / "tokenizer.model")
    return model, processor


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """folder, the reference's model and processor, and ours."""
    folder = tmp_path_factory.mktemp("next")
    theirs = write_checkpoint(folder, *VARIANTS[request.param])
    return folder, *theirs, *open_both(folder)


def open_both(folder) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next")
    write_checkpoint(folder, *VARIANTS["llama"])
    return folder


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


# --- Sizes and pixels -------------------------------------------------------------------------------------------------


OF_THE_7B = LlavaConfig({"image_size": 336, "patch_size": 14}, image_grid_pinpoints=GRIDS)


REAL_SHAPES = [(1, 1), (20, 300), (336, 336), (335, 336), (336, 337), (672, 672), (673, 671), (480, 640), (336, 1008)]
REAL_SHAPES += [(1008, 336), (1, 3000), (900, 31), (1200, 700), (337, 672)]


@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_pixels_of_the_7b_are_equal_to_the_bit(shape):
    theirs = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    expected = theirs(noise(*shape), return_tensors="pt")
    assert expected.image_sizes.tolist() == [list(shape)]
    plain = ImageProcessor({"shortest_edge": 336}, {"height": 336, "width": 336})
    assert torch.equal(LlavaNextImageProcessor.of(plain, OF_THE_7B)([noise(*shape)]), expected.pixel_values)


def test_grids_and_tokens_of_random_sizes_are_the_references():
    theirs = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)
    theirs.patch_size, theirs.num_additional_image_tokens = 14, 0
    theirs.image_processor = LlavaNextImageProcessorPil()
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 2000, (1000, 2)).tolist() + (2 ** rng.uniform(0, 14, (1000, 2))).astype(int).tolist()
    sizes += [[n * k + d, m * k] for n in (1, 2, 3) for m in (1, 2, 3) for k in (24, 336) for d in (-1, 0, 1)]
    for size in sizes:
        assert best_size(*size, GRIDS) == tuple(select_best_resolution(size, GRIDS)), size
        assert count_tokens(*size, OF_THE_7B) == theirs._get_number_of_features(*size, 336, 336), size
        assert count_tokens(*size, OF_THE_7B) <= most_tokens(OF_THE_7B) == 2928


# --- Model and processor ----------------------------------------------------------------------------------------------


def asked(processor, *shapes, **options) -> dict:
    """One prompt for each shape, of different lengths."""
    prompts = [f"USER: <image>\nWhat is{' it' * i}? ASSISTANT:" for i in range(len(shapes))]
    images = [noise(*shape, seed) for seed, shape in enumerate(shapes)]
    return processor(text=prompts, images=images, padding=True, return_tensors="pt", **options)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inputs_and_every_output_for_one_picture(pair, shape):
    _, reference, their_processor, model, processor = pair
    theirs, ours = asked(their_processor, shape), asked(processor, shape)
    assert set(ours) == set(theirs) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    labels = ours.input_ids.where(ours.input_ids != model.config.image_token_index, -100)
    wanted = {"output_hidden_states": True, "output_attentions": True, "labels": labels}
    expected, found = reference(**theirs, **wanted), model(**ours, **wanted)
    close(found.loss, expected.loss)
    close(found.logits, expected.logits)
    close(found.image_hidden_states, image_vectors(expected.image_hidden_states))
    assert [len(each) for each in found.image_outputs.pooler_output] == [count_tokens(*shape, model.config)]
    for name in ("hidden_states", "attentions"):
        for our, their in zip(found[name], expected[name], strict=True):
            close(our, their)


@pytest.mark.parametrize(
    "shapes",
    [[(20, 300)], [(1, 1)], [(57, 56), (1, 500)], [(31, 90), (101, 43), (28, 28)], [(500, 1), (480, 640)]],
    ids=str,
)
def test_greedy_tokens_of_batches_are_the_references(pair, shapes):
    _, reference, their_processor, model, processor = pair
    theirs, ours = asked(their_processor, *shapes), asked(processor, *shapes)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    expected = reference.generate(**theirs, max_new_tokens=12, do_sample=False)
    assert model.generate(**ours, max_new_tokens=12).tolist() == expected.tolist()


@torch.no_grad()
def test_cached_steps(pair):
    _, reference, _, model, processor = pair
    inputs = asked(processor, (31, 90), (101, 43))
    theirs, ours = reference(**inputs), model(**inputs)
    real = inputs.attention_mask.bool()
    close(ours.logits[real], theirs.logits[real])
    mask = inputs.attention_mask
    for step in range(3):
        ids = torch.full((2, 1 + step), 20 + step)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        theirs = reference(ids, attention_mask=mask, past_key_values=theirs.past_key_values)
        ours = model(ids, attention_mask=mask, past_key_values=ours.past_key_values)
        close(ours.logits, theirs.logits)


@torch.no_grad()
def test_several_pictures_in_a_prompt_and_prompts_without_one(pair):
    _, reference, their_processor, model, processor = pair
    given = {"text": ["<image> and <image>", "Hello", "<image>\nWhat is it?"], "padding": True, "return_tensors": "pt"}
    given["images"] = [noise(40, 50), noise(90, 20, 1), noise(10, 10, 2)]
    theirs, ours = their_processor(**given), processor(**given)
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.pixel_values, theirs.pixel_values)
    real = ours.attention_mask.bool()
    close(model(**ours).logits[real], reference(**theirs).logits[real])
    assert set(processor(text="Hello")) == {"input_ids", "attention_mask"}


@torch.no_grad()
def test_embeddings_instead_of_ids_and_a_tuple(pair):
    _, reference, _, model, processor = pair
    inputs = asked(processor, (31, 90))
    embeds = model.language_model.embed_tokens(inputs.pop("input_ids"))
    expected = reference(inputs_embeds=embeds, **inputs).logits
    close(model(inputs_embeds=embeds, **inputs, return_dict=False)[0], expected)


def test_every_parameter_gets_the_references_gradient(pair):
    _, reference, _, model, processor = pair
    inputs = asked(processor, (57, 56))
    for each in (reference, model):
        each.zero_grad()
        each(**inputs, labels=inputs.input_ids).loss.backward()
    close(model.image_newline.grad, reference.model.image_newline.grad)
    close(model.multi_modal_projector.linear_1.weight.grad, reference.model.multi_modal_projector.linear_1.weight.grad)
    reference.zero_grad()
    model.zero_grad()


def test_older_and_newer_layouts_open(folder, tmp_path):
    older = shutil.copytree(folder, tmp_path / "older")  # the settings of pictures in a file of their own
    settings = json.loads((older / "processor_config.json").read_text())["image_processor"]
    for name in ("size", "crop_size"):
        settings[name] = {side: number for side, number in settings[name].items() if number is not None}
    (older / "preprocessor_config.json").write_text(json.dumps(settings | {"do_pad": True}))
    (older / "processor_config.json").unlink()
    inputs = asked(LlavaProcessor.from_pretrained(folder), (57, 56), (20, 300))
    found = asked(LlavaProcessor.from_pretrained(older), (57, 56), (20, 300))
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
    assert our_name("image_newline") == our_name("model.image_newline") == "image_newline"


# --- Inputs and settings that do not fit ------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused(folder):
    model, processor = open_both(folder)
    inputs = asked(processor, (57, 56))
    sizes, pixels = inputs.image_sizes, inputs.pixel_values
    for change, words in [
        ({"image_sizes": None}, "needs image_sizes"),
        ({"image_sizes": sizes[0]}, "pixel_values and image_sizes are"),
        ({"image_sizes": sizes.repeat(2, 1)}, "pixel_values and image_sizes are"),
        ({"image_sizes": torch.tensor([[0, 5]])}, "at least 1"),
        ({"image_sizes": torch.tensor([[-3, 5]])}, "at least 1"),
        ({"image_sizes": torch.tensor([[torch.inf, 5]])}, "whole numbers"),
        ({"image_sizes": torch.tensor([[10**12, 1]])}, "do not match"),
        ({"pixel_values": pixels[0]}, "pixel_values and image_sizes are"),
        ({"pixel_values": pixels[:, :3]}, "have 3 tiles"),
        ({"pixel_values": pixels[..., :27]}, "pixel_values are"),
        ({"vision_feature_select_strategy": "full"}, "does not give one vector"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(**inputs | change)


BAD_GRIDS = [
    [], {}, 7, "x", [[28, 56], None], [[28]], [[28, 56, 28]], [28, 56], [[0, 28]], [[-28, 28]], [[28.0, 56]],
    [["28", 28]], [[True, 28]], [[29, 28]], [[28, 55]], [[28 * 10**9, 28]], [[28 * 101, 28]], [[28 * 11, 28 * 11]],
    [[10**400, 28]], [[28, 56]] * 10**5, [[[28, 56]]],
]  # fmt: skip


@pytest.mark.parametrize("grids", BAD_GRIDS, ids=lambda grids: str(grids)[:30])
def test_bad_grids_are_refused_in_a_sentence(damaged, grids):
    edit_json(damaged / "config.json", image_grid_pinpoints=grids)
    start = time.monotonic()
    for Class in (LlavaForConditionalGeneration, LlavaProcessor):
        with pytest.raises(ValueError, match="image_grid_pinpoints must be") as caught:
            Class.from_pretrained(damaged)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.monotonic() - start < 10


def test_other_grids_in_the_processors_file_are_refused(damaged):
    file = next(damaged.glob("*processor_config.json"))
    settings = json.loads(file.read_text())
    settings.get("image_processor", settings)["image_grid_pinpoints"] = [[28 * 10**9, 28]]
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="image_grid_pinpoints differ"):
        LlavaProcessor.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, "does not give 4 x 4 patches"),
        ({"vision_config": VISION | {"model_type": "siglip_vision_model"}}, "does not give 4 x 4 patches"),
        ({"vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 42}}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints must"),  # the default's tiles have 336 pixels
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(damaged, change, words):
    edit_json(damaged / "config.json", **change)
    for Class in (LlavaForConditionalGeneration, LlavaProcessor):
        with pytest.raises(ValueError, match=words):
            Class.from_pretrained(damaged)


@pytest.mark.parametrize("crop", [27, 1, {"height": 28, "width": 56}], ids=str)
def test_tiles_of_another_size_than_the_towers_are_refused(damaged, crop):
    file = next(damaged.glob("*processor_config.json"))
    settings = json.loads(file.read_text())
    settings.get("image_processor", settings)["crop_size"] = crop
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="crop_size must be 28 x 28"):
        LlavaProcessor.from_pretrained(damaged)


ODD = [None, 0, -1, 28 * 10**9, 1.5, True, "x", [], {}, [1, 2], [[28, 56]], float("nan"), 56]


def entries(settings: dict, path: tuple = ()):
    for name, value in settings.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from entries(value, (*path, name))


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_an_entry_of_the_settings_changed_ends_in_an_answer_or_a_sentence(damaged, name):
    whole, generator, ends = (damaged / name).read_text(), random.Random(0), Counter()
    for path in entries(json.loads(whole)):
        for odd in generator.sample(ODD, 2):
            settings = place = json.loads(whole)
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = odd
            (damaged / name).write_text(json.dumps(settings))
            start = time.monotonic()
            try:
                model, processor = open_both(damaged)
                model.generate(**asked(processor, (40, 90)), max_new_tokens=1)
                ends["answered"] += 1
            except (ValueError, FileNotFoundError) as error:
                assert "\n" not in str(error), (path, odd)
                ends["refused"] += 1
            assert time.monotonic() - start < 20, (path, odd)
    assert min(ends.values()) > 5, ends


# --- Everything else the project does with a model --------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(LlavaForConditionalGeneration, LlavaProcessor, [str(a) for a in arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, shape in {"a.png": (31, 90), "b.png": (500, 1), "c.png": (57, 56)}.items():
        noise(*shape).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def test_the_command_answers_one_and_many_and_describes(folder, pictures, capsys):
    asks = ("--model", folder, "--prompt", "What is it?", "--max-new-tokens", 4, "--dtype", "float32")
    alone = {}
    for file in sorted(pictures.iterdir()):
        code, out, err = run(capsys, *asks, "--image", file, "--json")
        assert code == 0, err
        alone[str(file)] = json.loads(out)
    code, out, err = run(capsys, *asks, "--images", pictures, "--batch-size", 3)
    assert code == 0, err
    for line in map(json.loads, out.splitlines()):
        for key in ("text", "prompt_tokens"):
            assert line[key] == alone[line["image"]][key]
    assert len({answer["prompt_tokens"] for answer in alone.values()}) == 3
    code, out, err = run(capsys, "--describe", folder)
    assert code == 0 and "LLaVA-1.6" in out and "up to 88 tokens per picture" in out and "mismatches  none" in out


def test_int8_answers(folder, pictures, capsys):
    model, processor = open_both(folder)
    inputs = asked(processor, (31, 90))
    plain = model(**inputs).logits
    eight = LlavaForConditionalGeneration.from_pretrained(folder, quantize="int8")
    quantize_model(model, "int8")
    assert_close(eight(**inputs).logits, model(**inputs).logits, atol=1e-3, rtol=1e-3)
    assert cosine(plain, eight(**inputs).logits) > 0.98
    short = ("--max-new-tokens", 4, "--quantize", "int8")
    code, out, err = run(capsys, "--model", folder, "--image", pictures / "a.png", *short, "--json")
    assert code == 0 and json.loads(out)["settings"]["quantize"] == "int8", err


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_a_written_quantized_checkpoint_opens(tmp_path, capsys):
    from cli.quantizing import quantize_checkpoint

    source = tmp_path / "wide"
    write_checkpoint(source, {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}, {})
    for bits in ("int8", "int4"):
        quantize_checkpoint(LlavaForConditionalGeneration, [str(source), "--to", bits, "--out", str(tmp_path / bits)])
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / bits)
        inputs = asked(LlavaProcessor.from_pretrained(tmp_path / bits), (31, 90))
        plain = LlavaForConditionalGeneration.from_pretrained(source)
        assert torch.equal(model.image_newline, plain.image_newline)
        with torch.no_grad():
            assert cosine(model(**inputs).logits.float(), plain(**inputs).logits) > (0.98 if bits == "int8" else 0.8)


@torch.no_grad()
def test_a_chat_has_the_tokens_of_the_rendered_conversation(folder):
    model, processor = open_both(folder)
    chat = Chat(model, processor, max_new_tokens=4)
    first = [noise(31, 90), noise(101, 43, 1)]
    chat.pictures = [("a", first[0]), ("b", first[1])]
    chat.say("What is the same?", lambda text: None)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is the same?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=first)
    T = inputs.input_ids.shape[1]
    assert chat.ids[:T] == inputs.input_ids[0].tolist()
    assert chat.ids == model.generate(**inputs, max_new_tokens=4)[0, : len(chat.ids)].tolist()
    before = len(chat.ids)
    chat.pictures = [("c", noise(1, 500))]
    chat.say("And here?", lambda text: None)
    image = model.config.image_token_index
    added = count_tokens(1, 500, model.config)
    assert chat.ids[before:].count(image) == added and chat.cache.length in (len(chat.ids), len(chat.ids) - 1)


def test_more_or_fewer_image_tokens_than_pictures_are_refused(folder):
    model, processor = open_both(folder)
    for text, images in (("<image> <image>", [noise(9, 9)]), ("<image>", [noise(9, 9)] * 2), ("<image>", None)):
        with pytest.raises(ValueError, match="<image>"):
            processor(text=text, images=images)
    chat = Chat(model, processor, system="a <image>", max_new_tokens=2)
    with pytest.raises(ValueError, match="1 <image> tokens, but the number of pictures is 0"):
        chat.say("What is it?", lambda text: None)


INST = (  # of llava-v1.6-mistral-7b-hf, in short
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' [/INST]' }}{% endfor %}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)


def test_the_template_of_mistral_is_the_checkpoints_own(damaged):
    (damaged / "chat_template.jinja").write_text(INST)
    model, processor = open_both(damaged)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert prompt == "[INST] <image>\nWhat is it? [/INST]"
    chat = Chat(model, processor, max_new_tokens=2)
    chat.pictures = [("a", noise(31, 90))]
    assert chat.turn_ids("What is it?") == processor(text=prompt, images=noise(31, 90)).input_ids[0].tolist()


def test_explain_training_and_saving_say_that_they_do_not(folder, pictures, capsys, tmp_path):
    page = tmp_path / "page.html"
    code, _, err = run(capsys, "--model", folder, "--image", pictures / "a.png", "--explain", page)
    assert code == 2 and "--explain does not work with LLaVA-1.6" in err and err.count("\n") == 1 and not page.exists()
    model, processor = open_both(folder)
    with pytest.raises(ValueError, match="prompts and pictures can be trained and saved"):
        save(model, processor, tmp_path / "saved")
    with pytest.raises(ValueError, match="prompts and pictures can be trained and saved"):
        train_on_records(Place(tmp_path), tmp_path / "none.json", checkpoint=folder)
    with pytest.raises(ValueError, match="--lora cannot train LLaVA-1"):
        train_adapter(Place(tmp_path), tmp_path / "none.json", None, folder, 1, 1, 1e-4, 1e-5, Lora(2, 4))


def test_memory_of_tiles_and_long_prompts_is_checked_before_a_run(folder, pictures, capsys, monkeypatch):
    asks = ("--model", folder, "--image", pictures / "a.png", "--max-new-tokens", 2)
    counted = []
    monkeypatch.setattr(loading, "check_memory", lambda *given: counted.append(given))
    assert run(capsys, *asks)[0] == 0
    assert counted[0][-2] == LlavaProcessor.from_pretrained(folder).image_seq_length + 2 == 88 + 2
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", lambda *_: pytest.fail("it was loaded"))
    code, _, err = run(capsys, *asks)
    assert code == 2 and "this model needs" in err and err.count("\n") == 1


def test_a_long_wait_is_announced(folder, pictures, capsys, monkeypatch):
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    asks = ("--model", folder, "--prompt", "x", "--max-new-tokens", 1)
    words = "A picture becomes up to 88 tokens: reading it takes up to 6 times as long as with LLaVA-1.5.\n"
    assert words in run(capsys, *asks, "--image", pictures / "a.png")[2]
    assert words not in run(capsys, *asks)[2]


def test_first_difference_compares_this_family_too(folder):
    found = compare(folder, PICTURE, "What is it?", 1e-4)
    assert first_difference(found, 1e-4) is None and {"image_sizes", "language_model.layers.1.mlp"} <= found.keys()


def test_the_class_is_a_llava(folder):
    model, processor = open_both(folder)
    assert isinstance(model, LlavaForConditionalGeneration) and isinstance(processor, LlavaProcessor)
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert type(processor).__name__ == "LlavaNextProcessor"
    again = type(model).from_pretrained(folder)
    assert type(again) is type(model)
