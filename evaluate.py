"""How good a model is: the share of questions about unseen scenes of the emoji world that it answers correctly.

    python evaluate.py                        the bundled model, after each stage of its training, in int8 and in int4
    python evaluate.py runs/tiny-llava        another one, after each stage whose weights are kept with it
    python evaluate.py --adapter runs/mine    the model with a LoRA
    python evaluate.py --final                on the scenes for published tables, on which nothing is decided
"""

import argparse
import sys
from pathlib import Path

import torch

from evaluation.emoji_judge import FINAL, UNSEEN, evaluate_stages
from hub.adapter import warning_of_another_base
from hub.device import check_device
from hub.files import BUNDLED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a model about unseen scenes, and count its right answers.")
    parser.add_argument("model", type=Path, nargs="?", default=BUNDLED, metavar="FOLDER", help="default: the bundled")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA for the model")
    parser.add_argument("--scenes", type=int, default=300, metavar="N", help="how many scenes (default: 300)")
    parser.add_argument("--final", action="store_true", help="the scenes kept for published tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.scenes < 1:
        raise ValueError(f"--scenes must be at least 1, not {args.scenes}")
    return args


def main() -> None:
    args = parse_arguments()
    check_device(args.device)
    if args.adapter and (warning := warning_of_another_base(args.adapter, args.model)):
        print(warning, file=sys.stderr)
    evaluate_stages(args.model, args.scenes, args.device, FINAL if args.final else UNSEEN, args.adapter)


if __name__ == "__main__":
    import cli

    sys.exit(cli.run(main))
