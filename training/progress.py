"""What a run reports: a line at the terminal and a row of log.csv every 20 steps, and a picture of the losses."""

import csv
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from training.stages import Stage, learning_rate

REPORT_EVERY = 20  # steps


@dataclass
class Log:
    """Rows (stage, step, mean loss since the row before, learning rate) in `file`, without a header."""

    stage: Stage
    file: Path
    first: int  # steps taken before
    quiet: bool = False  # write and print nothing: another process does

    def __post_init__(self) -> None:
        self.losses, self.started = [], time.monotonic()
        if not self.quiet and self.file.is_file():
            self.remove_rows_after_first()

    def remove_rows_after_first(self) -> None:
        """An interrupted run may have logged steps that it did not save, and a kill may have cut the last row."""
        with open(self.file, newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 4]
        rows = [row for row in rows if row[0] != self.stage.name or int(row[1]) <= self.first]
        with open(self.file.with_suffix(".new"), "w", newline="") as file:
            csv.writer(file).writerows(rows)
        self.file.with_suffix(".new").replace(self.file)

    def add(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if self.quiet or (step % REPORT_EVERY and step != self.stage.steps):
            return
        stage, mean = self.stage, sum(self.losses) / len(self.losses)
        self.losses.clear()
        seconds = (time.monotonic() - self.started) / (step - self.first)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (stage.steps - step)))
        speed = f"{stage.batch / seconds:4.0f} samples/s"
        end = "\r" if sys.stdout.isatty() and step < stage.steps else "\n"
        print(f"{stage.name:8} {step:5}/{stage.steps}  loss {mean:7.4f}  {speed}  {left} left ", end=end, flush=True)
        with open(self.file, "a", newline="") as file:
            csv.writer(file).writerow([stage.name, step, f"{mean:.5f}", f"{learning_rate(step - 1, stage):.3e}"])


def plot(log: Path, picture: Path) -> None:
    """Draw the loss of each stage over its steps, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{picture.name} was not drawn, because matplotlib is not installed; the losses are in {log}")
        return
    curves = defaultdict(list)
    for name, step, loss, _ in csv.reader(log.read_text().splitlines()):
        curves[name].append((int(step), float(loss)))
    figure = Figure(figsize=(3 * len(curves), 2.6), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set(title=name, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.supylabel("loss", fontsize="medium")
    figure.savefig(picture, dpi=110)
