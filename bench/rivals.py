"""ALS and the optimizers it is compared with, behind one ``step(batch)``; each is used as its documentation asks.

``forwards`` counts the work so far in forward passes: a forward is 1, a backward 2, a cached trial of ALS the share of
the blocks that it ran. Building a rival whose package is not installed raises ImportError.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from capped import Capped
from torch import Tensor, nn

import fastals
from fastals.eager import EagerALS
from fastals.graphs.graphed import WARMUP, GraphedStep

if TYPE_CHECKING:
    from fastals.graphs.program import Program


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy in float32; that of a bfloat16 classifier would have 8 bits, too few for a search.

    A language model has a label in every place, already the token after it; -100 where no token is scored.
    """
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), batch["labels"].flatten())


class Rival:
    """A model and its optimizer. A step is forward, backward, step, as for AdamW and Prodigy."""

    first_steps = 1  # steps that are not timed: allocation, verification of the cache, capture

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
        """Move the weights to the point of evaluation; most rivals train at that point."""


class ScheduleFree(Rival):
    """Schedule-free AdamW: gradients are taken at one point, the model is evaluated at another."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        optimizer.train()

    def rest(self) -> None:
        """Move from the point of the gradients to the averaged weights."""
        self.optimizer.eval()


class SearchRival(Rival):
    """ALS or its eager baseline: the optimizer calls backward."""

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


class Averaged(SearchRival):
    """ALS, evaluated at an average of its weights, mean ← k mean + (1 − k) w with k = min(decay, (t + 1)/(t + 10))."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
        super().__init__(model, optimizer)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.decay, self.steps, self.means = decay, 0, [p.detach().clone() for p in self.params]

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Search on the mini-batch, then average."""
        loss = super().step(batch)
        self.steps += 1
        decay = min(self.decay, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.means, [p.detach() for p in self.params], 1 - decay)
        return loss

    def rest(self) -> None:
        """Move to the average."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.means)


class Salsa(Rival):
    """SaLSA: its closure takes a flag for the backward, and its masks are seeded by the wall clock's seconds."""

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


class Graphed(SearchRival):
    """ALS with captured steps; if units take turns, one capture for each unit's turn."""

    def __init__(self, model: nn.Module, optimizer: fastals.ALS, backend: Any = None) -> None:
        super().__init__(model, optimizer)
        self.train_step = GraphedStep(optimizer, partial(loss_of, model), backend=backend)
        turns = len(optimizer.param_groups) if optimizer.settings.takes_turns else 1
        every = optimizer.settings.every
        self.first_steps = WARMUP + turns * (1 if every == "auto" else every) + 2

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Search on the mini-batch."""
        return self.train_step(batch)

    def work(self) -> float:
        """Forward passes of the reported steps, 64 at most: each trial counts the share of the blocks that it ran."""
        (captured,) = self.train_step._programs.values()
        share = shares(captured.program)
        reports = self.optimizer.reports
        trials = sum(u.trials * share[u.name] for r in reports for u in r.units)
        return 3 * len(reports) + trials + sum(r.joint_trials for r in reports)


def shares(program: "Program") -> dict[str, float]:
    """Share of the blocks that a trial of a unit runs, by the unit's name."""
    cache = program.losses.cache
    if cache is None:
        return {u.name: 1.0 for u in program.units}
    at = [i for i, call in enumerate(cache.records.values()) if id(call.module) in cache.block_names]
    return {u.name: sum(i >= cache.first_use(u.active_params()) for i in at) / len(at) for u in program.units}


class CapturedAdamW(Rival):
    """AdamW with forward, backward and step in one CUDA graph, captured at the first step."""

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
            for _ in range(3):  # keep the allocations of the first steps out of the graph
                super().step(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # zero_grad has removed the gradients, so backward allocates them in the graph and every replay overwrites them
        with torch.cuda.graph(self.graph, capture_error_mode="relaxed"):
            loss = loss_of(self.model, self.inputs)
            loss.backward()
            self.optimizer.step()
        self.loss = loss.detach()


def als(model: nn.Module, **options) -> SearchRival:
    """ALS as in the README."""
    return SearchRival(model, fastals.ALS(model, **options))


def averaged(model: nn.Module, decay: float, **options) -> Averaged:
    """ALS whose weights are averaged."""
    return Averaged(model, fastals.ALS(model, **options), decay)


def eager(model: nn.Module, **options) -> SearchRival:
    """The baseline of every speed-up."""
    return SearchRival(model, EagerALS(fastals.units(model), **options))


def adamw(model: nn.Module, **options) -> Rival:
    """AdamW with torch's fused kernel, on the CPU too."""
    return Rival(model, torch.optim.AdamW(model.parameters(), fused=True, **options))


def no_search(model: nn.Module, **options) -> Rival:
    """The units of ALS, moved by a fixed relative size."""
    return Rival(model, Capped(fastals.units(model), **options))


def captured(model: nn.Module) -> CapturedAdamW:
    """AdamW in a captured graph."""
    return CapturedAdamW(model, torch.optim.AdamW(model.parameters(), fused=True, capturable=True))


def graphed(model: nn.Module, mode: str = "while", **options) -> Graphed:
    """ALS with captured steps; mode ``host`` runs their loops on the host even if the device could."""
    from host_loops import HostLoops

    return Graphed(model, fastals.ALS(model, fused=True, **options), HostLoops if mode == "host" else None)


def prodigy(model: nn.Module, **options) -> Rival:
    """Prodigy with its recommended ``lr=1``."""
    from prodigyopt import Prodigy

    return Rival(model, Prodigy(model.parameters(), **options))


def schedule_free(model: nn.Module, **options) -> ScheduleFree:
    """Schedule-free AdamW."""
    from schedulefree import AdamWScheduleFree

    return ScheduleFree(model, AdamWScheduleFree(model.parameters(), **options))


def salsa(model: nn.Module, **options) -> Salsa:
    """SaLSA from the authors' package ``SaLSa-Optimizer``."""
    from salsa.SaLSA import SaLSA

    return Salsa(model, SaLSA(model.parameters(), **options))


RIVALS: dict[str, Callable[..., Rival]] = {
    "als": als,
    "averaged": averaged,
    "eager": eager,
    "graphed": graphed,
    "adamw": adamw,
    "capped": no_search,
    "adamw-captured": captured,
    "schedule-free": schedule_free,
    "prodigy": prodigy,
    "salsa": salsa,
}
