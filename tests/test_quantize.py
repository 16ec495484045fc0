"""int8 weights: rounded as near as can be, read as they come, and hardly to be told from the others."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import prompts, reference_and_ours, reference_model

import emoji_world
import judge
from command import BUNDLED
from llama import FusedLinear, Linear
from llava import LlavaForConditionalGeneration, LlavaProcessor
from quantize import Int8Linear, quantize_rows
from save_checkpoint import save


def rounded(linear: Linear) -> Int8Linear:
    int8 = Int8Linear(linear)
    quantize_rows(linear.weight.detach(), int8.q, int8.scale)
    return int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_number_is_off_by_half_a_step_at_most(dtype):
    weight = torch.randn(50, 70).to(dtype)
    weight[7] = 0
    q, scale = torch.empty(50, 70, dtype=torch.int8), torch.empty(50, dtype=dtype)
    quantize_rows(weight, q, scale)
    assert q.abs().max() == 127 and (q[7] == 0).all()
    step = scale.float()[:, None]
    slack = 1.01 if dtype == torch.float32 else 1.5  # a scale rounded down leaves the largest number out of reach
    assert ((q * step - weight.float()).abs() <= slack * step / 2).all()
    nearest = (weight.double() / scale.double()[:, None]).round().clamp(-127, 127)
    assert torch.equal(q.double(), nearest)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_product_is_that_of_the_matrix_written_out(rows, dtype):
    torch.manual_seed(0)
    linear = FusedLinear(96, False, a=32, b=64).to(dtype)
    int8 = rounded(linear)
    x = torch.randn(1, rows, 96, dtype=dtype)
    y = int8(x)
    wanted = x.float() @ (int8.q.float() * int8.scale.float()[:, None]).T
    assert y.shape == (1, rows, 96) and y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.float(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True}])
def test_a_model_in_int8_says_nearly_the_same(tmp_path, text):
    _, whole = reference_and_ours(tmp_path, {}, text)
    int8 = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8")
    assert sum(isinstance(module, Int8Linear) for module in int8.modules()) == (
        4 * 3 + 1 if not text.get("mlp_bias") else 1
    )
    ids, _ = prompts([40], [0], 16)
    with torch.no_grad():
        int8.generate(ids, max_new_tokens=1)  # in inference mode; what it leaves behind must serve outside
        logits, wanted = int8(ids).logits, whole(ids).logits
    assert (logits - wanted).std() < 0.05 * wanted.std()
    assert torch.equal(int8.generate(ids, max_new_tokens=5), int8.generate(ids, max_new_tokens=5))


MODES = {
    "greedy": {},
    "two rows": {"rows": 2},
    "sampled": {"do_sample": True, "temperature": 1.5, "seed": 5},
    "streamed": {"stream": True},
    "stopped": {"stop_strings": ["a"]},
}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_threads_give_the_answers_of_one_after_the_other(quantize):
    """Pictures, questions and modes at once on one model. A prompt of 64 patches has the matrices written out."""
    processor = LlavaProcessor.from_pretrained(BUNDLED)
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, quantize=quantize)
    sprites = emoji_world.load_sprites()
    questions = ("Describe the picture.", "What is on the left?", "How many objects are in the picture?")

    def answer(n: int) -> tuple[list, list[str]]:
        question, options = questions[n % 3], dict(list(MODES.values())[n % 5])
        rows, said = options.pop("rows", 1), []
        if options.pop("stream", False):
            options["streamer"] = said.append
        pictures = [emoji_world.make_scene(sprites, judge.UNSEEN + n + row)[0] for row in range(rows)]
        inputs = processor(images=pictures, text=[f"USER: <image>\n{question} ASSISTANT:"] * rows)
        return model.generate(**inputs, max_new_tokens=20, tokenizer=processor.tokenizer, **options).tolist(), said

    numbers = list(range(30)) * 2
    wanted = [answer(n) for n in range(30)] * 2
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, numbers)) == wanted


def test_a_tied_head_stays_as_it_is(tmp_path):
    reference_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8")
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_only_int8_is_known():
    with pytest.raises(ValueError, match="int8"):
        LlavaForConditionalGeneration.from_pretrained(BUNDLED, quantize="int4")


def test_a_model_in_int8_is_not_saved(tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, quantize="int8")
    with pytest.raises(ValueError, match="without quantize"):
        save(model, LlavaProcessor.from_pretrained(BUNDLED), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_bundled_model_is_as_good_in_int8():
    processor = LlavaProcessor.from_pretrained(BUNDLED)
    right = {}
    for quantize in (None, "int8"):
        model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, quantize=quantize)
        right[quantize] = judge.evaluate(model, processor, 12, emoji_world.load_sprites())["all"]
    assert right["int8"][1] == right[None][1] > 80
    assert abs(right["int8"][0] - right[None][0]) <= 0.05 * right[None][1]
