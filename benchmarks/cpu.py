"""How fast this project is on a CPU, compared with Hugging Face transformers on the same weights: README.md's table.

    python benchmarks/cpu.py                       the tiny model and one of 161 million weights
    python benchmarks/cpu.py --also FOLDER         and another checkpoint, such as random_weights.py's 7B
    python benchmarks/cpu.py --plain               and the plain model, without the twins of kernels/cpu.py

The models are in one process and run in turns, theirs on views of our weights, so that noise affects all of them and a
7B fits. Start and memory are measured in separate processes, also in turns. The order changes every round. A large
checkpoint in int8 runs after the others, because the memory may not hold all of them.

    first token      from pixels and ids to the scores of the first token: tower, projector, the whole prompt
    decode           each further token, for all rows of the batch together
    start to first   from the start of a process to the end of the first token, imports and loading included
    load to first    from the start of loading; cold: the files are not in the system's cache
    peak             the most memory that the process used, mapped files included (VmHWM)

In float32 both must give the same tokens; otherwise no table is printed. The last three rows need Linux.
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
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import transformers  # before our folder is in sys.path: it would mistake our kernels/ for Hugging Face's package

sys.path.insert(0, str(Path(__file__).parent.parent))

from figures import bytes_per_token, turns
from random_weights import make

from hub.device import fast_dtype
from hub.files import BUNDLED, weight_files
from hub.pictures import open_image
from llava import LlavaForConditionalGeneration, LlavaProcessor

ROOT = Path(__file__).parent.parent
IMAGE = ROOT / "images" / "cat-and-apple.jpg"
PROMPT = "USER: <image>\nDescribe the picture. ASSISTANT:"
NEW = 17  # tokens of an answer: one from the prompt, the others decoded
# The same lines for both libraries: a process that loads, answers with one token, and prints when it had it.
ALONE = """
import json, pathlib, time
import torch
from PIL import Image
from {library} import AutoProcessor, LlavaForConditionalGeneration
torch.set_num_threads({threads})
start = time.time()
processor = AutoProcessor.from_pretrained({folder!r})
model = LlavaForConditionalGeneration.from_pretrained({folder!r}, dtype=torch.{dtype}{options})
inputs = processor(images=Image.open({image!r}), text={prompt!r}, return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].to(torch.{dtype})
model.generate(**inputs, max_new_tokens=1, do_sample=False)
end = time.time()
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # in kB; Linux only
print(json.dumps({{"start": start, "end": end, "peak": int(peak) * 1024}}))
"""


# --- In one process --------------------------------------------------------------------------------------------------


def rival(ours: LlavaForConditionalGeneration, folder: Path) -> torch.nn.Module:
    """transformers' model on views of our weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration._from_config(config, dtype=ours.dtype)
    parameters = ours.named_parameters()
    tensors = {("" if name.startswith("lm_head") else "model.") + name: t.detach() for name, t in parameters}
    missing, unknown = theirs.load_state_dict(tensors, strict=False, assign=True)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"transformers has other names for weights: {missing} are missing, {unknown} are unknown")
    theirs.tie_weights()
    for part in theirs.modules():  # buffers that are computed and not stored are still on the meta device
        if hasattr(part, "inv_freq"):
            part.__init__(config.text_config)
        if hasattr(part, "position_ids"):
            part.position_ids = torch.arange(part.num_positions)[None]
    theirs.generation_config.eos_token_id = None  # no answer ends early
    return theirs.to(ours.device).eval()


def time_answer(model: torch.nn.Module, inputs: dict, **stop) -> tuple[float, float, list]:
    """Seconds to the first token, median seconds for each further one, and the ids."""
    clock = []
    hook = model.lm_head.register_forward_hook(lambda *_: clock.append(time.perf_counter()))
    start = time.perf_counter()
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **stop).tolist()
    hook.remove()
    if len(clock) != NEW:
        raise SystemExit(f"an answer took {len(clock)} runs of the head, not {NEW}: the times are not valid")
    return clock[0] - start, statistics.median(b - a for a, b in itertools.pairwise(clock)), ids


def read_speed(numbers: torch.Tensor) -> float:
    """Bytes per second of a sum, which only reads, over more numbers than a CPU's caches hold."""
    start = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - start)


def together(folder: Path, dtype: torch.dtype, plain: bool) -> list[list[str]]:
    """Which models are in memory together: all, or int8 by itself after the others if the checkpoint is large."""
    names = ["theirs", "ours"] + ["plain"] * plain
    if dtype != torch.bfloat16:
        return [names]
    size = sum(file.stat().st_size for file in weight_files(folder))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [[*names, "int8"]] if size < memory / 3 else [names, ["int8"]]


def load_models(names: list[str], folder: Path, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    models = {}
    if "ours" in names:
        models["ours"] = LlavaForConditionalGeneration.from_pretrained(folder, dtype)
        models["theirs"] = rival(models["ours"], folder)
    if "plain" in names:
        models["plain"] = LlavaForConditionalGeneration.from_pretrained(folder, dtype, kernels="torch")
    if "int8" in names:
        models["int8"] = LlavaForConditionalGeneration.from_pretrained(folder, dtype, quantize="int8")
    return models


def in_turns(folder: Path, dtype: torch.dtype, rounds: int, plain: bool) -> list[dict]:
    """A row for each of first token and decode at batch 1 and 4, with all models in turns."""
    processor, memory = LlavaProcessor.from_pretrained(folder), torch.ones(2**28)
    found, speeds, sizes, rows = defaultdict(list), [], {}, []
    for names in together(folder, dtype, plain):
        models = load_models(names, folder, dtype)
        for batch in (1, 4):
            inputs = processor(images=[open_image(IMAGE)] * batch, text=[PROMPT] * batch).to("cpu", dtype)
            for i in range(rounds + 1):
                for name in turns(models, i):
                    stop = {} if name == "theirs" else {"eos_token_id": -1}
                    found[batch, name].append(time_answer(models[name], dict(inputs), **stop))
                speeds.append(read_speed(memory))
        context = inputs["input_ids"].shape[1] + NEW // 2
        sizes |= {name: bytes_per_token(models[name], context) for name in models if name in ("ours", "int8")}
        del models  # before the next ones are loaded
    for batch in (1, 4):
        if dtype == torch.float32 and found[batch, "ours"][0][2] != found[batch, "theirs"][0][2]:
            raise SystemExit(f"{folder.name}: transformers gives other tokens, so there is nothing to compare")
        for i, what in enumerate(("first token", "decode")):  # round 0 is a warm-up
            values = {name: [answer[i] for answer in answers[1:]] for (b, name), answers in found.items() if b == batch}
            rows.append({"what": what, "batch": batch, "values": values})
    rows[1] |= {"bytes": sizes, "read speed": speeds}
    return rows


# --- In separate processes -------------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Make the system drop a checkpoint's files from its cache."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answer_alone(library: str, options: str, folder: Path, dtype: torch.dtype, empty: str) -> dict[str, float]:
    """Seconds and bytes of one process."""
    script = ALONE.format(library=library, threads=torch.get_num_threads(), folder=str(folder), options=options,
                          dtype=str(dtype).removeprefix("torch."), image=str(IMAGE), prompt=PROMPT)  # fmt: skip
    settings = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    settings |= {"PYTHONPATH": str(ROOT)} if library == "llava" else {}
    begun = time.time()
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True, cwd=empty,
                          env=os.environ | settings)  # fmt: skip
    printed = json.loads(done.stdout.splitlines()[-1])
    return {"start": printed["end"] - begun, "load": printed["end"] - printed["start"], "peak": printed["peak"]}


def alone(folder: Path, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Rows for process start to first token, loading to first token warm and cold, and peak memory; on Linux."""
    kinds = {"theirs": ("transformers", ""), "ours": ("llava", "")}
    if dtype == torch.bfloat16:
        kinds["int8"] = ("llava", ', quantize="int8"')
    found = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as empty:
        for i in range(rounds + 1):
            for name in turns(kinds, i):
                warm = answer_alone(*kinds[name], folder, dtype, empty)
                forget(folder)
                cold = answer_alone(*kinds[name], folder, dtype, empty)
                if i:  # round 0 is a warm-up
                    found["start to first"][name].append(warm["start"])
                    found["load to first"][name].append(warm["load"])
                    found["load to first, cold"][name].append(cold["load"])
                    found["peak"][name].append(max(warm["peak"], cold["peak"]))
    return [{"what": what, "batch": 1, "values": values} for what, values in found.items()]


# --- The table -------------------------------------------------------------------------------------------------------


def machine() -> str:
    """The processor and the versions for the heading of a table."""
    found = Path("/proc/cpuinfo")  # on Linux
    lines = found.read_text().splitlines() if found.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    amx = ", bf16 matrix units" if torch.cpu._is_amx_tile_supported() else ""
    cpu = names[0] if names else platform.processor()
    return (f"{cpu}, {torch.get_num_threads()} threads{amx}, torch {torch.__version__.partition('+')[0]}, "
            f"transformers {transformers.__version__}")  # fmt: skip


def show(value: float, what: str) -> str:
    if what == "peak":
        return f"{value / 1e9:.2f} GB"
    return f"{value:.2f} s" if value >= 0.9995 else f"{value * 1000:.3g} ms"


def line(row: dict, columns: list[str]) -> str:
    """Medians. Ratios are theirs / ours of the same round: the median and, in brackets, the smallest and largest."""
    cells, theirs = [row["model"], row["dtype"], row["what"], str(row["batch"])], row["values"]["theirs"]
    cells.append(show(statistics.median(theirs), row["what"]))
    for name in columns:
        if name not in row["values"]:
            cells += ["", ""]
            continue
        ours = row["values"][name]
        ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
        cells.append(show(statistics.median(ours), row["what"]))
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return "| " + " | ".join(cells) + " |"


def bandwidth(row: dict) -> list[str]:
    """How close decoding comes to the memory bandwidth, for models larger than the CPU's caches."""
    sentences, plain = [], statistics.median(row["read speed"])
    for name, n in row["bytes"].items():
        if n > 1e8:
            kind, speed = row["dtype"] if name == "ours" else name, n / statistics.median(row["values"][name])
            share = f"{speed / plain:.0%} of the {plain / 1e9:.1f} GB/s of a sum"
            sentences.append(f"{row['model']} in {kind} reads {speed / 1e9:.1f} GB/s while it decodes, {share}.")
    return sentences


def table(rows: list[dict], columns: list[str]) -> str:
    head = ["model", "dtype", "what", "batch", "transformers"]
    for name in columns:
        head += [name, f"theirs / {name}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(line(row, columns) for row in rows)]
    return "\n".join(lines) + "\n\n" + "\n".join(text for row in rows if "bytes" in row for text in bandwidth(row))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time this project and transformers on the same weights.")
    parser.add_argument("--also", type=Path, action="append", default=[], help="one more checkpoint, in bfloat16")
    parser.add_argument("--only", action="store_true", help="only the checkpoints given with --also")
    parser.add_argument("--plain", action="store_true", help="also time the plain model")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of answers; half as many of processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write every value to this file")
    args = parser.parse_args()
    if args.rounds < 1 or (args.only and not args.also):
        parser.error("--rounds must be at least 1, and --only needs --also")
    for folder in args.also:
        if not (folder / "config.json").is_file():
            parser.error(f"{folder} is not a checkpoint: it has no config.json")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    rows, columns = [], ["ours", "int8"] + ["plain"] * args.plain
    with tempfile.TemporaryDirectory() as scratch:
        todo = [(folder.resolve(), folder.name, [torch.bfloat16]) for folder in args.also]
        if not args.only:
            make("161M", Path(scratch))
            both = [torch.float32, torch.bfloat16] if fast_dtype("cpu") == torch.bfloat16 else [torch.float32]
            todo = [(BUNDLED, "tiny", both), (Path(scratch), "161M", both), *todo]
        for folder, name, dtypes in todo:
            for dtype in dtypes:
                answers = partial(in_turns, rounds=args.rounds, plain=args.plain)
                for work in (answers, partial(alone, rounds=-(-args.rounds // 2))):
                    for row in work(folder, dtype):
                        rows.append({"model": name, "dtype": str(dtype).removeprefix("torch."), **row})
                        print(line(rows[-1], columns), file=sys.stderr, flush=True)
                    if args.json:
                        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(f"{machine()}\n\n{table(rows, columns)}")


if __name__ == "__main__":
    main()
