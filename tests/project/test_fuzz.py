"""Random damage to pictures, checkpoints and text: each case ends in an answer or one sentence, never in a traceback.

`python -m pytest -q -s tests/project/test_fuzz.py` prints the table of tests/README.md; its counts are those of CASES.
"""

import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from cli.arguments import read_prompt
from cli.chat import Chat
from clip import ImageProcessor
from family.chat_template import JinjaTemplate, text_or_reason
from folders import edit_json
from hub.pictures import open_image
from hub.writer import save
from llava import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor
from small import small
from tokenizers_at_hand import SPECIAL, byte_level_tokenizer

TESTS = Path(__file__).parent.parent
# How many cases of each kind are tried.
CASES = {
    "JPEG: bytes flipped or cut": 150,
    "PNG: bytes flipped or cut": 150,
    "GIF: bytes flipped or cut": 150,
    "WebP: bytes flipped or cut": 150,
    "safetensors header: bytes flipped or cut": 200,
    "index of shards: bytes flipped or cut": 100,
    "config.json: bytes flipped or cut": 150,
    "tokenizer.model: bytes flipped or cut": 200,
    "other settings: bytes flipped or cut": 200,
    "safetensors header: an entry changed": 150,
    "config.json: an entry changed": 250,
    "other settings: an entry changed": 250,
    "shards missing, doubled, overlapping, outside": 100,
    "pickle: bytes flipped or cut": 100,
    "pickle: hostile": 60,
    "tokenizer.json: bytes flipped or cut": 150,
    "tokenizer.json: an entry changed": 200,
    "chat template: bytes flipped or cut": 100,
    "LLaVA-1.6: sizes of grids and pictures": 100,
    "adapter: bytes flipped or cut": 60,
    "adapter: an entry changed": 60,
    "text in a prompt": 150,
    "text in a chat's turn": 150,
}
MOST_MEMORY = 500e6  # bytes that all cases together may add to the process; the models here have less than one million
outcomes = defaultdict(Counter)  # a kind of CASES -> how its cases ended


def fuzz(kind: str, **strategies):
    """hypothesis, the same cases every time."""
    quick = settings(
        max_examples=CASES[kind],
        deadline=20_000,  # milliseconds: a hang, even on a busy machine
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: quick(given(**strategies)(test))


def ends_well(kind: str, work, *names: str) -> None:
    """`work` ends, or is refused in one line that has one of the `names` in it. Counts which of the two."""
    try:
        work()
    except (ValueError, OSError) as error:
        message = str(error)
        assert any(name in message for name in names), message
        assert "\n" not in message and len(message) < 1000, message
        outcomes[kind]["refused"] += 1
    else:
        outcomes[kind]["answered"] += 1


@st.composite
def damages(draw) -> list:
    """Some places in a file with what is done to each byte there, and where the file ends."""
    place = st.floats(0, 1, exclude_max=True)
    flips = draw(st.lists(st.tuples(place, st.integers(1, 255)), max_size=6))
    return [flips, draw(st.one_of(st.just(1.0), place)) if flips else draw(place)]


def damaged(content: bytes, damage: list, start: int = 0, end: int | None = None) -> bytes:
    """The content with the damage done between `start` and `end`."""
    flips, cut = damage
    raw, end = bytearray(content), len(content) if end is None else end
    for place, change in flips:
        raw[start + int(place * (end - start))] ^= change
    return bytes(raw if cut == 1 else raw[: start + int(cut * (end - start))])


# --- Pictures --------------------------------------------------------------------------------------------------------


def picture_files() -> dict[str, list[bytes]]:
    """A few small pictures of each format, with what makes the format difficult."""
    grey = Image.linear_gradient("L").resize((40, 30))
    colour = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    glass = colour.copy()
    glass.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    ways = {
        "JPEG": [(colour, {"exif": exif}), (colour, {"progressive": True}), (colour.convert("CMYK"), {}), (grey, {})],
        "PNG": [(glass, {"exif": exif}), (colour.convert("P"), {"transparency": 3}), (grey.convert("I;16"), {})],
        "GIF": [(colour, {"save_all": True, "append_images": [colour.rotate(90)]}), (colour, {"transparency": 5})],
        "WebP": [(colour, {"exif": exif}), (glass, {"lossless": True}), (glass, {"quality": 50})],
    }
    files = {}
    for name, pictures in ways.items():
        files[name] = []
        for picture, options in pictures:
            file = io.BytesIO()
            picture.save(file, name, **options)
            files[name].append(file.getvalue())
    return files


PICTURES = picture_files()
PROCESSOR = ImageProcessor({"shortest_edge": 28}, 28)


@pytest.fixture(scope="module")
def smaller_bomb():
    """Pillow refuses far smaller pictures, so that a size that was flipped does not take a gigabyte before that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
        yield


def look(kind: str, content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()

        def see():
            image = open_image(file.name)
            assert image.mode == "RGB"
            assert PROCESSOR([image]).isfinite().all()

        ends_well(kind, see, file.name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("smaller_bomb")
class TestPictures:
    @fuzz("JPEG: bytes flipped or cut", which=st.sampled_from(PICTURES["JPEG"]), damage=damages())
    def test_jpeg(self, which, damage):
        look("JPEG: bytes flipped or cut", damaged(which, damage))

    @fuzz("PNG: bytes flipped or cut", which=st.sampled_from(PICTURES["PNG"]), damage=damages())
    def test_png(self, which, damage):
        look("PNG: bytes flipped or cut", damaged(which, damage))

    @fuzz("GIF: bytes flipped or cut", which=st.sampled_from(PICTURES["GIF"]), damage=damages())
    def test_gif(self, which, damage):
        look("GIF: bytes flipped or cut", damaged(which, damage))

    @fuzz("WebP: bytes flipped or cut", which=st.sampled_from(PICTURES["WebP"]), damage=damages())
    def test_webp(self, which, damage):
        look("WebP: bytes flipped or cut", damaged(which, damage))


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def memory_before():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Checkpoint:
    """A folder with a small random model, in one file or in shards, that is whole again after each damage."""

    def __init__(self, folder: Path, shard_bytes: float = 5e9):
        model, processor = small()
        save(model, processor, folder, shard_bytes)
        self.read(folder, model)

    def read(self, folder: Path, model) -> None:
        self.folder = folder
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
        self.settings = [name for name in self.files if name.endswith(".json") and "index" not in name]
        self.settings.remove("config.json")

    @contextmanager
    def changed(self, **files: bytes | None):
        """With other files; None for one that is missing."""
        files = {name.replace("__", "."): content for name, content in files.items()}
        for name, content in files.items():
            (self.folder / name).unlink(missing_ok=True)
            if content is not None:
                (self.folder / name).write_bytes(content)
        try:
            yield
        finally:
            for file in set(self.folder.iterdir()) - {self.folder / name for name in self.files}:
                file.unlink() if file.is_file() else shutil.rmtree(file)
            for name in files:
                if name in self.files:
                    (self.folder / name).write_bytes(self.files[name])

    def answer(self, size: tuple[int, int] = (30, 40)) -> None:
        """Load, check what was loaded, and generate two tokens about a picture."""
        processor = LlavaProcessor.from_pretrained(self.folder)
        model = LlavaForConditionalGeneration.from_pretrained(self.folder)
        loaded = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
        half = [{name: (shape, kind) for name, (shape, _) in self.shapes.items()} for kind in HALF]
        assert loaded in [self.shapes, *half]
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        inputs = processor(Image.new("RGB", size, "red"), prompt)
        model.generate(**inputs, max_new_tokens=2)

    def ends_well(self, kind: str, *size) -> None:
        ends_well(kind, lambda: self.answer(*size), str(self.folder), *NAMED)


# What an error may name: a file, a tensor, or a setting of generation_config.json that contradicts another.
NAMED = ("config.json", "tokenizer.model", "tensor", "vision_feature", "pixel_values")
NAMED += ("temperature", "top_p", "max_length", "image_grid_pinpoints")
HALF = (torch.bfloat16, torch.float16, torch.float64)  # damage to config.json or a header can select these dtypes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Checkpoint(tmp_path_factory.mktemp("whole") / "llava")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return Checkpoint(tmp_path_factory.mktemp("sharded") / "llava", shard_bytes=60e3)


def header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def test_undamaged_they_answer(whole, sharded):
    whole.answer()
    sharded.answer()


@fuzz("safetensors header: bytes flipped or cut", damage=damages())
def test_flipped_header(whole, damage):
    raw = whole.files["model.safetensors"]
    with whole.changed(model__safetensors=damaged(raw, damage, end=header_end(raw))):
        whole.ends_well("safetensors header: bytes flipped or cut")


@fuzz("index of shards: bytes flipped or cut", damage=damages())
def test_flipped_index(sharded, damage):
    name = "model.safetensors.index.json"
    with sharded.changed(**{name: damaged(sharded.files[name], damage)}):
        sharded.ends_well("index of shards: bytes flipped or cut")


@fuzz("config.json: bytes flipped or cut", damage=damages())
def test_flipped_config(whole, damage):
    with whole.changed(config__json=damaged(whole.files["config.json"], damage)):
        whole.ends_well("config.json: bytes flipped or cut")


@fuzz("tokenizer.model: bytes flipped or cut", damage=damages())
def test_flipped_tokenizer(whole, damage):
    with whole.changed(tokenizer__model=damaged(whole.files["tokenizer.model"], damage)):
        whole.ends_well("tokenizer.model: bytes flipped or cut")


@fuzz("other settings: bytes flipped or cut", damage=damages(), data=st.data())
def test_flipped_settings(whole, damage, data):
    name = data.draw(st.sampled_from(sorted(whole.settings)))
    with whole.changed(**{name: damaged(whole.files[name], damage)}):
        whole.ends_well("other settings: bytes flipped or cut")


VALUES = [None, True, -1, 0, 1, 3, 7, 2**31, 2**63, 2**70, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "1"]
VALUES += ["\n", "\ud800", [], [1], [[]], ["x"], [-1, 10**12], {}, {"x": 1}, "BF16", "F64", "I8", "float16", "../x"]


def places(settings, path=()) -> list[tuple]:
    """The path to every value in a JSON value."""
    inside = settings.items() if isinstance(settings, dict) else ()
    inside = enumerate(settings) if isinstance(settings, list) else inside
    return [path] * bool(path) + [place for key, value in inside for place in places(value, (*path, key))]


def edited(settings: dict, place: tuple, value, how: str) -> dict:
    """A copy with another value at a place, with an entry added there, or without the place."""
    settings = json.loads(json.dumps(settings))
    inside = settings
    for key in place[:-1]:
        inside = inside[key]
    if how == "take away":
        del inside[place[-1]]
    elif how == "add" and isinstance(inside, dict):
        inside["x"] = value
    else:
        inside[place[-1]] = value
    return settings


EDITS = {"value": st.sampled_from(VALUES), "how": st.sampled_from(["put", "put", "put", "take away", "add"])}


@fuzz("safetensors header: an entry changed", **EDITS, data=st.data())
def test_edited_header(whole, value, how, data):
    raw = whole.files["model.safetensors"]
    header = json.loads(raw[8 : header_end(raw)])
    content = json.dumps(edited(header, data.draw(st.sampled_from(places(header))), value, how)).encode()
    with whole.changed(model__safetensors=len(content).to_bytes(8, "little") + content + raw[header_end(raw) :]):
        whole.ends_well("safetensors header: an entry changed")


@fuzz("config.json: an entry changed", **EDITS, data=st.data())
def test_edited_config(whole, value, how, data):
    config = json.loads(whole.files["config.json"])
    changed = edited(config, data.draw(st.sampled_from(places(config))), value, how)
    with whole.changed(config__json=json.dumps(changed).encode()):
        whole.ends_well("config.json: an entry changed")


@fuzz("other settings: an entry changed", **EDITS, data=st.data())
def test_edited_settings(whole, value, how, data):
    name = data.draw(st.sampled_from(sorted(whole.settings)))
    content = json.loads(whole.files[name])
    if name == "generation_config.json":  # more settings that the file may have
        content |= {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.5, "repetition_penalty": 1.1}
        content |= {"max_length": 100, "max_new_tokens": 2}
    changed = edited(content, data.draw(st.sampled_from(places(content))), value, how)
    with whole.changed(**{name: json.dumps(changed).encode()}):
        whole.ends_well("other settings: an entry changed")


@fuzz(
    "shards missing, doubled, overlapping, outside",
    how=st.sampled_from(["missing", "doubled", "overlapping", "elsewhere", "emptied", "swapped"]),
    where=st.sampled_from(["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b", "\0", "\ud800", 5, None]),
    data=st.data(),
)
def test_shards(sharded, how, where, data):
    index = json.loads(sharded.files["model.safetensors.index.json"])
    shards = sorted(set(index["weight_map"].values()))
    one, other = data.draw(st.permutations(shards))[:2]
    (sharded.folder.parent / "outside.safetensors").write_bytes(sharded.files[one])
    files = {}
    if how == "missing":
        files[one] = None
    elif how == "doubled":
        files["again.safetensors"] = sharded.files[one]
        index["weight_map"]["again"] = "again.safetensors"
    elif how == "overlapping":
        raw = sharded.files[one]
        header = json.loads(raw[8 : header_end(raw)])
        name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        header[name]["data_offsets"][0] -= 4
        content = json.dumps(header).encode()
        files[one] = len(content).to_bytes(8, "little") + content + raw[header_end(raw) :]
    elif how == "elsewhere":
        index["weight_map"] = {name: where if file == one else file for name, file in index["weight_map"].items()}
    elif how == "emptied":
        files[one] = b""
    else:  # two files have each other's names: all the tensors are there, so this loads
        files |= {one: sharded.files[other], other: sharded.files[one]}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    with sharded.changed(**files):
        sharded.ends_well("shards missing, doubled, overlapping, outside")


@pytest.fixture(scope="module")
def pickles(whole) -> dict[bool, bytes]:
    """The weights as torch.save writes them, in its legacy format or not."""
    model = LlavaForConditionalGeneration.from_pretrained(whole.folder)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    files = {legacy: io.BytesIO() for legacy in (True, False)}
    for legacy, file in files.items():
        torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    return {legacy: file.getvalue() for legacy, file in files.items()}


@fuzz("pickle: bytes flipped or cut", damage=damages(), legacy=st.booleans(), near=st.booleans())
def test_flipped_pickle(whole, pickles, damage, legacy, near):
    raw = pickles[legacy]
    content = damaged(raw, damage, end=20_000 if near and damage[1] == 1 else None)
    with whole.changed(model__safetensors=None, pytorch_model__bin=content):
        whole.ends_well("pickle: bytes flipped or cut")


class Call:
    """Pickled, a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@fuzz("pickle: hostile", data=st.data())
def test_hostile_pickle(whole, data):
    trace = whole.folder.parent / "was-here"
    touch = f"import pathlib; pathlib.Path({str(trace)!r}).touch()"
    calls = [(os.system, f"touch {trace}"), (subprocess.call, ["touch", trace]), (exec, touch)]
    calls += [(eval, f"exec({touch!r})"), (shutil.copy, __file__, str(trace)), (open, str(trace), "w")]
    calls += [(Path.touch, trace), (torch.hub.load, "x", "y")]
    payload = Call(*data.draw(st.sampled_from(calls)))
    shape = data.draw(st.sampled_from([lambda x: x, lambda x: {"lm_head.weight": x}, lambda x: {x: torch.ones(2)}]))
    protocol = data.draw(st.integers(0, 5))
    if data.draw(st.booleans()):
        content = pickle.dumps(shape(payload), protocol)
    else:
        file = io.BytesIO()
        torch.save(shape(payload), file, pickle_protocol=max(protocol, 2))
        content = file.getvalue()
    with whole.changed(model__safetensors=None, pytorch_model__bin=content):
        whole.ends_well("pickle: hostile")
    assert not trace.exists()


ODD_TENSORS = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "without memory": lambda: torch.empty(2, device="meta"),
    "larger than its memory": lambda: torch.ones(1).expand(10**12),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_odd_tensors_in_a_pickle(whole, name):
    file = io.BytesIO()
    torch.save({"lm_head.weight": ODD_TENSORS[name]()}, file)
    with whole.changed(model__safetensors=None, pytorch_model__bin=file.getvalue()):
        ends_well("odd", whole.answer, "lm_head.weight", "pytorch_model.bin")
    assert outcomes.pop("odd") == {"refused": 1}


# --- The family ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A LLaVA-1.6 without tokenizer.model, with a template of its own; beside it, a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("family") / "llava"
    model, processor = small(context=1000)
    save(model, processor, folder)
    newline = {"image_newline": torch.ones(model.config.text_config.hidden_size)}
    save_file(load_file(folder / "model.safetensors") | newline, folder / "model.safetensors")
    edit_json(folder / "config.json", model_type="llava_next", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])
    (folder / "tokenizer.model").unlink()
    (folder / "chat_template.jinja").write_text(QUESTION)
    made = Checkpoint.__new__(Checkpoint)
    made.read(folder, LlavaForConditionalGeneration.from_pretrained(folder))
    return made


QUESTION = "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
QUESTION += "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte-level")
    byte_level_tokenizer(SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(folder)
    return folder


def encode(kind: str, folder: Path, content: bytes) -> None:
    """Use a tokenizer.json in a folder with the other files that it needs."""
    file = folder / "tokenizer.json"
    original = file.read_bytes()
    file.write_bytes(content)

    def work():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(tokenizer.decode(tokenizer.encode("A <image> and\n 12 naïve 漢字<|im_end|>")), str)

    try:
        ends_well(kind, work, str(file))
    finally:
        file.write_bytes(original)


@fuzz("tokenizer.json: bytes flipped or cut", damage=damages(), which=st.booleans())
def test_flipped_tokenizer_json(family, byte_level, damage, which):
    folder = byte_level if which else family.folder
    encode("tokenizer.json: bytes flipped or cut", folder, damaged((folder / "tokenizer.json").read_bytes(), damage))


@fuzz("tokenizer.json: an entry changed", **EDITS, data=st.data(), which=st.booleans())
def test_edited_tokenizer_json(family, byte_level, value, how, data, which):
    folder = byte_level if which else family.folder
    content = json.loads((folder / "tokenizer.json").read_text())
    tables = {"vocab": {}, "merges": []}  # most of the file, whose entries are all alike
    where = places(content | {"model": content["model"] | tables})
    changed = edited(content, data.draw(st.sampled_from(where)), value, how)
    encode("tokenizer.json: an entry changed", folder, json.dumps(changed).encode())


@fuzz("chat template: bytes flipped or cut", damage=damages())
def test_flipped_chat_template(damage):
    """In this process, without the limits of the child; family/test_chat_template.py has the hostile ones."""
    source = damaged(QUESTION.encode(), damage).decode(errors="replace")

    def render(job: str) -> str:
        text, why = text_or_reason(**json.loads(job))
        if text is None:
            raise ValueError(why)
        return text

    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("family.chat_template.render_in_child", render)
            content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
            assert isinstance(JinjaTemplate(source, "x.jinja").render([{"role": "user", "content": content}]), str)

    ends_well("chat template: bytes flipped or cut", work, "x.jinja")


GOOD = st.sampled_from([28, 56, 84])
SIDES = st.sampled_from([0, -28, 1, 27, 28, 28 * 101, 28 * 10**9, 10**400, 2.5, None, "28", True])
PAIRS = st.one_of(*[st.lists(sides, min_size=2, max_size=2) for sides in (GOOD, GOOD, GOOD, SIDES)])
GRIDS = st.one_of(*[st.lists(PAIRS, max_size=3)] * 3, st.sampled_from([None, 0, {}, [[28]]]))


SIZES = st.sampled_from([(1, 1), (1, 900), (900, 1), (57, 56)])


@fuzz("LLaVA-1.6: sizes of grids and pictures", grids=GRIDS, size=SIZES)
def test_grids(family, grids, size):
    config = json.loads(family.files["config.json"]) | {"image_grid_pinpoints": grids}
    with family.changed(config__json=json.dumps(config).encode()):
        family.ends_well("LLaVA-1.6: sizes of grids and pictures", size)


@pytest.fixture(scope="module")
def adapter(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    D = LlavaForConditionalGeneration.from_pretrained(whole.folder).config.text_config.hidden_size
    name = "base_model.model.model.language_model.layers.0.self_attn.{}_proj.lora_{}.weight"
    pairs = {name.format(m, half): torch.ones(2, D) if half == "A" else torch.ones(D, 2) for m in "qo" for half in "AB"}
    save_file(pairs, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def adapt(kind: str, whole, folder: Path, file: Path, content: bytes) -> None:
    original = file.read_bytes()
    file.write_bytes(content)
    load = LlavaForConditionalGeneration.from_pretrained
    try:
        ends_well(kind, lambda: load(whole.folder, adapter=folder, kernels="torch"), str(folder))
    finally:
        file.write_bytes(original)


ADAPTER_FILES = st.sampled_from(["adapter_model.safetensors", "adapter_config.json"])


@fuzz("adapter: bytes flipped or cut", damage=damages(), name=ADAPTER_FILES)
def test_flipped_adapter(whole, adapter, damage, name):
    raw = (adapter / name).read_bytes()
    end = header_end(raw) if name.endswith("safetensors") and damage[1] == 1 else None
    adapt("adapter: bytes flipped or cut", whole, adapter, adapter / name, damaged(raw, damage, end=end))


@fuzz("adapter: an entry changed", **EDITS, data=st.data())
def test_edited_adapter(whole, adapter, value, how, data):
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    changed = edited(content, data.draw(st.sampled_from(places(content))), value, how)
    adapt("adapter: an entry changed", whole, adapter, file, json.dumps(changed).encode())


# --- Text ------------------------------------------------------------------------------------------------------------

WORDS = ["<image>", "</s>", "<s>", "<unk>", "<pad>", "USER:", "ASSISTANT:", "\u2581", "<0x0A>", "\n", " ", "🤗", "\0"]
LETTERS = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs too
TEXTS = st.lists(st.one_of(st.sampled_from(WORDS), LETTERS), max_size=8)


@pytest.fixture(scope="module")
def pair(whole):
    return LlavaForConditionalGeneration.from_pretrained(whole.folder), LlavaProcessor.from_pretrained(whole.folder)


@fuzz("text in a prompt", text=TEXTS.map("".join))
def test_any_text_in_a_prompt(pair, text):
    model, processor = pair
    prompt = read_prompt(text) if text != "-" else "-"
    images = [Image.new("RGB", (9, 9))] * prompt.count("<image>")

    def work():
        out = model.generate(**processor(images or None, prompt), max_new_tokens=1)
        assert isinstance(processor.decode(out[0]), str)

    ends_well("text in a prompt", work, "nothing")


@fuzz("text in a chat's turn", text=TEXTS.map("".join), pictures=st.integers(0, 2))
def test_any_text_in_a_turn(pair, text, pictures):
    """After the template's own tokens there is no control token, and the text is complete."""
    chat, text = Chat(*pair, max_new_tokens=1), read_prompt(text)
    tokenizer, patches = pair[1].tokenizer, pair[1].image_seq_length
    chat.pictures = [("x", Image.new("RGB", (9, 9)))] * pictures

    def work():
        ids = chat.turn_ids(text)
        assert ids.count(tokenizer.image_token_id) == pictures * patches
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.eos_token_id not in ids
        chat.say(text, lambda piece: None)
        expected = pair[1].template.user * (not pictures) + "\n" * bool(pictures) + text
        unknown = tokenizer.sp.unk_id() in ids
        assert unknown or expected.replace("\u2581", " ") in tokenizer.decode(ids, skip_special_tokens=True)

    ends_well("text in a chat's turn", work, "nothing")


# --- After all of them -----------------------------------------------------------------------------------------------


def test_all_of_it_took_little_memory(memory_before):
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < memory_before + MOST_MEMORY


def test_the_readme_has_these_counts():
    rows = ["| what was changed, and how | cases | answered | refused in a sentence |", "|---|---|---|---|"]
    for kind, n in CASES.items():
        rows.append(f"| {kind} | {n} | {outcomes[kind]['answered']} | {outcomes[kind]['refused']} |")
    print("", *rows, sep="\n")
    told = re.findall(r"^\| (.*?) \| (\d+) \| \d+ \| \d+ \|$", (TESTS / "README.md").read_text(), re.M)
    assert {kind: int(n) for kind, n in told} == CASES
