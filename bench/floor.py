"""The least that a captured sweep must do, timed as its rival.

Forward and backward as one graph; for every trial of the sweep a graph of the forward above the unit; and a copy on the
device that moves as many bytes as the kernels must. Nothing is decided, and the host reads nothing.
"""

from collections.abc import Callable
from functools import partial

import torch
from rivals import Graphed, Rival

from fastals.buffers import Unit
from fastals.report import EXHAUSTED, UnitReport


def moved_bytes(kernel: str, param_bytes: int, averages: bool) -> int:
    """Bytes per parameter that a kernel must move; p and g have ``param_bytes``, everything else is float32.

    ``survey`` reads g, v, p (m) and writes w, or reads the master of a small p, which it writes only after someone
    else has written p; ``survey_move`` besides writes p; ``trial`` reads g, v, w (m) and writes p;
    ``restore`` reads w and writes p; ``advance`` reads g, v (m) and writes v (m, and reads and writes the master).
    """
    first = 4 if averages else 0
    master = 4 if param_bytes < 4 else 0
    survey = 2 * param_bytes + 4 + 4 + first
    return {
        "survey": survey,
        "survey_move": survey + param_bytes,
        "trial": 2 * param_bytes + 4 + 4 + first,
        "restore": param_bytes + 4,
        "advance": param_bytes + 8 + 2 * master + 2 * first,
    }[kernel]


class Floor(Rival):
    """Floor of the last step of ``graphed``; ``trials`` maps its units to their numbers of trials."""

    def __init__(self, graphed: Graphed) -> None:
        (captured,) = graphed.train_step._programs.values()
        self.program, self.backend = captured.program, captured.program.backend
        reports = {u.name: u for u in graphed.optimizer.report.units}
        self.trials = {u.name: reports[u.name].trials for u in self.program.units}
        moved = sum(_kernel_bytes(u.active_params(), reports[u.name]) for u in self.program.units)
        with self.program._capturing():
            self.upper = {u.name: self._forward_above(u) for u in self.program.units}
            self.copies = self.backend.capture(_copies(moved, self.program.loss.device))

    def _forward_above(self, unit: Unit) -> object:
        """The captured forward above the unit, the others at w_t."""
        self.program.go_to_start()
        return self.backend.capture(partial(self.program.losses.at, unit.name, unit.active_params()))

    def step(self, batch: dict) -> torch.Tensor:
        """Replay the passes and copies of the step, on the mini-batch that the graphs hold."""
        del batch
        self.backend.replay(self.program.head)
        for name, trials in self.trials.items():
            for _ in range(trials):
                self.backend.replay(self.upper[name])
        self.backend.replay(self.copies)
        return self.program.loss

    def work(self) -> float:
        """Not counted: the floor is a time."""
        return float("nan")


def _kernel_bytes(params: list[torch.Tensor], report: UnitReport) -> int:
    """Bytes for one unit: survey, its trials, restore if none was accepted, advance."""
    calls = {"survey": 1, "trial": report.trials, "restore": int(report.outcome == EXHAUSTED), "advance": 1}
    each = [sum(n * moved_bytes(kernel, p.itemsize, averages=False) for kernel, n in calls.items()) for p in params]
    return sum(p.numel() * b for p, b in zip(params, each, strict=True))


def _copies(moved: int, device: torch.device) -> Callable[[], None]:
    """Copies from one large buffer to another that read and write ``moved`` bytes in all."""
    source, target = (torch.ones(2**28 if device.type == "cuda" else 64, device=device) for _ in range(2))

    def run() -> None:
        left = moved // 2 // source.itemsize
        while left > 0:
            n = min(left, source.numel())
            target[:n].copy_(source[:n])
            left -= n

    return run
