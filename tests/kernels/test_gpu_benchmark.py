"""benchmarks/gpu.py and figures.py without a GPU: the arithmetic, what is found wrong, the flow with a small model."""

import contextlib
import itertools
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llama
from clip import CLIPVisionConfig
from kernel_helpers import BF16, FP32, TEXT, VISION, random
from tiny_world import ROOT

pytest.importorskip("triton")
sys.path.append(str(ROOT / "benchmarks"))
import figures
from kernel_cases import Case, add_norm_case, norm_case

import gpu
from kernels import accelerate
from kernels.graph import GraphStep


@pytest.fixture
def run(tmp_path):
    return gpu.Run(device="cpu", size="small", rounds=1, out=tmp_path / "report.md", end=time.monotonic() + 600,
                   read=1e9, rate=1e12)  # fmt: skip


def report(run) -> str:
    return run.out.read_text()


# --- The arithmetic --------------------------------------------------------------------------------------------------

T = 300
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
WRONG = {
    "half the queries do not see themselves": CAUSAL & ~torch.diag(torch.arange(T) % 2 == 1),
    "31 future keys are seen": torch.ones(T, T, dtype=torch.bool).tril(31),
    "one query sees one key less": CAUSAL & ~F.one_hot(torch.tensor(200 * T + 150), T * T).bool().view(T, T),
}


def attention_error(mask: Tensor) -> float:
    """The error of attention in bfloat16 through this mask, in place of the causal one."""
    q, k, v = random(3, 1, 2, T, 64, dtype=BF16)
    exact = llama.eager_attention(q.float(), k.float(), v.float())[0]
    return figures.error(llama.attention(q, k, v, mask), llama.eager_attention(q, k, v)[0], exact)


def test_the_error_of_a_row_finds_wrong_attention():
    assert attention_error(CAUSAL) <= 1
    assert all(attention_error(mask) > 1 for mask in WRONG.values())
    x = random(3, 8)
    assert figures.error(x, x, x) == 0 and figures.error(x * torch.nan, x, x) == figures.error(x[:2], x, x) == torch.inf


def test_figures_of_an_answer():
    times = {1: [0.1, 0.2, 5.0], 9: [1.0], 109: [2.0, 2.0]}
    assert figures.summary(times) == pytest.approx({"first": 0.2, "steady": 0.01, "whole": 2 / 109})
    with pytest.raises(ValueError, match="not 2"):
        figures.summary({2: [1], 3: [1], 4: [1]})
    slow = {"first": 0.4, "steady": 0.02, "whole": 1.0}
    rows = figures.model_rows({"ours": slow | {"steady": 0.01}, "theirs": slow}, "theirs", 0.2, 0.005)
    assert [row["of the reading speed"] for row in rows] == ["50%", "25%"]
    assert [row["theirs / this, steady"] for row in rows] == ["2.00", "1.00"]
    assert [row["times its floor"] for row in rows] == ["2.00", "2.00"]
    assert figures.data_sheet_speed(2_619_000, 5120) == pytest.approx(3.35e12, rel=0.001)  # an H100's memory
    assert figures.data_sheet_speed(None, 5120) is None


def test_parts_of_a_step_add_up():
    kernels = [("decode_kernel", 1e-6), ("join_kernel", 1e-6), ("sm90_xmma_gemm_bf16", 5e-6), ("something", 1e-6)] * 2
    rows = figures.parts_of_a_step(kernels, 2, 10e-6)
    assert {row["part of a step"]: (row["us"], row["share"]) for row in rows} == {
        "matrices": ("5", "50%"), "attention": ("2", "20%"), "other": ("1", "10%"), "between kernels": ("2", "20%")
    }  # fmt: skip
    assert rows[0]["part of a step"] == "matrices" and [len(row[""]) for row in rows] == [20, 8, 4, 8]
    with pytest.raises(ValueError, match="saw no kernel"):
        figures.parts_of_a_step([], 2, 10e-6)


def test_what_nvidia_smi_says():
    lines = ["1980, 2619, 650.5, 60\n", "1755, 2619, 700.1, 64\n", "1980, 2619, 690, 66\n", "[N/A], 2619, 1, 1\n", "19"]
    assert "clocks.sm 1755 / 1980 / 1980 MHz" in figures.watched(lines)
    assert "reported none" in figures.watched(["No devices were found\n"])


# --- The flow --------------------------------------------------------------------------------------------------------


def test_a_section_that_fails_is_reported_and_the_next_one_runs(run):
    def break_down(run) -> None:
        run.say("so far")
        raise SystemExit("a rival has other weights")

    def use_up_the_time(run) -> None:
        run.end = 0

    sections = {"A": break_down, "B": lambda run: run.say("B ran"), "C": use_up_the_time, "D": break_down}
    assert gpu.run_all(sections, run) == ["A", "D"]
    text = report(run)
    assert text.index("so far") < text.index("a rival has other weights") < text.index("## B") < text.index("B ran")
    assert "NOT RUN" in text[text.index("## D") :] and text.endswith("FAILED: A, D.\n\n")


def test_ways_are_timed_in_turns_and_one_that_fails_is_left_out(run, monkeypatch):
    now, order = itertools.count(), []
    monkeypatch.setattr(gpu, "clock", lambda device: next(now))
    ways = {name: lambda new, name=name: order.append((name, new)) for name in "ab"}
    run.rounds = 2
    found = gpu.time_in_turns({"broken": lambda new: 1 / 0, **ways}, run)
    assert set(found) == {"a", "b"} and found["a"]["first"] == 1 and "ZeroDivisionError" in report(run)
    warm, short, long = 4 * len(gpu.LENGTHS), gpu.LENGTHS[0], gpu.LENGTHS[-1]
    assert order[0] == ("a", long)
    assert [name for name, new in order[warm:] if new == short] == ["a", "b", "b", "a"]
    run.end = 0
    gpu.time_in_turns(ways, run)
    assert "Only 1 of 2 rounds" in report(run)
    with pytest.raises(ValueError, match="none of the models"):
        gpu.report_times(run, {})


def test_a_wrong_kernel_fails_and_the_others_are_still_timed(run, monkeypatch):
    right, norm = add_norm_case(3, "cpu", FP32), norm_case("cpu", FP32)
    makers = {
        "wrong": lambda: norm._replace(kernel_of=lambda x, weight: norm.kernel_of(x.flip(-1), weight)),
        "broken": lambda: Case(lambda: 1 / 0, lambda: 0, (), 0),
        "right": lambda: right,
    }
    monkeypatch.setattr(gpu, "makers", lambda device: makers)
    monkeypatch.setattr(gpu, "seconds", lambda work: 1e-3)
    with pytest.raises(ValueError, match=r"wrong kernels: wrong \(its error is .*; broken \(ZeroDivisionError\)$"):
        gpu.check_and_time_kernels(run)
    assert "| right |" in report(run)


@pytest.fixture
def small(run, monkeypatch):
    """A small model in place of the 7B, on the CPU and in float32. Triton's interpreter would take a minute."""
    make, Config = gpu.random_model, gpu.LlavaConfig
    torch.manual_seed(0)

    def random_model(config, device):
        model = make(config, device).float()
        for parameter in model.language_model.layers.parameters():
            parameter.mul_(20 if parameter.dim() == 2 else 1)  # its matrices are narrow: the sums are small
        return model

    def accelerated(model, how):
        assert how == "triton"
        model.step = GraphStep(accelerate(model))
        return model

    size = CLIPVisionConfig(**VISION), llama.LlamaConfig(**TEXT, num_hidden_layers=1)
    replaced = {"SIZES": {"small": size}, "random_model": random_model, "accelerate": accelerated, "PROMPT": 30,
                "LENGTHS": (1, 2, 4), "LlavaConfig": partial(Config, image_token_index=60), "STEPS": 1}  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(gpu, name, value)
    return run


def test_every_section_about_the_model_runs(small, monkeypatch):
    event = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, name="decode_kernel",
                            time_range=SimpleNamespace(elapsed_us=lambda: 3.0))  # fmt: skip
    profile = contextlib.nullcontext(SimpleNamespace(events=lambda: [event]))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profile)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    measured = {"The card", "The kernels", "The tests on a GPU"}  # by PyTorch, above, and by pytest
    assert gpu.run_all({title: work for title, work in gpu.SECTIONS.items() if title not in measured}, small) == []
    text = report(small)
    assert "the first [4, 4] of 4 greedy tokens" in text and "| attention | 1 | 3 |" in text
    assert all(f"\n| {what} | " in text for what in ("plain", "transformers", "kernels and graph, int8"))


def test_the_check_of_answers_finds_wrong_attention(small, monkeypatch):
    def other_values(q, k, v, mask=None):  # in decoding only
        return llama.attention(q, k, v.flip(2) if q.shape[2] == 1 else v, mask)

    def accelerated(model, how):
        for layer in model.language_model.layers:
            layer.self_attn.attention = other_values
        return model

    monkeypatch.setattr(gpu, "accelerate", accelerated)
    with pytest.raises(ValueError, match="deviations below the best"):
        gpu.check_answers(small)
