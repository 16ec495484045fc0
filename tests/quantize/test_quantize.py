"""Weights in few bits: rounded as the formula says, multiplied without loss, close to the model that they replace."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from evaluation.emoji_judge import UNSEEN
from hub.files import BUNDLED
from kernels.cpu import TWINS
from llava import LlavaForConditionalGeneration, LlavaProcessor
from quantize import (
    DIVISORS,
    GROUPS,
    Int4Linear,
    Int8Linear,
    choose_scheme,
    quantize_groups,
    quantize_linear,
    quantize_rows,
)
from training import emoji_world


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_takes_the_nearest_number(dtype):
    weight = torch.randn(50, 70).to(dtype)
    weight[7] = 0
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.bfloat16
    assert q.abs().max() == 127 and (q[7] == 0).all()
    assert_close(127 * scale.float(), weight.float().abs().amax(1), rtol=2**-8, atol=1e-10)
    nearest = (weight.double() / scale.double()[:, None]).round().clamp(-127, 127)
    assert torch.equal(q.double(), nearest)


@pytest.mark.quick
@pytest.mark.parametrize("group", GROUPS)
def test_int4_takes_the_scale_with_the_least_squared_error(group):
    weight = torch.randn(9, 256, generator=torch.Generator().manual_seed(group))
    weight[2] = 0
    q, scale = quantize_groups(weight, group)
    assert q.dtype == torch.int8 and scale.dtype == torch.bfloat16 and scale.shape == (9, 256 // group)
    assert q.min() == -8 and q.max() <= 7 and (q[2] == 0).all()
    for row, numbers, scales in zip(weight.split(1), q.split(1), scale.split(1), strict=True):
        for w, n, s in zip(row[0].split(group), numbers[0].split(group), scales[0], strict=True):
            errors = [plain_error(w, w[w.abs().argmax()] / steps) for steps in DIVISORS]
            assert ((n * s.float() - w) ** 2).sum().item() == pytest.approx(min(errors), rel=1e-5)


def plain_error(w: Tensor, scale: Tensor) -> float:
    scale = scale.bfloat16().float()
    return sum((min(max(round(n / scale.item()), -8), 7) * scale.item() - n) ** 2 for n in w.tolist() if n)


@pytest.mark.quick
def test_the_search_is_better_than_the_largest_number_over_seven():
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_groups(w, 32)
    error = (q.unflatten(-1, (-1, 32)) * scale.float()[..., None] - w.unflatten(-1, (-1, 32))).square().mean()
    groups = w.unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / step).round() * step - groups).square().mean()
    assert error < 0.75 * plain


@pytest.mark.quick
def test_two_numbers_of_int4_share_a_byte():
    weight = torch.tensor([[-8.0, 7, 0, 1] + [0] * 28])
    int4 = quantize_linear(weight, None, 4, 32)
    assert int4.packed.shape == (1, 16) and int4.scale.tolist() == [[1.0]]
    assert [hex(byte) for byte in int4.packed[0, :3].tolist()] == ["0xf0", "0x98", "0x88"]
    assert torch.equal(int4.dequantize(torch.float32), weight)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 60])
@pytest.mark.parametrize("shape", [(96, 96), (1100, 64)], ids=str)  # the second one is dequantized in three parts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("twin", [False, True])
def test_the_product_is_that_of_the_dequantized_matrix(bits, rows, shape, dtype, twin):
    torch.manual_seed(0)
    linear = quantize_linear(torch.randn(shape) / 10, torch.randn(shape[0]), bits, 32).to(dtype)
    x = torch.randn(1, rows, shape[1], dtype=dtype)
    with torch.no_grad():
        y = TWINS[type(linear)](linear)(x) if twin else linear(x)
        wanted = x.double() @ linear.dequantize(torch.float64).T + linear.bias.double()
    assert y.shape == (1, rows, shape[0]) and y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert_close(y.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.quick
@pytest.mark.parametrize("width", [20, 100])  # PyTorch's product reads beyond the end of rows of these widths
def test_int8_rows_of_odd_widths(width):
    linear, x = quantize_linear(torch.randn(96, width), None, 8, None), torch.randn(1, width)
    with torch.no_grad():
        assert_close(TWINS[Int8Linear](linear.float())(x), linear(x))


@pytest.mark.quick
def test_a_twin_in_int4_follows_its_numbers():
    """Loaded into, moved to another dtype or copied, it multiplies with what it then holds."""
    one, other = (quantize_linear(torch.randn(32, 64), None, 4, 32).bfloat16() for _ in range(2))
    twin, x = TWINS[Int4Linear](one), torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        twin(x)
        copied = copy.deepcopy(twin)
        twin.load_state_dict(other.state_dict())
        assert_close(twin(x), other(x), atol=0.05, rtol=0.05)
        for part in (twin.scale, other.scale):
            part.mul_(2)
        assert_close(twin(x), other(x), atol=0.1, rtol=0.05)
        assert not torch.allclose(copied(x), other(x), atol=0.1)
        assert_close(twin.half()(x.half()).bfloat16(), other(x), atol=0.1, rtol=0.1)


def shapes(hidden: int, intermediate: int) -> LlavaForConditionalGeneration:
    text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlavaForConditionalGeneration.without_weights({"text_config": text})


@pytest.mark.quick
def test_the_size_of_a_group():
    sizes = [choose_scheme(shapes(*widths), "int4").group for widths in ((2048, 4096), (256, 704), (96, 64))]
    assert sizes == [128, 64, 32] and choose_scheme(shapes(256, 704), "int4", 32) == (4, 32)
    assert choose_scheme(shapes(20, 64), "int8") == (8, None)
    for widths, how, group, words in (
        ((20, 64), "int4", None, r"multiples of 32, not \[20, 64\]"),
        ((256, 704), "int4", 128, "groups of 128 do not fit"),
        ((256, 704), "int4", -32, "groups of -32 do not fit"),
        ((256, 704), "int8", 64, "there are no groups"),
        ((256, 704), "int3", None, "int8 or int4, not to 'int3'"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_scheme(shapes(*widths), how, group)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_are_not_finite_are_refused(bits):
    for number in (float("nan"), float("inf")):
        weight = torch.ones(300, 64)
        weight[290, 5] = number
        with pytest.raises(ValueError, match="not finite"):
            quantize_linear(weight, None, bits, 32)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [8, 4])
def test_a_twin_takes_any_x_that_the_formula_takes(bits):
    plain = quantize_linear(torch.randn(32, 64), None, bits, 32).bfloat16()
    twin = TWINS[type(plain)](plain)
    whole = torch.randn(3, 5, 64).bfloat16()
    for x in (whole[0, 0], whole[:, -1:], whole[:0], whole.float()[:1, :1], whole.transpose(0, 1)[:2], whole[:, ::2]):
        with torch.no_grad():
            y, wanted = twin(x), plain(x)
        assert y.shape == wanted.shape and y.dtype == wanted.dtype
        assert_close(y.float(), wanted.float(), atol=0.1, rtol=0.05)


@pytest.mark.quick
def test_int4_loaded_in_inference_mode_runs():
    with torch.inference_mode():
        model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.bfloat16, quantize="int4")
        ids = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4)
    again = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.bfloat16, quantize="int4")
    assert torch.equal(ids, again.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4))


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parity
def test_a_model_in_int8_says_nearly_the_same(tmp_path, text, kernels):
    from reference import prompts, reference_and_ours

    _, whole = reference_and_ours(tmp_path, {}, text)
    int8 = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8", kernels=kernels)
    matrices = 7 * 3 + 1  # q, k, v, o, gate, up, down; the head
    assert sum(isinstance(module, Int8Linear) for module in int8.modules()) == matrices
    ids, _ = prompts([40], [0], 16)
    with torch.no_grad():
        int8.generate(ids, max_new_tokens=1)  # in inference mode: the buffer it leaves must be usable outside
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


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_threads_give_the_answers_of_one_after_the_other(quantize):
    """Pictures, questions and modes at once on one model. The first of them puts int4 in order."""
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

    numbers = list(range(15)) * 2  # each question in each mode
    wanted = [answer(n) for n in range(15)] * 2
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, numbers)) == wanted


@pytest.mark.quick
def test_a_tied_head_stays_as_it_is():
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, quantize="int8", kernels="torch")
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.language_model.embed_tokens.weight
    assert isinstance(model.language_model.layers[0].mlp.gate_proj, Int8Linear)
    assert not any(isinstance(module, Int8Linear) for module in model.vision_tower.modules())


@pytest.mark.quick
def test_other_words_than_int8_and_int4_are_refused():
    with pytest.raises(ValueError, match="int8 or int4, not to 'int3'"):
        LlavaForConditionalGeneration.from_pretrained(BUNDLED, quantize="int3")
