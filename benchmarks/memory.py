"""The plan of `train.py --plan` compared with the memory that the run then takes, on a CPU under Linux.

    python benchmarks/random_weights.py 161M /tmp/161M
    python benchmarks/memory.py /tmp/161M --case "--lora 16 --batch 2" --case "--batch 2 --recompute"

Each case is a run of two steps on conversations of equal length, in a separate process. Its memory is RssAnon, which
leaves out what is mapped from files, read from /proc every 5 ms.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from hub.device import own_bytes  # noqa: E402
from training.plan import Run, largest_piece, plan, read_longest  # noqa: E402


def write_records(folder: Path, count: int) -> Path:
    records = []
    for i in range(count):
        Image.new("RGB", (400, 300), (10 * i, 90, 9)).save(folder / f"{i}.png")
        question = {"from": "human", "value": "<image>\nWhat is on the left?"}
        answer = {"from": "gpt", "value": "There is a cat on the left and a dog on the right. " * 4}
        records.append({"image": f"{i}.png", "conversations": [question, answer]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def measure(words: list[str], short: bool) -> tuple[int, float]:
    """The highest RssAnon of a run in bytes, and its time in seconds. `short`: as if little memory were free."""
    start, most = time.perf_counter(), 0
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(2**20)} if short else {})
    with subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdout=subprocess.DEVNULL, env=env) as run:
        while run.poll() is None:
            most = max(most, own_bytes(run.pid) or 0)
            time.sleep(0.005)
    if run.returncode:
        sys.exit(f"train.py {' '.join(words)} failed")
    return most, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare --plan with the memory of a run.")
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("--case", action="append", required=True, metavar="FLAGS", help="flags of train.py")
    parser.add_argument("--steps", default="2", help="steps of each run (default: 2)")
    parser.add_argument("--plenty", action="store_true", help="let the process keep freed memory, to be faster")
    args = parser.parse_args()
    print("| model | flags | plan | measured | plan / measured | seconds |\n|---|---|---|---|---|---|")
    for case in args.case:
        with tempfile.TemporaryDirectory() as folder:
            data = write_records(Path(folder), 8)
            words = ["--model", args.model, "--data", str(data), "--out", f"{folder}/out", "--steps", args.steps]
            words += ["--device", "cpu", *case.split()]
            sys.argv = ["train.py", *words]
            flags = train.parse_arguments()
            lora = train.find_lora(flags) if flags.lora else None
            run = Run(flags.model, train.find_place(flags), flags.batch, lora, flags.quantize, train.find_recipe(flags))
            needed = plan(run, largest_piece(read_longest(run, flags.data), run.share)).needed
            most, seconds = measure(words, not args.plenty)
        sizes = f"{needed / 1e9:.2f} GB | {most / 1e9:.2f} GB | {needed / most:.2f}"
        print(f"| {Path(args.model).name} | `{case}` | {sizes} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
