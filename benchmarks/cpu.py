"""How fast this is on a CPU, against Hugging Face transformers on the same weights: the README's table.

    python benchmarks/cpu.py                       the tiny model and one of 161 million weights
    python benchmarks/cpu.py --also FOLDER         and another checkpoint, such as random_weights.py's 7B

Both models stand in one process and take turns, theirs on views of our weights, so that noise hits both and a 7B fits.
What only a process of its own can tell is measured in such processes, also in turns. Who begins changes every round.
Where a 7B with int8 weights does not fit beside the two, it takes its turns after them.

    first token      from pixels and ids to the scores of the first word: tower, projector, the whole prompt
    decode           each further word, of every row of the batch at once
    start to first   from the start of a process to the end of the first token, imports and loading included
    load to first    from the start of loading; cold: the files must come from the disk
    peak             the most memory that the process had, files it maps included (VmHWM)

In float32 both must give the same tokens, or there is no table. The last three rows are known on Linux only.
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
import transformers  # before our folder is in the path: it would take our kernels/ for a package that it knows

sys.path.insert(0, str(Path(__file__).parent.parent))

from random_weights import make

from checkpoint import read_config
from clip import open_image
from command import BUNDLED, fast_dtype, run
from llava import LlavaForConditionalGeneration, LlavaProcessor
from load_weights import named_parts
from memory import cache_bytes, free_bytes, needed_bytes

ROOT = Path(__file__).parent.parent
IMAGE = ROOT / "images" / "cat-and-apple.jpg"
PROMPT = "USER: <image>\nDescribe the picture. ASSISTANT:"
NEW = 17  # tokens of an answer: one from the prompt, the others decoded
# The same lines for both libraries: a process that loads, answers with one token, and says when it had it.
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
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # in kB; Linux knows it
print(json.dumps({{"start": start, "end": end, "peak": int(peak) * 1024}}))
"""


# --- In one process --------------------------------------------------------------------------------------------------


def rival(ours: LlavaForConditionalGeneration, folder: Path) -> torch.nn.Module:
    """transformers' model on views of our weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration._from_config(config, dtype=ours.dtype)
    tensors = {("" if name.startswith("lm_head") else "model.") + name: t.detach() for name, t in named_parts(ours)}
    missing, unknown = theirs.load_state_dict(tensors, strict=False, assign=True)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"transformers names other weights: it lacks {missing}, and does not know {unknown}")
    theirs.tie_weights()
    for part in theirs.modules():  # what is computed and not stored still lies on the meta device
        if hasattr(part, "inv_freq"):
            part.__init__(config.text_config)
        if hasattr(part, "position_ids"):
            part.position_ids = torch.arange(part.num_positions)[None]
    theirs.generation_config.eos_token_id = None  # every answer is as long as asked for
    return theirs.to(ours.device).eval()


def time_answer(model: torch.nn.Module, inputs: dict, **stop) -> tuple[float, float, list]:
    """Seconds to the first token and, as a median, for each further one; and the ids."""
    clock = []
    hook = model.lm_head.register_forward_hook(lambda *_: clock.append(time.perf_counter()))
    start = time.perf_counter()
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **stop).tolist()
    hook.remove()
    if len(clock) != NEW:
        raise ValueError(f"an answer took {len(clock)} runs of the head, not {NEW}: its times mean nothing")
    return clock[0] - start, statistics.median(b - a for a, b in itertools.pairwise(clock)), ids


def bytes_a_token(model: LlavaForConditionalGeneration, context: int) -> int:
    """What a decoded token must read at least: the decoder, the head, and the keys and values of the context."""
    parts = {id(p): p.nbytes for part in (model.language_model, model.lm_head) for p in part.parameters()}
    if not model.config.tie_word_embeddings:  # a row of the table is all that is read of it
        del parts[id(model.language_model.embed_tokens.weight)]
    return sum(parts.values()) + context * cache_bytes(model.config, model.dtype)


def read_speed(numbers: torch.Tensor) -> float:
    """Bytes a second of a plain sum, which does nothing but read; of more than a CPU's caches hold."""
    start = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - start)


def turns(names, i: int) -> list:
    """The names in an order that begins with another one every round."""
    names = list(names)
    return names[i % len(names) :] + names[: i % len(names)]


def together(folder: Path, dtype: torch.dtype) -> list[list[str]]:
    """Which models stand in memory at once: all, or where a 7B is too large for it, int8 by itself after the others."""
    if dtype != torch.bfloat16:
        return [["theirs", "ours"]]
    settings, tokens = read_config(folder), 4 * 700  # the cache of four rows
    needed = needed_bytes(settings, dtype, None, tokens) + needed_bytes(settings, dtype, "int8", 0) + 2**30
    free = free_bytes("cpu")
    return [["theirs", "ours", "int8"]] if free is None or needed < free else [["theirs", "ours"], ["int8"]]


def load_models(names: list[str], folder: Path, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    models = {}
    if "ours" in names:
        models["ours"] = LlavaForConditionalGeneration.from_pretrained(folder, dtype)
        models["theirs"] = rival(models["ours"], folder)
    if "int8" in names:
        models["int8"] = LlavaForConditionalGeneration.from_pretrained(folder, dtype, quantize="int8")
    return models


def in_turns(folder: Path, dtype: torch.dtype, rounds: int) -> list[dict]:
    """A row for each of first token and decode at batch 1 and 4: ours, int8 and theirs in turns."""
    processor, memory = LlavaProcessor.from_pretrained(folder), torch.ones(2**28)
    found, speeds, sizes, rows = defaultdict(list), [], {}, []
    for names in together(folder, dtype):
        models = load_models(names, folder, dtype)
        for batch in (1, 4):
            inputs = processor(images=[open_image(IMAGE)] * batch, text=[PROMPT] * batch).to("cpu", dtype)
            for i in range(rounds + 1):
                for name in turns(models, i):
                    stop = {} if name == "theirs" else {"eos_token_id": -1}
                    found[batch, name].append(time_answer(models[name], dict(inputs), **stop))
                speeds.append(read_speed(memory))
        context = inputs["input_ids"].shape[1] + NEW // 2
        sizes |= {name: bytes_a_token(model, context) for name, model in models.items() if name != "theirs"}
        del models  # before the next ones are loaded
    for batch in (1, 4):
        if dtype == torch.float32 and found[batch, "ours"][0][2] != found[batch, "theirs"][0][2]:
            raise ValueError(f"{folder.name}: transformers' tokens are others, so there is nothing to compare")
        for i, what in enumerate(("first token", "decode")):  # the answers of round 0 are to warm up
            values = {name: [answer[i] for answer in answers[1:]] for (b, name), answers in found.items() if b == batch}
            rows.append({"what": what, "batch": batch, "values": values})
    rows[1] |= {"bytes": sizes, "read speed": speeds}
    return rows


# --- In processes of their own ---------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Let the system drop what it keeps of a checkpoint's files in memory."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # what is not written yet would stay
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
    told = json.loads(done.stdout.splitlines()[-1])
    return {"start": told["end"] - begun, "load": told["end"] - told["start"], "peak": told["peak"]}


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
                if i:  # the first is to warm up
                    found["start to first"][name].append(warm["start"])
                    found["load to first"][name].append(warm["load"])
                    found["load to first, cold"][name].append(cold["load"])
                    found["peak"][name].append(max(warm["peak"], cold["peak"]))
    return [{"what": what, "batch": 1, "values": values} for what, values in found.items()]


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
    return f"{value:.2f} s" if value >= 0.9995 else f"{value * 1000:.3g} ms"


def line(row: dict) -> str:
    """Medians; a ratio is theirs over ours of the same round, its median and, in brackets, the smallest and largest."""
    cells, theirs = [row["model"], row["dtype"], row["what"], str(row["batch"])], row["values"]["theirs"]
    cells.append(show(statistics.median(theirs), row["what"]))
    for name in ("ours", "int8"):
        if name not in row["values"]:
            cells += ["", ""]
            continue
        ours = row["values"][name]
        ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
        cells.append(show(statistics.median(ours), row["what"]))
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return "| " + " | ".join(cells) + " |"


def bandwidth(row: dict) -> list[str]:
    """How near decoding comes to the speed of memory, for models that no cache holds."""
    told, plain = [], statistics.median(row["read speed"])
    for name, n in row["bytes"].items():
        if n > 1e8:
            kind, speed = row["dtype"] if name == "ours" else name, n / statistics.median(row["values"][name])
            share = f"{speed / plain:.0%} of the {plain / 1e9:.1f} GB/s of a plain sum"
            told.append(f"{row['model']} in {kind} reads {speed / 1e9:.1f} GB/s while it decodes, {share}.")
    return told


def table(rows: list[dict]) -> str:
    head = "| model | dtype | what | batch | transformers | ours | theirs / ours | int8 | theirs / int8 |"
    lines = [head, "|---" * 9 + "|", *map(line, rows)]
    return "\n".join(lines) + "\n\n" + "\n".join(text for row in rows if "bytes" in row for text in bandwidth(row))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time this project and transformers on the same weights.")
    parser.add_argument("--also", type=Path, action="append", default=[], help="one more checkpoint, in bfloat16")
    parser.add_argument("--only", action="store_true", help="nothing but what --also names")
    parser.add_argument("--rounds", type=int, default=7, help="of answers; of processes, half as many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where every single value is written")
    args = parser.parse_args()
    if args.rounds < 1 or (args.only and not args.also):
        raise ValueError("--rounds must be 1 at least, and --only needs --also")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        todo = [(folder.resolve(), folder.name, [torch.bfloat16]) for folder in args.also]
        if not args.only:
            make("161M", Path(scratch))
            both = [torch.float32, torch.bfloat16] if fast_dtype("cpu") == torch.bfloat16 else [torch.float32]
            todo = [(BUNDLED, "tiny", both), (Path(scratch), "161M", both), *todo]
        for folder, name, dtypes in todo:
            for dtype in dtypes:
                for work, rounds in ((in_turns, args.rounds), (alone, -(-args.rounds // 2))):
                    for row in work(folder, dtype, rounds):
                        rows.append({"model": name, "dtype": str(dtype).removeprefix("torch."), **row})
                        print(line(rows[-1]), file=sys.stderr, flush=True)
                    if args.json:
                        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(f"{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    sys.exit(run(main))
