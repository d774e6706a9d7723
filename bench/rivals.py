"""ALS and what a user would pick instead, behind one ``step(batch)``; each is called as its own documentation asks.

``forwards`` is the work so far in forward passes: a forward is 1, a backward 2, a cached trial of ALS the share of the
blocks that it ran. A package that is not installed raises ImportError where its rival is made.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastals
from fastals.eager import EagerALS
from fastals.graphs.graphed import WARMUP, GraphedStep

if TYPE_CHECKING:
    from fastals.graphs.program import Program


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy in float32; a classifier in bfloat16 would return one of 8 bits, which no search can go by."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return nn.functional.cross_entropy(logits.float(), batch["labels"])


class Plain:
    """Forward, backward, step: AdamW and Prodigy."""

    first_steps = 1  # that differ from the ones to come: allocation, verification of the cache, capture

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.forwards = model, optimizer, 0.0

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Train on the mini-batch; returns the loss before the step."""
        loss = loss_of(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.forwards += 3
        return loss.detach()

    def work(self) -> float:
        """Forward passes so far."""
        return self.forwards

    def rest(self) -> None:
        """Put the weights where they are to be evaluated."""


class ScheduleFree(Plain):
    """Schedule-free AdamW trains at one point and is evaluated at another."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        optimizer.train()

    def rest(self) -> None:
        """Move from the point of the gradients to the average."""
        self.optimizer.eval()


class Search(Plain):
    """ALS and its eager twin: the optimizer calls backward itself."""

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Search on the mini-batch."""
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            return loss_of(self.model, batch)

        loss = self.optimizer.step(closure)
        self.forwards += 2 + getattr(self.optimizer, "last_forwards", calls)
        return loss


class Salsa(Plain):
    """SaLSA's closure takes a flag for the backward; its masks follow the second of the wall clock."""

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Search on the mini-batch."""

        def closure(backwards: bool = False) -> Tensor:
            loss = loss_of(self.model, batch)
            self.forwards += 1
            if backwards:
                loss.backward()
                self.forwards += 2
            return loss

        self.optimizer.zero_grad()
        return self.optimizer.step(closure=closure).detach()


class Graphed(Search):
    """ALS whose whole step is captured; ``cycle`` captures the steps of every unit's turn."""

    def __init__(self, model: nn.Module, optimizer: fastals.ALS, backend: Any = None) -> None:
        super().__init__(model, optimizer)
        self.train_step = GraphedStep(optimizer, partial(loss_of, model), backend=backend)
        turns = len(optimizer.param_groups) if optimizer.settings.schedule == "cycle" else 1
        self.first_steps = WARMUP + turns + 2

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Search on the mini-batch."""
        return self.train_step(batch)

    def work(self) -> float:
        """From the reports of all steps, 64 at most, by the trials that each unit made and the share of its blocks."""
        (captured,) = self.train_step._programs.values()
        share = shares(captured.program)
        reports = self.optimizer.reports
        trials = sum(u.trials * share[u.name] for r in reports for u in r.units)
        return 3 * len(reports) + trials + sum(r.joint_trials for r in reports)


def shares(program: "Program") -> dict[str, float]:
    """The part of the blocks that a trial of each unit runs, by the unit's name."""
    cache = program.losses.cache
    if cache is None:
        return {u.name: 1.0 for u in program.units}
    (calls,) = cache.passes
    at = [i for i, call in enumerate(calls) if id(call.module) in cache.names]
    return {u.name: sum(i >= cache.start(u.active_params())[0] for i in at) / len(at) for u in program.units}


class Captured(Plain):
    """Forward, backward and step of the first mini-batch in one CUDA graph, replayed for the others."""

    graph: torch.cuda.CUDAGraph | None = None

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Copy the mini-batch to where the graph reads it, and replay."""
        if self.graph is None:
            self._capture(batch)
        for name, value in batch.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        self.forwards += 3
        return self.loss

    def _capture(self, batch: dict[str, Tensor]) -> None:
        self.inputs = {name: value.clone() for name, value in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # allocations of the first steps must not be in the graph
                super().step(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # zero_grad has left no gradients: backward writes them anew in every replay
        with torch.cuda.graph(self.graph, capture_error_mode="relaxed"):
            loss = loss_of(self.model, self.inputs)
            loss.backward()
            self.optimizer.step()
        self.loss = loss.detach()


def als(model: nn.Module, **options) -> Search:
    """ALS as in the README."""
    return Search(model, fastals.ALS(model, **options))


def eager(model: nn.Module, **options) -> Search:
    """The baseline of every speed-up."""
    return Search(model, EagerALS(fastals.units(model), **options))


def adamw(model: nn.Module, **options) -> Plain:
    """AdamW with torch's fused kernel, on the CPU too."""
    return Plain(model, torch.optim.AdamW(model.parameters(), fused=True, **options))


def captured(model: nn.Module) -> Captured:
    """AdamW in a captured graph."""
    return Captured(model, torch.optim.AdamW(model.parameters(), fused=True, capturable=True))


def graphed(model: nn.Module, mode: str = "while", **options) -> Graphed:
    """ALS in captured graphs; in mode ``host`` their loops are run by the host even where the device could."""
    from host_loops import HostLoops

    return Graphed(model, fastals.ALS(model, fused=True, **options), HostLoops if mode == "host" else None)


def prodigy(model: nn.Module, **options) -> Plain:
    """Prodigy with its recommended ``lr=1``."""
    from prodigyopt import Prodigy

    return Plain(model, Prodigy(model.parameters(), **options))


def schedule_free(model: nn.Module, **options) -> ScheduleFree:
    """Schedule-free AdamW."""
    from schedulefree import AdamWScheduleFree

    return ScheduleFree(model, AdamWScheduleFree(model.parameters(), **options))


def salsa(model: nn.Module, **options) -> Salsa:
    """SaLSA from the authors' package ``SaLSa-Optimizer``."""
    from salsa.SaLSA import SaLSA

    return Salsa(model, SaLSA(model.parameters(), **options))


RIVALS: dict[str, Callable[..., Plain]] = {
    "als": als,
    "eager": eager,
    "graphed": graphed,
    "adamw": adamw,
    "adamw-captured": captured,
    "schedule-free": schedule_free,
    "prodigy": prodigy,
    "salsa": salsa,
}
