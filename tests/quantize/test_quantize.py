"""int8 weights: rounded to the nearest step, multiplied without loss, and close to the model that they replace."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from evaluation.emoji_judge import UNSEEN
from hub.files import BUNDLED
from hub.writer import save
from llava import LlavaForConditionalGeneration, LlavaProcessor
from quantize import Int8Linear, quantize_rows
from training import emoji_world


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_number_is_off_by_half_a_step_at_most(dtype):
    weight = torch.randn(50, 70).to(dtype)
    weight[7] = 0
    q, scale = quantize_rows(weight, dtype)
    assert q.dtype == torch.int8 and scale.dtype == dtype
    assert q.abs().max() == 127 and (q[7] == 0).all()
    step = scale.float()[:, None]
    slack = 1.01 if dtype == torch.float32 else 1.5  # a scale that is rounded down cannot reach the largest number
    assert ((q * step - weight.float()).abs() <= slack * step / 2).all()
    nearest = (weight.double() / scale.double()[:, None]).round().clamp(-127, 127)
    assert torch.equal(q.double(), nearest)


@pytest.mark.quick
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 60])
@pytest.mark.parametrize("width", [96, 20, 100])  # PyTorch's product reads beyond rows of the last two widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_product_is_that_of_the_dequantized_matrix(rows, width, dtype):
    torch.manual_seed(0)
    int8 = Int8Linear(torch.randn(96, width).to(dtype) / 10, dtype)
    x = torch.randn(1, rows, width, dtype=dtype)
    y = int8(x)
    wanted = x.float() @ (int8.q.float() * int8.scale.float()[:, None]).T
    assert y.shape == (1, rows, 96) and y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.float(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parity
def test_a_model_in_int8_says_nearly_the_same(tmp_path, text, kernels):
    from reference import prompts, reference_and_ours

    _, whole = reference_and_ours(tmp_path, {}, text)
    int8 = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8", kernels=kernels)
    matrices = 1 if text.get("mlp_bias") else 7 * 3 + 1  # those with a bias stay; q, k, v, o, gate, up, down; the head
    assert sum(isinstance(module, Int8Linear) for module in int8.modules()) == matrices
    ids, _ = prompts([40], [0], 16)
    with torch.no_grad():
        int8.generate(ids, max_new_tokens=1)  # in inference mode: the buffer it leaves must serve outside
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
    """Pictures, questions and modes at once on one model. A prompt with 64 patches dequantizes whole matrices."""
    processor = LlavaProcessor.from_pretrained(BUNDLED)
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, quantize=quantize)
    sprites = emoji_world.load_sprites()
    questions = ("Describe the picture.", "What is on the left?", "How many objects are in the picture?")

    def answer(n: int) -> tuple[list, list[str]]:
        question, options = questions[n % 3], dict(list(MODES.values())[n % 5])
        rows, said = options.pop("rows", 1), []
        if options.pop("stream", False):
            options["streamer"] = said.append
        pictures = [emoji_world.make_scene(sprites, UNSEEN + n + row)[0] for row in range(rows)]
        inputs = processor(images=pictures, text=[f"USER: <image>\n{question} ASSISTANT:"] * rows)
        return model.generate(**inputs, max_new_tokens=20, tokenizer=processor.tokenizer, **options).tolist(), said

    numbers = list(range(30)) * 2
    wanted = [answer(n) for n in range(30)] * 2
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, numbers)) == wanted


@pytest.mark.quick
def test_a_tied_head_stays_as_it_is():
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, quantize="int8", kernels="torch")
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.language_model.embed_tokens.weight
    assert isinstance(model.language_model.layers[0].mlp.gate_proj, Int8Linear)
    assert not any(isinstance(module, Int8Linear) for module in model.vision_tower.modules())


@pytest.mark.quick
def test_only_int8_is_known():
    with pytest.raises(ValueError, match="int8"):
        LlavaForConditionalGeneration.from_pretrained(BUNDLED, quantize="int4")


@pytest.mark.quick
def test_a_model_in_int8_is_not_saved(tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, quantize="int8")
    with pytest.raises(ValueError, match="without quantize"):
        save(model, LlavaProcessor.from_pretrained(BUNDLED), tmp_path / "model")
    assert not (tmp_path / "model").exists()
