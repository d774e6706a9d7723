"""The least that a captured sweep or relay must do, timed as its rival.

Forward and backward as one graph; for every trial of a unit a graph of the forward above it, for every joint trial one
of the whole forward; and a copy on the device that moves as many bytes as the kernels must. Nothing is decided, and the
host reads nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from rivals import Graphed, Rival

from fastals.learned import ALL_UNITS
from fastals.report import EXHAUSTED, StepReport, UnitReport


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
    """Floor of the last step of ``graphed``; ``trials`` maps its units to the trials that each has made alone."""

    def __init__(self, graphed: Graphed) -> None:
        (captured,) = graphed.train_step._programs.values()
        self.program, self.backend = captured.program, captured.program.backend
        report, relay = graphed.optimizer.report, graphed.optimizer.settings.schedule == "relay"
        self.joint_trials, calls = report.joint_trials, {u.name: kernel_calls(u, report, relay) for u in report.units}
        self.trials = {u.name: u.trials for u in report.units}
        moved = sum(_kernel_bytes(u.active_params(), calls[u.name]) for u in self.program.units)
        with self.program._capturing():
            self.upper = {u.name: self._forward_above(u.name, u.active_params()) for u in self.program.units}
            self.whole = self._forward_above(ALL_UNITS, [p for u in self.program.units for p in u.active_params()])
            self.copies = self.backend.capture(_copies(moved, self.program.loss.device))

    def _forward_above(self, unit: str, params: Sequence[torch.Tensor]) -> object:
        """The captured forward above the unit, the others at w_t; for all units the whole one."""
        self.program.go_to_start()
        return self.backend.capture(partial(self.program.losses.at, unit, params))

    def step(self, batch: dict) -> torch.Tensor:
        """Replay the passes and copies of the step, on the mini-batch that the graphs hold."""
        del batch
        self.backend.replay(self.program.head)
        for name, trials in self.trials.items():
            for _ in range(trials):
                self.backend.replay(self.upper[name])
        for _ in range(self.joint_trials):
            self.backend.replay(self.whole)
        self.backend.replay(self.copies)
        return self.program.loss

    def work(self) -> float:
        """Not counted: the floor is a time."""
        return float("nan")


def kernel_calls(unit: UnitReport, step: StepReport, relay: bool) -> dict[str, int]:
    """How many times a step goes through the weights of the unit with each kernel.

    A relay measures a unit that it searches alone, and all units in the pass of the first joint trial.
    """
    put_back = int(unit.outcome == EXHAUSTED)
    if not relay:
        return {"survey": 1, "trial": unit.trials + step.joint_trials, "restore": put_back, "advance": 1}
    alone, further = int(unit.trials > 0), max(step.joint_trials - 1, 0)
    return {
        "survey": alone, "trial": unit.trials + further, "restore": alone + put_back, "survey_move": 1, "advance": 1,
    }  # fmt: skip


def _kernel_bytes(params: Sequence[torch.Tensor], calls: dict[str, int]) -> int:
    """Bytes that these kernels move for one unit."""
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
