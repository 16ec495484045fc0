"""What a run reports: lines at the terminal, the rows of log.csv, and a picture of the losses."""

import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from training.processes import world_size
from training.stages import Stage, learning_rate

REPORT_EVERY = 20  # steps, fewer in a run of less than 400
PRINT_EVERY = 30  # seconds, if the steps are slow
VALIDATION = " validation"  # ends the first column of the rows with losses on records that are held back


@dataclass
class Log:
    """Rows (stage, step, mean loss since the row before, learning rate) in `file`, without a header.

    A row about validation has the name of the stage and VALIDATION, and the loss on all records that are held back.
    """

    stage: Stage
    file: Path
    first: int  # steps taken before
    quiet: bool = False  # write and print nothing: another process does
    losses: list[float] = field(default_factory=list)  # of the steps since the last row

    def __post_init__(self) -> None:
        self.tokens = 0
        if not self.quiet and self.file.is_file():
            self.remove_rows_after_first()

    @property
    def every(self) -> int:  # steps from row to row
        return max(1, min(REPORT_EVERY, self.stage.steps // 20))

    def remove_rows_after_first(self) -> None:
        """An interrupted run may have logged steps that it did not save, and a kill may have cut the last row."""
        with open(self.file, newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 4]
        own = self.stage.name, self.stage.name + VALIDATION
        rows = [row for row in rows if row[0] not in own or (self.first and int(row[1]) <= self.first)]
        with open(self.file.with_suffix(".new"), "w", newline="") as file:
            csv.writer(file).writerows(rows)
        self.file.with_suffix(".new").replace(self.file)

    def counted(self, steps: Iterable[list[dict]]) -> Iterator[list[dict]]:
        """The steps' batches, whose tokens are counted, with padding; other processes have about as many."""
        self.started = self.printed = time.monotonic()
        for pieces in steps:
            self.tokens += world_size() * sum(piece["input_ids"].numel() for piece in pieces if "input_ids" in piece)
            yield pieces

    def add(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        has_row = step % self.every == 0 or step == self.stage.steps
        if has_row or time.monotonic() - self.printed > PRINT_EVERY:
            mean = sum(self.losses) / len(self.losses)
            self.print_line(step, mean)
            if has_row:
                self.losses.clear()
                self.write(self.stage.name, step, mean)

    def validated(self, step: int, loss: float) -> None:
        self.write(self.stage.name + VALIDATION, step, loss)
        if not self.quiet:
            print(f"{self.stage.name:8} {step:5}/{self.stage.steps}  validation loss {loss:7.4f}", flush=True)

    def print_line(self, step: int, mean: float) -> None:
        if self.quiet:
            return
        stage, self.printed = self.stage, time.monotonic()
        seconds = (self.printed - self.started) / (step - self.first)
        left = timedelta(seconds=round(seconds * (stage.steps - step)))
        speed = self.tokens / (self.printed - self.started)
        speed = f"{speed:,.0f} tokens/s" if self.tokens else f"{stage.batch / seconds:4.0f} samples/s"
        end = "\r" if sys.stdout.isatty() and step < stage.steps else "\n"
        print(f"{stage.name:8} {step:5}/{stage.steps}  loss {mean:7.4f}  {speed}  {left} left ", end=end, flush=True)

    def write(self, name: str, step: int, loss: float) -> None:
        if not self.quiet:
            rate = learning_rate(max(0, step - 1), self.stage)
            with open(self.file, "a", newline="") as file:
                csv.writer(file).writerow([name, step, f"{loss:.5f}", f"{rate:.3e}"])


def plot(log: Path, picture: Path) -> None:
    """Draw the losses of each stage over its steps, those of validation dashed, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{picture.name} was not drawn, because matplotlib is not installed; the losses are in {log}")
        return
    curves, dashed = defaultdict(list), defaultdict(list)
    for name, step, loss, _ in csv.reader(log.read_text().splitlines()):
        points = dashed if name.endswith(VALIDATION) else curves
        points[name.removesuffix(VALIDATION)].append((int(step), float(loss)))
    figure = Figure(figsize=(3 * len(curves), 2.6), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), linewidth=1.2, label="training")
        if name in dashed:
            axes.plot(*zip(*dashed[name], strict=True), "--", linewidth=1.2, label="validation")
            axes.legend()
        axes.set(title=name, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.supylabel("loss", fontsize="medium")
    figure.savefig(picture, dpi=110)
