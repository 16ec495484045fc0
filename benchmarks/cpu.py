"""How fast this project is on a CPU, compared with Hugging Face transformers on the same weights: README.md's table.

    python benchmarks/cpu.py                       the tiny model and one of 161 million weights
    python benchmarks/cpu.py --also FOLDER         and another checkpoint, such as random_weights.py's 7B
    python benchmarks/cpu.py --plain               and the plain model, without the twins of kernels/cpu.py
    python benchmarks/cpu.py --llama-cpp           and the decoder in llama.cpp (llama_cpp_decoder.py)

The models are in one process and run in turns, theirs on views of our weights, so that noise affects all of them and a
7B fits. Start and memory are measured in separate processes, also in turns. The order changes every round. int8 and
int4 are folders that quantize.py writes. Those of a large checkpoint, and llama.cpp, run after the others, because
memory may not hold all of them.

    first token      from pixels and ids to the scores of the first token: tower, projector, the whole prompt
    decode           each further token, for all rows of the batch together
    start to first   from the start of a process to the end of the first token, imports and loading included
    start to tenth   the same, to the end of the tenth token
    load to first    from the start of loading; cold: the files are not in the system's cache
    RssAnon          the peak of the process's own memory, read every 20 ms
    VmHWM            the same with the pages of mapped files, which the system can take back

In float32 both must give the same tokens; otherwise no table is printed. The rows from "start to first" on need Linux.
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
from pathlib import Path

import torch
import transformers  # before our folder is in sys.path: it would mistake our kernels/ for Hugging Face's package

sys.path.insert(0, str(Path(__file__).parent.parent))

import llama_cpp_decoder
from figures import bytes_per_token, turns
from random_weights import make

from cli.quantizing import quantize_checkpoint
from hub.device import own_bytes
from hub.files import BUNDLED, weight_files
from hub.pictures import open_image
from hub.settings import read_config
from llava import LlavaForConditionalGeneration, LlavaProcessor

ROOT = Path(__file__).parent.parent
QUANTIZED = ("int8", "int4")
IMAGE = ROOT / "images" / "cat-and-apple.jpg"
PROMPT = "USER: <image>\nDescribe the picture. ASSISTANT:"
NEW = 17  # tokens of an answer: one from the prompt, the others decoded
# The same lines for both libraries: a process that loads, answers with ten tokens, and prints when it had them.
ALONE = """
import json, pathlib, time
import torch
from PIL import Image
from {library} import AutoProcessor, LlavaForConditionalGeneration
torch.set_num_threads({threads})
start = time.time()
processor = AutoProcessor.from_pretrained({folder!r})
model = LlavaForConditionalGeneration.from_pretrained({folder!r}, dtype=torch.{dtype})
inputs = processor(images=Image.open({image!r}), text={prompt!r}, return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].to(torch.{dtype})
{endless}
clock = []
model.lm_head.register_forward_hook(lambda *_: clock.append(time.time()))
model.generate(**inputs, max_new_tokens=10, do_sample=False)
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # in kB; Linux only
print(json.dumps({{"start": start, "first": clock[0], "tenth": clock[9], "VmHWM": int(peak) * 1024}}))
"""


THEIRS_ALONE = "transformers", "model.generation_config.eos_token_id = None"
OURS_ALONE = "llava", "model.generation_config |= {'eos_token_id': []}"
MEMORY = ("RssAnon", "VmHWM")


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
    """Which models are in memory together: all, or the quantized ones on their own if the checkpoint is large."""
    names = ["theirs", "ours"] + ["plain"] * plain
    if dtype != torch.bfloat16:
        return [names]
    size = sum(file.stat().st_size for file in weight_files(folder))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [[*names, *QUANTIZED]] if size < memory / 3 else [names, *([name] for name in QUANTIZED)]


def load_models(names: list[str], folders: dict[str, Path], dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    models = {}
    if "ours" in names:
        models["ours"] = LlavaForConditionalGeneration.from_pretrained(folders["ours"], dtype)
        models["theirs"] = rival(models["ours"], folders["ours"])
    if "plain" in names:
        models["plain"] = LlavaForConditionalGeneration.from_pretrained(folders["ours"], dtype, kernels="torch")
    for name in (name for name in QUANTIZED if name in names):
        models[name] = LlavaForConditionalGeneration.from_pretrained(folders[name], dtype)
    return models


def in_turns(folders: dict[str, Path], dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    """A row for each of first token and decode at each batch size, with all models in turns."""
    folder = folders["ours"]
    processor, memory = LlavaProcessor.from_pretrained(folder), torch.ones(2**28)
    found, speeds, sizes, rows = defaultdict(list), [], {}, []
    for names in together(folder, dtype, args.plain):
        models = load_models(names, folders, dtype)
        for batch in args.batches:
            inputs = processor(images=[open_image(IMAGE)] * batch, text=[PROMPT] * batch).to("cpu", dtype)
            for i in range(args.rounds + 1):
                for name in turns(models, i):
                    stop = {} if name == "theirs" else {"eos_token_id": -1}
                    found[batch, name].append(time_answer(models[name], dict(inputs), **stop))
                speeds.append(read_speed(memory))
        prompt = inputs["input_ids"].shape[1]
        ours = [name for name in models if name not in ("theirs", "plain")]
        sizes |= {name: bytes_per_token(models[name], prompt + NEW // 2) for name in ours}
        del models  # before the next ones are loaded
    if args.llama_cpp and dtype == torch.bfloat16:
        config = LlavaForConditionalGeneration.without_weights(read_config(folder)).config.text_config
        for kind in llama_cpp_decoder.KINDS:
            counts = prompt, NEW - 1, args.rounds + 1
            found[1, kind] = llama_cpp_decoder.time_answers(config, kind, *counts, args.threads)
    for batch in args.batches:
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


def answer_alone(library: str, endless: str, folder: Path, dtype: torch.dtype, empty: str) -> dict[str, float]:
    """Seconds and bytes of one process."""
    script = ALONE.format(library=library, threads=torch.get_num_threads(), folder=str(folder), endless=endless,
                          dtype=str(dtype).removeprefix("torch."), image=str(IMAGE), prompt=PROMPT)  # fmt: skip
    settings = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    settings |= {"PYTHONPATH": str(ROOT)} if library == "llava" else {}
    begun, own = time.time(), 0
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=empty,
                               env=os.environ | settings)  # fmt: skip
    while process.poll() is None:
        own = max(own, own_bytes(process.pid) or 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the separate process with {folder.name} in {library} failed")
    printed = json.loads(process.stdout.read().splitlines()[-1])
    load = printed["first"] - printed["start"]
    return {"first": printed["first"] - begun, "tenth": printed["tenth"] - begun, "load": load, "RssAnon": own,
            "VmHWM": printed["VmHWM"]}  # fmt: skip


def alone(folders: dict[str, Path], dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    """Rows for process start to first and tenth token, loading to first token warm and cold, and memory; on Linux."""
    kinds = ["theirs", "ours", *(QUANTIZED if dtype == torch.bfloat16 else ())]
    found = defaultdict(lambda: defaultdict(list))
    rounds = -(-args.rounds // 2)
    with tempfile.TemporaryDirectory() as empty:
        for i in range(rounds + 1):
            for name in turns(kinds, i):
                theirs, folder = name == "theirs", folders.get(name, folders["ours"])
                library, endless = THEIRS_ALONE if theirs else OURS_ALONE
                warm = answer_alone(library, endless, folder, dtype, empty)
                forget(folder)
                cold = answer_alone(library, endless, folder, dtype, empty)
                if i:  # round 0 is a warm-up
                    found["start to first"][name].append(warm["first"])
                    found["start to tenth"][name].append(warm["tenth"])
                    found["load to first"][name].append(warm["load"])
                    found["load to first, cold"][name].append(cold["load"])
                    for what in MEMORY:
                        found[what][name].append(max(warm[what], cold[what]))
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
    if what in MEMORY:
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


def against_llama_cpp(rows: list[dict]) -> str:
    """Medians in bfloat16, int8 and int4 next to llama.cpp's in BF16, Q8_0 and Q4_0, and llama.cpp's time over ours."""
    pairs = list(zip(("ours", *QUANTIZED), llama_cpp_decoder.KINDS, strict=True))
    head = ["model", "what", *(name for ours, kind in pairs for name in (ours, kind, f"{kind} / {ours}"))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        if llama_cpp_decoder.KINDS[0] in row["values"]:
            cells = [row["model"], row["what"]]
            for pair in pairs:
                ours, theirs = (statistics.median(row["values"][name]) for name in pair)
                cells += [show(ours, row["what"]), show(theirs, row["what"]), f"{theirs / ours:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time this project and transformers on the same weights.")
    parser.add_argument("--also", type=Path, action="append", default=[], help="one more checkpoint, in bfloat16")
    parser.add_argument("--only", action="store_true", help="only the checkpoints given with --also")
    parser.add_argument("--plain", action="store_true", help="also time the plain model")
    parser.add_argument("--llama-cpp", action="store_true", help="also time llama.cpp, with the rows in bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of answers; half as many of processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write every value to this file")
    args = parser.parse_args()
    if args.rounds < 1 or (args.only and not args.also):
        parser.error("--rounds must be at least 1, and --only needs --also")
    for folder in args.also:
        if not (folder / "config.json").is_file():
            parser.error(f"{folder} is not a checkpoint: it has no config.json")
    if args.llama_cpp and not llama_cpp_decoder.AVAILABLE:
        parser.error("--llama-cpp needs the packages llama-cpp-python and gguf")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    rows, columns = [], ["ours", *QUANTIZED] + ["plain"] * args.plain
    dtypes = [getattr(torch, name) for name in args.dtypes]
    todo = [(folder.resolve(), folder.name, [torch.bfloat16]) for folder in args.also]
    with tempfile.TemporaryDirectory() as scratch:
        if not args.only:
            make("161M", Path(scratch) / "161M")
            todo = [(BUNDLED, "tiny", dtypes), (Path(scratch) / "161M", "161M", dtypes), *todo]
        for folder, name, dtypes in todo:
            with tempfile.TemporaryDirectory() as few_bits:
                folders = {"ours": folder}
                for bits in QUANTIZED if torch.bfloat16 in dtypes else ():
                    folders[bits] = Path(few_bits) / bits
                    where = [str(folder), "--to", bits, "--out", str(folders[bits])]
                    quantize_checkpoint(LlavaForConditionalGeneration, where)
                for dtype, measure in itertools.product(dtypes, (in_turns, alone)):
                    for row in measure(folders, dtype, args):
                        rows.append({"model": name, "dtype": str(dtype).removeprefix("torch."), **row})
                        print(line(rows[-1], columns), file=sys.stderr, flush=True)
                    if args.json:
                        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(f"{machine()}\n\n{table(rows, columns)}")
    if args.llama_cpp:
        print(f"\n{against_llama_cpp(rows)}")


if __name__ == "__main__":
    main()
