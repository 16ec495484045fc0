"""The bundled checkpoint and the example of transformers' page, in both libraries, word for word."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from hub.files import BUNDLED
from hub.writer import write_tokenizer
from llava import LlavaForConditionalGeneration, LlavaProcessor
from reference import reference_model
from tokenizer import Tokenizer

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parent.parent.parent
PICTURES = ["cat-and-apple", "car-and-tree", "dog-under-airplane", "elephant-and-hat", "owl-and-key", "rocket"]


@torch.no_grad()
def test_the_bundled_checkpoint_is_the_references_too():
    """transformers opens the folder unchanged, and generates the same tokens."""
    ours, theirs = LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration
    ours = ours.from_pretrained(BUNDLED, dtype=torch.float32)
    theirs = theirs.from_pretrained(BUNDLED, dtype=torch.float32)
    our_processor = LlavaProcessor.from_pretrained(BUNDLED)
    their_processor = transformers.AutoProcessor.from_pretrained(BUNDLED, backend="pil")
    pictures = [Image.open(ROOT / "images" / f"{name}.jpg") for name in PICTURES]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
    ids = []
    for model, processor in ((ours, our_processor), (theirs, their_processor)):
        prompt = processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = processor(images=pictures, text=[prompt] * len(pictures), padding=True, return_tensors="pt")
        ids.append(model.generate(**inputs, max_new_tokens=40))
    assert torch.equal(*ids)


PAGE = """
model = LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
processor = AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")

prompt = "<image>\\nUSER: What's the content of the image?\\nASSISTANT:"
image = Image.open(PICTURE)

inputs = processor(text=prompt, images=image, return_tensors="pt")

# Generate
generate_ids = model.generate(**inputs, max_length=60)
answer = processor.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
"""


def test_the_code_of_the_references_page_runs_with_its_import_line_changed(tmp_path, monkeypatch):
    """Its pictures apart, which the page loads from the web; a picture is one token here, to fit into max_length."""
    snapshot = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "0123"
    tokenizer = Tokenizer.from_pretrained(BUNDLED)
    size = {"vocab_size": max(tokenizer.special_names) + 1}
    reference = reference_model(
        {"image_size": 14, "patch_size": 14}, size, image_token_index=tokenizer.image_token_id, pad_token_id=0
    )
    reference.save_pretrained(snapshot)
    processor = transformers.AutoProcessor.from_pretrained(BUNDLED, backend="pil")
    processor.image_processor.size = {"shortest_edge": 14}
    processor.image_processor.crop_size = {"height": 14, "width": 14}
    processor.save_pretrained(snapshot)
    write_tokenizer(tokenizer, snapshot)
    (tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "refs").mkdir()
    (tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "refs" / "main").write_text("0123")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    answers = {}
    for library in ("llava", "transformers"):
        names = {"PICTURE": ROOT / "images" / "rocket.jpg"}
        page = PAGE if library == "llava" else PAGE.replace('"llava-hf/llava-1.5-7b-hf"', repr(str(snapshot)))
        page = f"from PIL import Image\nfrom {library} import AutoProcessor, LlavaForConditionalGeneration\n{page}"
        exec(page, names)
        answers[library] = names["answer"]
    assert answers["llava"] == answers["transformers"]
    assert answers["llava"].startswith("\nUSER: What's the content of the image?\nASSISTANT:")
