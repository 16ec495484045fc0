"""How fast this is on a CPU, against Hugging Face transformers on the same weights: the README's table.

    python benchmarks/cpu.py                       the tiny model and one of 161 million weights
    python benchmarks/cpu.py --also FOLDER         and another checkpoint, such as random_weights.py's 7B

Both models stand in one process and take turns, theirs on views of our weights, so that noise hits both and a 7B fits.
Times are medians of --rounds. What only a process of its own can tell (from its start to the first token, its peak
memory, loading) is measured in such processes, also in turns.

    first token    the whole prompt, picture included, to the first word
    decode         each further word, of every row of the batch at once
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from random_weights import make

from clip import open_image
from command import BUNDLED, fast_dtype, run
from llava import LlavaForConditionalGeneration, LlavaProcessor
from load_weights import named_parts

ROOT = Path(__file__).parent.parent
IMAGE = ROOT / "images" / "cat-and-apple.jpg"
NEW = 17  # tokens of an answer: one from the prompt, the others decoded
THEIR_NAMES = [("language_model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
               ("multi_modal_projector.", "model.multi_modal_projector.")]  # fmt: skip
# The same lines for both libraries: a process that loads, answers with one token, and says what it took.
ALONE = """
import json, pathlib, time
import torch
from PIL import Image
from {library} import AutoProcessor, LlavaForConditionalGeneration
torch.set_num_threads({threads})
start = time.monotonic()
processor = AutoProcessor.from_pretrained({folder!r})
model = LlavaForConditionalGeneration.from_pretrained({folder!r}, dtype=torch.{dtype}{options})
prompt = "USER: <image>\\nDescribe the picture. ASSISTANT:"
inputs = processor(images=Image.open({image!r}), text=prompt, return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].to(torch.{dtype})
model.generate(**inputs, max_new_tokens=1, do_sample=False)
load = time.monotonic() - start
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # in kB; Linux knows it
print(json.dumps({{"load": load, "peak": int(peak) * 1024}}))
"""


# --- In one process --------------------------------------------------------------------------------------------------


def rival(ours: LlavaForConditionalGeneration, folder: Path) -> torch.nn.Module:
    """transformers' model on views of our weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration._from_config(config, dtype=ours.dtype)
    tensors = {}
    for name, tensor in named_parts(ours):
        prefix = next((pair for pair in THEIR_NAMES if name.startswith(pair[0])), ("", ""))
        tensors[prefix[1] + name.removeprefix(prefix[0])] = tensor.detach()
    theirs.load_state_dict(tensors, strict=False, assign=True)
    theirs.tie_weights()
    for part in theirs.modules():  # what is computed and not stored still lies on the meta device
        if hasattr(part, "inv_freq"):
            part.__init__(config.text_config)
        if hasattr(part, "position_ids"):
            part.position_ids = torch.arange(part.num_positions)[None]
    theirs.generation_config.eos_token_id = None  # every answer is as long as asked for
    return theirs.to(ours.device).eval()


def time_answer(model: torch.nn.Module, inputs: dict, **stop) -> tuple[float, float]:
    """Seconds to the first token, and for each further one."""
    clock = []
    hook = model.lm_head.register_forward_hook(lambda *_: clock.append(time.perf_counter()))
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **stop)
    hook.remove()
    steps = [after - before for before, after in itertools.pairwise(clock)]
    return clock[0] - start, statistics.median(steps)


def bytes_a_token(model: LlavaForConditionalGeneration, context: int) -> int:
    """What a decoded token must read at least: the decoder, the head, and the keys and values of the context."""
    text = model.config.text_config
    table = 0 if model.config.tie_word_embeddings else model.language_model.embed_tokens.weight.nbytes
    weights = sum(p.nbytes for part in (model.language_model, model.lm_head) for p in part.parameters()) - table
    if model.config.tie_word_embeddings:
        weights -= model.lm_head.weight.nbytes  # counted twice
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context * model.dtype.itemsize
    return weights + cache


def read_speed() -> float:
    """Bytes a second of summing a gigabyte, the best of five: what this memory gives."""
    numbers = torch.ones(2**28)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / min(times)


def in_turns(folder: Path, dtype: torch.dtype, rounds: int) -> list[dict]:
    """A row for each of first token and decode at batch 1 and 4: ours, int8 and theirs in turns."""
    ours = LlavaForConditionalGeneration.from_pretrained(folder, dtype)
    models = {"theirs": rival(ours, folder), "ours": ours}
    if dtype == torch.bfloat16:
        models["int8"] = LlavaForConditionalGeneration.from_pretrained(folder, dtype, quantize="int8")
    processor, rows = LlavaProcessor.from_pretrained(folder), []
    for batch in (1, 4):
        prompt = "USER: <image>\nDescribe the picture. ASSISTANT:"
        inputs = processor(images=[open_image(IMAGE)] * batch, text=[prompt] * batch).to("cpu", dtype)
        times = {name: [] for name in models}
        for _ in range(rounds + 1):  # the first is to warm up
            for name, model in models.items():
                times[name].append(
                    time_answer(model, dict(inputs), **({} if name == "theirs" else {"eos_token_id": -1}))
                )
        for i, what in enumerate(("first token", "decode")):
            seconds = {name: [pair[i] for pair in pairs[1:]] for name, pairs in times.items()}
            rows.append({"what": what, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "seconds": seconds})
        if batch == 1:
            context = inputs["input_ids"].shape[1] + NEW // 2
            rows[-1]["bytes"] = {name: bytes_a_token(m, context) for name, m in models.items() if name != "theirs"}
            rows[-1]["read speed"] = read_speed()
    return rows


# --- In processes of their own ---------------------------------------------------------------------------------------


def alone(folder: Path, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Rows for load with the first answer, process start to first token, and peak memory."""
    kinds = {"theirs": ("transformers", ""), "ours": ("llava", "")}
    if dtype == torch.bfloat16:
        kinds["int8"] = ("llava", ', quantize="int8"')
    found = {what: {name: [] for name in kinds} for what in ("load and first answer", "start to first token", "peak")}
    for _ in range(rounds):
        for name, (library, options) in kinds.items():
            script = ALONE.format(library=library, threads=torch.get_num_threads(), folder=str(folder), options=options,
                                  dtype=str(dtype).removeprefix("torch."), image=str(IMAGE))  # fmt: skip
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True,
                                  cwd=ROOT, env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"})  # fmt: skip
            told = json.loads(done.stdout.splitlines()[-1])
            found["start to first token"][name].append(time.perf_counter() - start)
            found["load and first answer"][name].append(told["load"])
            found["peak"][name].append(told["peak"])
    dtype = str(dtype).removeprefix("torch.")
    return [{"what": what, "batch": 1, "dtype": dtype, "seconds": seconds} for what, seconds in found.items()]


# --- The table -------------------------------------------------------------------------------------------------------


def machine() -> str:
    found = Path("/proc/cpuinfo")  # where there is Linux
    lines = found.read_text().splitlines() if found.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    amx = ", bf16 matrix units" if torch.cpu._is_amx_tile_supported() else ""
    cpu = names[0] if names else platform.processor()
    return (f"{cpu}, {torch.get_num_threads()} threads{amx}, torch {torch.__version__.partition('+')[0]}, "
            f"transformers {transformers.__version__}")  # fmt: skip


def show(value: float, what: str) -> str:
    if what == "peak":
        return f"{value / 1e9:.2f} GB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def table(rows: list[dict]) -> str:
    """Medians; "times" is theirs over ours in the same round, its median and, in brackets, its spread."""
    lines = [
        "| model | dtype | what | batch | transformers | ours | times faster | int8 | times faster |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells, theirs = [row["model"], row["dtype"], row["what"], str(row["batch"])], row["seconds"]["theirs"]
        cells.append(show(statistics.median(theirs), row["what"]))
        for name in ("ours", "int8"):
            if name not in row["seconds"]:
                cells += ["", ""]
                continue
            times = row["seconds"][name]
            ratios = sorted(a / b for a, b in zip(theirs, times, strict=True))
            cells.append(show(statistics.median(times), row["what"]))
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        for name, n in row.get("bytes", {}).items():
            speed = n / statistics.median(row["seconds"][name])
            kind, plain = row["dtype"] if name == "ours" else name, row["read speed"]
            share = f"{speed / plain:.0%} of a plain sum's {plain / 1e9:.1f}"
            lines.append(f"\n{row['model']} in {kind} reads {speed / 1e9:.1f} GB/s while it decodes, {share}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time this project and transformers on the same weights.")
    parser.add_argument("--also", type=Path, action="append", default=[], help="one more checkpoint, in bfloat16")
    parser.add_argument("--only", action="store_true", help="nothing but what --also names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where every single time is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        todo = [(folder, folder.name, [torch.bfloat16]) for folder in args.also]
        if not args.only:
            make("161M", Path(scratch))
            both = [torch.float32, torch.bfloat16] if fast_dtype("cpu") == torch.bfloat16 else [torch.float32]
            todo = [(BUNDLED, "tiny", both), (Path(scratch), "161M", both), *todo]
        for folder, name, dtypes in todo:
            for dtype in dtypes:
                for row in in_turns(folder, dtype, args.rounds) + alone(folder, dtype, max(1, args.rounds // 2)):
                    rows.append({"model": name, **row})
                    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(f"{machine()}\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(run(main))
