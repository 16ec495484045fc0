"""How fast the kernels and the model are on an NVIDIA GPU, compared with PyTorch, transformers and the card's limits.

    python benchmarks/gpu.py                    checks the results, then prints every table; the 7B in bfloat16 must fit
    python benchmarks/gpu.py --size 161M        the same with a small model
    python benchmarks/gpu.py --compile-only     needs no GPU: registers and shared memory of each kernel

Weights are random and made on the device: the text is meaningless, the times are real. Times are medians. Shares are
relative to the same card in the same run: the bandwidth of a large copy and the rate of a large matrix product.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu import bytes_per_token, rival
from kernel_cases import cases, compiled_rows, markdown
from random_weights import SIZES, random_model

from hub.tensors import no_weights
from hub.writer import config_json, write_json
from kernels import accelerate
from llava import LlavaConfig, LlavaForConditionalGeneration
from quantize import quantize_model

PROMPT = 608  # tokens, picture included
NEW = 257  # tokens of an answer: one from the prompt, the others decoded. Recording the graph is part of each answer
TOLERANCE = 0.02  # of the largest number: bfloat16 rounds to 0.4 %, and the order of operations differs


# --- The card --------------------------------------------------------------------------------------------------------


def seconds(work: Callable) -> float:
    """The median time of one call on the GPU, with its cache emptied before each."""
    from triton.testing import do_bench

    return do_bench(work, return_mode="median") / 1000


def card() -> dict:
    """Bytes per second of a large copy, read and written; floating-point operations per second of a large product."""
    a = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    m = torch.randn(8192, 8192, device="cuda").bfloat16()
    copy, rate = 2 * a.nbytes / seconds(lambda: b.copy_(a)), 2 * 8192**3 / seconds(lambda: m @ m)
    return {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": copy, "rate": rate}


def check_and_time_kernels(this: dict) -> list[dict]:
    """A row for each case. Exits if a kernel's result differs from the plain one."""
    rows = []
    for what, case in cases("cuda").items():
        ours, plain = case.kernel(), case.plain()
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (ours, plain)), strict=True):
            error = float((a.float() - b.float()).abs().max() / b.float().abs().max())
            if not error < TOLERANCE:
                raise SystemExit(f"{what}: the kernel's error is {error:.1%} of the largest number")
        times = seconds(case.kernel), seconds(case.plain)
        least = max(case.bytes / this["copy"], case.flops / this["rate"])
        rows.append({"what": what, "kernel, us": f"{times[0] * 1e6:.1f}", "torch, us": f"{times[1] * 1e6:.1f}",
                     "torch / kernel": f"{times[1] / times[0]:.2f}", "of the roofline": f"{least / times[0]:.0%}",
                     "GB/s": f"{case.bytes / times[0] / 1e9:.0f}",
                     "TFLOP/s": f"{case.flops / times[0] / 1e12:.0f}" if case.flops else ""})  # fmt: skip
    return rows


# --- The whole model -------------------------------------------------------------------------------------------------


def fast_and_plain(size: str) -> tuple[LlavaForConditionalGeneration, LlavaForConditionalGeneration]:
    """An accelerated model, and a plain one on the same memory."""
    config = LlavaConfig(*SIZES[size])
    fast = accelerate(random_model(config, "cuda"), "triton")
    with no_weights():
        plain = LlavaForConditionalGeneration(config)
    plain.load_state_dict(fast.state_dict(), assign=True)
    return fast, plain.eval()


def prompt(model: LlavaForConditionalGeneration) -> dict:
    config = model.config
    ids = torch.randint(3, 30000, (1, PROMPT), device="cuda")
    ids[:, 20 : 20 + config.image_seq_length] = config.image_token_index
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, device="cuda").to(model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def check_answer(fast: LlavaForConditionalGeneration, plain: LlavaForConditionalGeneration, inputs: dict) -> str:
    """Score the accelerated model's greedy answer with the plain model: each token's score must be near the best."""
    answers = [model.generate(**inputs, max_new_tokens=NEW, eos_token_id=-1) for model in (fast, plain)]
    scores = plain(answers[0], inputs["pixel_values"]).logits[0, PROMPT - 1 : -1].float()
    chosen = scores.gather(1, answers[0][0, PROMPT:, None])[:, 0]
    behind = float(((scores.amax(-1) - chosen) / scores.std(-1)).max())
    if behind > 0.1:
        raise SystemExit(f"the accelerated model chose a token whose score is {behind:.2f} deviations below the best")
    same = int((answers[0] == answers[1])[0, PROMPT:].cumprod(0).sum())
    return f"The first {same} of {NEW} greedy tokens are the same; no score is more than {behind:.3f} deviations lower."


def time_answer(model: torch.nn.Module, inputs: dict, rounds: int, **options) -> tuple[float, float]:
    """Seconds to the first token, and for each further one."""
    times = {1: [], NEW: []}
    for i in range(rounds + 2):  # the first two compile and warm up
        for new, found in times.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
            torch.cuda.synchronize()
            if i > 1:
                found.append(time.perf_counter() - start)
    first, whole = (statistics.median(found) for found in times.values())
    return first, (whole - first) / (NEW - 1)


def flops_of_prompt(model: LlavaForConditionalGeneration) -> float:
    """Multiplications and additions of the first token: every matrix for every row, and attention."""
    text, vision = model.config.text_config, model.config.vision_config
    size = lambda part: sum(p.numel() for p in part.parameters() if p.dim() == 2)  # noqa: E731
    P, depth = vision.num_patches, vision.num_hidden_layers - 1  # the last layer of the tower does not run
    tower = depth * (2 * (P + 1) * size(model.vision_tower.encoder.layers[0]) + 4 * (P + 1) ** 2 * vision.hidden_size)
    decoder = 2 * PROMPT * size(model.language_model.layers) + 2 * model.lm_head.weight.numel()
    attention = 2 * PROMPT**2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    return tower + 2 * P * size(model.multi_modal_projector) + decoder + attention


def time_models(fast, plain, inputs: dict, this: dict, rounds: int) -> list[dict]:
    """A row for each way to run the same weights. The last one quantizes `plain` in place."""
    context = PROMPT + NEW // 2
    floors = flops_of_prompt(plain) / this["rate"], bytes_per_token(plain, context) / this["copy"]
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config_json(plain.config))
        theirs = rival(plain, Path(folder))
    found = {
        "transformers": time_answer(theirs, inputs, rounds),
        "transformers, static cache, compiled": time_answer(theirs, inputs, rounds, cache_implementation="static"),
    }
    del theirs
    ours, graph_step = {"eos_token_id": -1}, fast.step
    found["plain"] = time_answer(plain, inputs, rounds, **ours)
    del fast.step  # back to the class's own
    found["kernels"] = time_answer(fast, inputs, rounds, **ours)
    fast.step = graph_step
    found["kernels and graph"] = time_answer(fast, inputs, rounds, **ours)
    quantize_model(plain, "int8")
    plain.to(dtype=plain.dtype)
    found["kernels and graph, int8"] = time_answer(accelerate(plain, "triton"), inputs, rounds, **ours)
    int8_floor = bytes_per_token(plain, context) / this["copy"]
    rows = []
    for what, (first, step) in found.items():
        floor = int8_floor if "int8" in what else floors[1]
        rows.append({"what": what,
                     "first token, ms": f"{first * 1e3:.1f}", "times its floor": f"{first / floors[0]:.2f}",
                     "decode, tokens/s": f"{1 / step:.1f}", "of the roofline": f"{floor / step:.0%}",
                     "transformers / this": f"{found['transformers'][1] / step:.2f}"})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time the kernels and the model on this GPU.")
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_80 and sm_90; needs no GPU")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if args.compile_only:
        tables = {"compiled": compiled_rows((8, 0)) + compiled_rows((9, 0))}
    elif not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here: only --compile-only works without one")
    else:
        torch.set_grad_enabled(False)
        this = card()
        print(f"{this['name']}, torch {this['torch']}: copies {this['copy'] / 1e9:.0f} GB/s, "
              f"multiplies {this['rate'] / 1e12:.0f} TFLOP/s\n")  # fmt: skip
        tables = {"card": [this], "kernels": check_and_time_kernels(this)}
        fast, plain = fast_and_plain(args.size)
        inputs = prompt(plain)
        print(check_answer(fast, plain, inputs) + "\n")
        tables["model"] = time_models(fast, plain, inputs, this, args.rounds)
    print("\n\n".join(markdown(rows) for name, rows in tables.items() if name != "card"))
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
