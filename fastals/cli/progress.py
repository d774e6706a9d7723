"""What a run says while it trains: one line of each optimizer, with a bar; a line every tenth where no terminal is."""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fastals.cli import ranks
from fastals.cli.errors import needs_extra

SMOOTHED = 10  # steps whose losses are averaged: single mini-batches differ
LONGEST = 60.0  # seconds without a line in a log


class Progress:
    """The progress of one optimizer; a context, which ends its line. The first of several processes shows it."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.losses: deque[float] = deque(maxlen=SMOOTHED)
        self.said = 0.0
        self.first: tuple[int, float] | None = None
        self.bar = _bar(name, steps)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, step: int, loss: float, forwards: float) -> None:
        """Step ``step`` is made: the loss before it, and the forward passes of a step so far."""
        self.losses.append(loss)
        now = "held-out texts ..." if step == self.steps else self._time_left(step)
        text = f"loss {statistics.fmean(self.losses):.4f}  {_forwards(forwards)}  {now}".rstrip()
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, text=text)
        elif step < self.steps and self._is_due(step):
            self._say(step, text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run has this summary: its loss is the one of the table."""
        forwards = _forwards(summary["forwards"] / self.steps)
        text = f"loss {summary['loss']:.4f}  held-out accuracy {summary['accuracy']:.1%}  {forwards}"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=self.steps, text=text)
        else:
            self._say(self.steps, text)

    def _is_due(self, step: int) -> bool:
        """Whether a log gets a line: after the first step, a tenth of them, or a minute."""
        tenth = 10 * step // self.steps > 10 * (step - 1) // self.steps
        return tenth or not self.said or time.monotonic() - self.said > LONGEST

    def _say(self, step: int, text: str) -> None:
        self.said = time.monotonic()
        ranks.say(f"{self.name:>6}  {step:{len(str(self.steps))}}/{self.steps}  {text}")

    def _time_left(self, step: int) -> str:
        """By the steps since the first one that was made here, which takes far longer than those after it."""
        now = time.monotonic()
        if self.first is None:
            self.first = step, now
            return ""
        begin, then = self.first
        return f"{timedelta(seconds=round((now - then) / (step - begin) * (self.steps - step)))} left"


def _forwards(count: float) -> str:
    return f"{count:.1f} forwards a step"


def _bar(name: str, steps: int) -> Any:
    """A bar of rich; None if the output is no terminal, or another process shows it."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars
    except ImportError as error:
        raise needs_extra(error) from error
    console = Console()
    if ranks.rank() > 0 or not (console.is_interactive and console.file.isatty()):  # colours can be forced into a file
        return None
    bar = Bars(
        TextColumn("{task.description:>6}"), BarColumn(bar_width=16), MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False), console=console,
    )  # fmt: skip
    bar.add_task(name, total=steps, text="first step ...")
    return bar
