"""Checks the kernels and the model on an NVIDIA GPU, and times them next to PyTorch, transformers and the card's speed.

    python benchmarks/gpu.py                    everything, in about 14 minutes at most; the 7B in bfloat16 must fit
    python benchmarks/gpu.py --size 161M        the same with a small model

Weights are random and made on the device: the text is meaningless, the times are real. Times are medians, and models
that are compared run in turns. Shares are relative to what the same card reads and multiplies in the same run. Each
section is written to --out when it ends. One that fails prints why, and the next one runs; the exit code is then 1.
"""

import argparse
import faulthandler
import gc
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import figures
import torch
from figures import markdown
from kernel_cases import makers
from random_weights import SIZES, random_model

from generate import prefill
from hub.tensors import no_weights
from hub.writer import config_json, write_json
from kernels import accelerate
from llava import LlavaConfig, LlavaForConditionalGeneration
from quantize import quantize_model

ROOT = Path(__file__).parent.parent
PROMPT = 608  # tokens, picture included
LENGTHS = (1, 9, 257)  # tokens of an answer. The graph is recorded for the third token, so steady times start at 9
STEPS = 20  # decode steps that are profiled
MOST_BEHIND = 0.1  # standard deviations: how far a chosen token's score may be below the best one


class Run(SimpleNamespace):
    """What the sections share: options, what earlier ones made, and the report."""

    device = "cuda"

    def say(self, text: str) -> None:
        print(text, "\n", flush=True)
        with self.out.open("a") as file:
            file.write(text + "\n\n")

    def time_is_over(self) -> bool:
        return time.monotonic() > self.end


# --- The flow --------------------------------------------------------------------------------------------------------


def run_all(sections: dict[str, Callable[[Run], None]], run: Run) -> list[str]:
    """Run the sections in order, whatever happens in one of them. Returns the titles of those that failed."""
    failed = []
    for title, work in sections.items():
        run.say(f"## {title}")
        if run.time_is_over():
            run.say("NOT RUN: the time is over (--minutes).")
            failed.append(title)
            continue
        start, watch = time.monotonic(), Watch(run.device)
        try:
            work(run)
        except (Exception, SystemExit):
            run.say(f"FAILED\n\n```\n{traceback.format_exc()}```")
            failed.append(title)
        run.say(f"{watch.stop()} The section took {time.monotonic() - start:.0f} s.")
        release(run.device)
    run.say(f"FAILED: {', '.join(failed)}." if failed else "All sections succeeded.")
    return failed


class Watch:
    """Runs nvidia-smi during a section."""

    def __init__(self, device: str):
        self.file, self.process = tempfile.TemporaryFile("w+"), None  # noqa: SIM115  (closed by stop)
        with suppress(OSError, RuntimeError, AssertionError):  # no nvidia-smi, or no GPU
            uuid = torch.cuda.get_device_properties(device).uuid if device != "cpu" else None
            command = ["nvidia-smi", "--format=csv,noheader,nounits", f"--query-gpu={','.join(figures.QUERY)}"]
            command += ["--loop-ms=200", f"--id=GPU-{uuid}"]
            self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.STDOUT)

    def stop(self) -> str:
        if self.process:
            self.process.terminate()
            self.process.wait()
        self.file.seek(0)
        with self.file:
            return figures.watched(self.file.readlines())


def release(device: str) -> None:
    """Free the memory of what is no longer used. A model and its GraphStep refer to each other."""
    gc.collect()
    if device != "cpu":
        with suppress(RuntimeError):  # after an error on the device nothing can be freed
            torch.cuda.empty_cache()


def clock(device: str) -> float:
    """The time, once the device has finished all its work."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable) -> float:
    """The median time of one call on the GPU, with its cache emptied before each."""
    from triton.testing import do_bench

    return do_bench(work, return_mode="median") / 1000


# --- The card and the kernels ----------------------------------------------------------------------------------------


def measure_card(run: Run) -> None:
    """The card's bytes per second, by the fastest of three ways to read, and its operations per second."""
    import triton

    card = torch.cuda.get_device_properties(run.device)
    a = torch.ones(2**30, device=run.device)  # 4 GiB
    b, x = torch.empty_like(a[: 2**29]), torch.randn(8192, 8192, device=run.device).bfloat16()
    reads = {"sum": a.nbytes / seconds(a.sum), "max": a.nbytes / seconds(a.amax),
             "copy": 2 * b.nbytes / seconds(lambda: b.copy_(a[: len(b)]))}  # fmt: skip
    run.read, run.rate = max(reads.values()), 2 * 8192**3 / seconds(lambda: x @ x)
    run.say(f"{card.name} (sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB), "
            f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}.")  # fmt: skip
    speeds = ", ".join(f"{speed / 1e9:.0f} GB/s ({how})" for how, speed in reads.items())
    run.say(f"It reads {speeds} and multiplies {run.rate / 1e12:.0f} TFLOP/s in bfloat16.")
    clock_rate, bus = (getattr(card, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    if sheet := figures.data_sheet_speed(clock_rate, bus):
        run.say(f"Its memory's clock and bus allow {sheet / 1e9:.0f} GB/s: the best reading is {run.read / sheet:.0%}.")


def check_and_time_kernels(run: Run) -> None:
    """A row for each case. Raises ValueError at the end if a kernel is wrong."""
    rows, wrong = [], []
    for what, make in makers(run.device).items():
        try:
            case = make()
            worst = max(map(figures.error, *map(as_tuple, (case.kernel(), case.plain(), case.exact()))))
            times = seconds(case.kernel), seconds(case.plain)
        except Exception as error:  # of the compiler or the driver: the other kernels still run
            run.say(f"{what}: {traceback.format_exc()}")
            wrong.append(f"{what} ({type(error).__name__})")
            continue
        if worst > 1:
            wrong.append(f"{what} (its error is {worst:.1f} times what is allowed)")
        least = max(case.bytes / run.read, case.flops / run.rate)
        rows.append({"what": what, "error / allowed": f"{worst:.2f}", "kernel, us": f"{times[0] * 1e6:.1f}",
                     "torch, us": f"{times[1] * 1e6:.1f}", "torch / kernel": f"{times[1] / times[0]:.2f}",
                     "of the limit": f"{least / times[0]:.0%}", "GB/s": f"{case.bytes / times[0] / 1e9:.0f}",
                     "TFLOP/s": f"{case.flops / times[0] / 1e12:.0f}" if case.flops else ""})  # fmt: skip
    if rows:
        run.say(markdown(rows))
    if wrong:
        raise ValueError("wrong kernels: " + "; ".join(wrong))


def as_tuple(x: torch.Tensor | tuple) -> tuple:
    return x if isinstance(x, tuple) else (x,)


# --- The model -------------------------------------------------------------------------------------------------------


def make_models(run: Run) -> None:
    """An accelerated model, and a plain one that shares its weights."""
    config = LlavaConfig(*SIZES[run.size])
    model = random_model(config, run.device)
    for layer in model.language_model.layers:
        layer.self_attn.o_proj.weight *= 10  # in a random model the MLPs outweigh attention: an error would not show
    run.fast = accelerate(model, "triton")
    run.fast.lm_head.weight[config.image_token_index] = 0  # never chosen: the plain model would expect a picture
    with no_weights():
        run.plain = LlavaForConditionalGeneration(config)
    run.plain.load_state_dict(run.fast.state_dict(), assign=True)
    run.plain.eval()
    weights = sum(p.nbytes for p in run.plain.parameters())
    run.say(f"{run.size}: {weights / 1e9:.1f} GB of weights in bfloat16, a prompt of {PROMPT} tokens with one picture, "
            f"answers of {', '.join(map(str, LENGTHS))} tokens.")  # fmt: skip


def prompt(run: Run, batch: int = 1) -> dict:
    """A prompt, or a batch of them in which each row has 8 tokens of padding more than the one before it."""
    config = run.plain.config
    ids = torch.randint(3, min(30000, config.image_token_index), (batch, PROMPT), device=run.device)
    ids[:, 20 : 20 + config.image_seq_length] = config.image_token_index
    side, padding = config.vision_config.image_size, 8 * torch.arange(batch, device=run.device)
    mask = (torch.arange(PROMPT, device=run.device) >= padding[:, None]).long()
    pixels = torch.randn(batch, 3, side, side, device=run.device).to(run.plain.dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def check_answers(run: Run) -> None:
    """Make the models, and score the accelerated one's greedy answers with the plain one.

    Raises ValueError if a token's score is not near the best one, or if a second answer differs from the first.
    """
    make_models(run)
    new = LENGTHS[-1]
    for batch in (1, 2):
        inputs = prompt(run, batch)
        ours, again, theirs = (
            model.generate(**inputs, max_new_tokens=new, eos_token_id=-1) for model in (run.fast, run.fast, run.plain)
        )
        if not torch.equal(ours, again):
            raise ValueError(f"batch of {batch}: the second answer differs from the first")
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        kept = slice(PROMPT - 1, PROMPT + new - 1)
        logits = run.plain(ours, inputs["pixel_values"], mask, positions, use_cache=False).logits[:, kept].float()
        chosen = logits.gather(2, ours[:, PROMPT:, None])[..., 0]
        behind = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
        same = (ours == theirs)[:, PROMPT:].cumprod(1).sum(1).tolist()
        run.say(f"Batch of {batch}: the first {same} of {new} greedy tokens are the plain model's; no score is more "
                f"than {behind:.3f} standard deviations below the best; a second answer is the same.")  # fmt: skip
        if not behind <= MOST_BEHIND:
            raise ValueError(f"batch of {batch}: a chosen token's score is {behind:.2f} deviations below the best")


def answer(model: torch.nn.Module, inputs: dict, **options) -> Callable[[int], None]:
    return lambda new: model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)


def time_in_turns(ways: dict[str, Callable[[int], None]], run: Run) -> dict[str, dict]:
    """figures.summary for each way to give an answer. One that fails is reported, and the others are timed."""
    times = {}
    for what, way in ways.items():
        try:
            for new in [*LENGTHS[::-1]] * 2:  # compiles and warms up; the longest first, for caches that stay
                way(new)
            times[what] = {new: [] for new in LENGTHS}
        except (Exception, SystemExit):
            run.say(f"FAILED: {what}\n\n```\n{traceback.format_exc()}```")
    for i in range(run.rounds):
        if i and run.time_is_over():
            run.say(f"Only {i} of {run.rounds} rounds: the time is over.")
            break
        for what in figures.turns(times, i):
            for new in LENGTHS:
                start = clock(run.device)
                ways[what](new)
                times[what][new].append(clock(run.device) - start)
    return {what: figures.summary(found) for what, found in times.items()}


def report_times(run: Run, found: dict[str, dict], rival: str | None = None) -> None:
    """A table of `found`. Raises ValueError if no way could be timed."""
    if not found:
        raise ValueError("none of the models could be timed")
    context = PROMPT + (LENGTHS[1] + LENGTHS[2]) // 2  # tokens in the cache, on average, while steady
    first, step = figures.flops_of_prompt(run.plain, PROMPT) / run.rate, figures.bytes_per_token(run.plain, context)
    run.say(markdown(figures.model_rows(found, rival, first, step / run.read)))


def time_ours(run: Run) -> None:
    """The plain model, with kernels, and with kernels and the graph."""
    inputs, ours = prompt(run), {"eos_token_id": -1}

    def without_graph(new: int) -> None:
        graph_step = vars(run.fast).pop("step")
        try:
            answer(run.fast, inputs, **ours)(new)
        finally:
            run.fast.step = graph_step

    ways = {"plain": answer(run.plain, inputs, **ours), "kernels": without_graph,
            "kernels and graph": answer(run.fast, inputs, **ours)}  # fmt: skip
    report_times(run, time_in_turns(ways, run))


@torch.inference_mode()
def profile_step(run: Run) -> None:
    """Where the time of a decode step goes, with bars."""
    inputs = prompt(run)
    cache = run.fast.language_model.new_cache(1, PROMPT + 5 * STEPS)
    prefill(run.fast, inputs["input_ids"], inputs["attention_mask"], cache, inputs["pixel_values"])
    ids = torch.full((1,), 5, device=run.device)
    position = torch.full((1, 1), PROMPT, device=run.device)

    def work() -> float:
        start = clock(run.device)
        for _ in range(STEPS):
            run.fast.step(ids, position, cache)
        return (clock(run.device) - start) / STEPS

    work()  # records the graph
    step = min(work() for _ in range(3))
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        work()
    ran = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [(event.name, event.time_range.elapsed_us() / 1e6) for event in ran]
    run.say(f"A step takes {step * 1e6:.0f} us. At the reading speed its weights take "
            f"{figures.bytes_per_token(run.plain, 0) / run.read * 1e6:.0f} us.")  # fmt: skip
    run.say(markdown(figures.parts_of_a_step(kernels, STEPS, step)))
    others = sorted({name for name, _ in kernels if figures.group_of(name) in ("other", "matrices")})
    run.say("Counted as matrices or as other: " + "; ".join(f"`{name[:80]}`" for name in others) + ".")


def time_rivals(run: Run) -> None:
    """This project next to transformers, plain and with a static cache and compiled, and to its own compiled step."""
    from cpu import rival

    inputs, ours = prompt(run), {"eos_token_id": -1}
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config_json(run.plain.config))
        theirs = rival(run.plain, Path(folder))
    compiled = torch.compile(type(run.plain).step)

    def compiled_step(new: int) -> None:
        run.plain.step = lambda *given: compiled(run.plain, *given)
        try:
            answer(run.plain, inputs, **ours)(new)
        finally:
            del run.plain.step

    ways = {"kernels and graph": answer(run.fast, inputs, **ours), "transformers": answer(theirs, inputs),
            "transformers, static cache, compiled": answer(theirs, inputs, cache_implementation="static"),
            "plain, step compiled": compiled_step}  # fmt: skip
    try:
        found = time_in_turns(ways, run)
        rivals = [what for what in found if what != "kernels and graph"]
        report_times(run, found, min(rivals, key=lambda what: found[what]["steady"], default=None))
        if len(found) < len(ways):
            raise ValueError("not all ways could be timed: the best rival may be missing")
    finally:
        torch._dynamo.reset()


def time_int8(run: Run) -> None:
    """With int8 weights. Quantizes `run.plain` in place."""
    quantize_model(run.plain, "int8")
    run.plain.to(dtype=run.fast.dtype)
    ways = {"kernels and graph, int8": answer(accelerate(run.plain, "triton"), prompt(run), eos_token_id=-1)}
    report_times(run, time_in_turns(ways, run))


def run_tests(run: Run) -> None:
    """tests/gpu, in a separate process: every dtype, batches, padding, windows, int8, int4, threads and chat."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", "tests/gpu"]
    with tempfile.TemporaryFile("w+") as file:
        try:
            left = max(30.0, 0.4 * (run.end - time.monotonic()))  # the others need the rest
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = f"none after {left:.0f} s"
        file.seek(0)
        run.say("```\n" + "".join(file.readlines()[-60:]) + "```")
    if code:
        raise ValueError(f"pytest ended with the code {code}")


SECTIONS = {
    "The card": measure_card,
    "The kernels": check_and_time_kernels,
    "The tests on a GPU": run_tests,
    "The answers": check_answers,
    "This project": time_ours,
    "Where the time of a decode step goes": profile_step,
    "Next to its rivals": time_rivals,
    "int8": time_int8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time the kernels and the model on this GPU.")
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=14, help="start no section later (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results.md"), help="default: %(default)s")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; python benchmarks/targets.py works without one")
    faulthandler.dump_traceback_later(60 * args.minutes + 120, exit=True)  # if a section hangs, say where
    args.out.write_text("")
    run = Run(**vars(args), end=time.monotonic() + 60 * args.minutes)
    with torch.no_grad():
        failed = run_all(SECTIONS, run)
    print(f"The report is in {args.out}.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
