"""Two rivals timed in turn, A B A B, on the same mini-batches under the same masks."""

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from rivals import Rival, SearchRival


class Turns:
    """Seconds, forward passes and trials of two rivals in turn.

    Args:
        rivals: the reference and the candidate; the speed-up is that of the candidate.
        batches: mini-batches on the device.
        rounds: timed steps of each.
        device: ``"cpu"`` or ``"cuda"``.
        host: stop the clock when the call returns, instead of when the device is done.
    """

    def __init__(
        self, rivals: tuple[Rival, Rival], batches: Iterator[dict], rounds: int, device: str, *, host: bool = False
    ) -> None:
        self.rivals, self.rounds, self.device, self.host = rivals, rounds, device, host
        self.first = max(rival.first_steps for rival in rivals)  # not timed: allocation, verification, capture
        self.batches = [next(batches) for _ in range(self.first + rounds)]
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.searches = [rival for rival in rivals if isinstance(rival, SearchRival)]
        self.trials: list[list[float]] = [[] for _ in self.searches]

    def warm_up(self) -> None:
        """The first steps of both."""
        for k in range(self.first):
            self.step(0, k)
            self.step(1, k)
        self.before = [rival.work() for rival in self.rivals]

    def step(self, rival: int, batch: int) -> None:
        """Time one step, until the device is done or, with ``host``, until the call returns."""
        torch.manual_seed(2)
        self._synchronize()
        begin = time.perf_counter()
        self.rivals[rival].step(self.batches[batch])
        if not self.host:
            self._synchronize()
        self.seconds[rival].append(time.perf_counter() - begin)

    def count(self) -> None:
        """Note the trials of the last step; on a CPU, two searches must make equal trials to be comparable."""
        reports = [rival.optimizer.report for rival in self.searches]
        for trials, report in zip(self.trials, reports, strict=True):
            trials.append(report.trials / len(report.units))
        if self.device == "cpu" and len(reports) == 2:
            by_unit, joint = zip(*(([u.trials for u in r.units], r.joint_trials) for r in reports), strict=True)
            assert by_unit[0] == by_unit[1]
            assert joint[0] == joint[1]

    def result(self) -> dict[str, Any]:
        """Median, lowest and highest ratio of the rounds, ratio of the forward passes, trials per unit of each."""
        ratios = [a / b for a, b in zip(*(s[self.first :] for s in self.seconds), strict=True)]
        work = [rival.work() - before for rival, before in zip(self.rivals, self.before, strict=True)]
        measured: dict[str, Any] = {
            "speedup": round(statistics.median(ratios), 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        }  # fmt: skip
        if not self.host and all(map(math.isfinite, work)):
            measured["by_forwards"] = round(work[0] / work[1], 3)
        if self.searches:
            measured["trials_per_unit"] = [round(statistics.mean(t), 2) for t in self.trials]
        return measured

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
