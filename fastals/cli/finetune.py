"""The training loop behind ``fastals finetune``."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastals import rng
from fastals.cli import ranks
from fastals.cli.errors import first_line
from fastals.cli.experiment import Experiment, build_optimizer, versions
from fastals.cli.runs import RunFolder
from fastals.files import replacing
from fastals.optimizer import ALS

Show = Callable[[int, float, float], None]  # step, loss before it, forward passes of a step so far


class Interrupted(Exception):  # noqa: N818
    """The user asked the run to stop; it has saved a checkpoint."""


class TrainingLoop:
    """One optimizer's run, from the start or from its last checkpoint to the end."""

    def __init__(self, experiment: Experiment, name: str, run: RunFolder, show: Show) -> None:
        self.experiment, self.name, self.run, self.show = experiment, name, run, show
        self.model: Any = experiment.build_model()
        self.wrapped: Any = ranks.wrapped(self.model)
        self.optimizer: Any = build_optimizer(name, self.wrapped, experiment)
        self.scheduler = _scheduler(self.optimizer, experiment.config.anneal, experiment.steps, warmup=name == "adamw")
        self.step, self.seconds, self.forwards = 0, 0.0, 0.0

    def train(self) -> dict[str, Any]:
        """Train, then save the model and the summary, which it returns.

        Raises:
            Interrupted: the user pressed Ctrl-C; the run has saved a checkpoint.
        """
        self._resume()
        config = self.experiment.config
        with _polite_interrupt() as interrupts:
            while self.step < self.experiment.steps:
                line = self._one_step()
                self.run.append_metrics(line)
                self.show(self.step, line["loss_before"], self.forwards / self.step)
                stop = ranks.total(len(interrupts)) > 0
                if stop or self.step % config.checkpoint_every == 0:
                    self._save_checkpoint()
                if stop:
                    raise Interrupted
        return self._finish(self.experiment.accuracy(self.model))

    def _one_step(self) -> dict[str, Any]:
        """Train on the next mini-batch; returns its line of metrics."""
        batch = self.experiment.batch(self.step)
        evaluations = 0

        def loss() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            with self.experiment.autocast():
                return self.wrapped(**batch).loss

        begin = time.perf_counter()
        line = self._plain_step(loss) if self.name == "adamw" else self._search_step(loss)
        self.seconds += time.perf_counter() - begin
        self.forwards += self.optimizer.last_forwards if isinstance(self.optimizer, ALS) else evaluations
        self.scheduler.step()
        self.step += 1
        return {"step": self.step} | line

    def _plain_step(self, loss: Callable[[], Tensor]) -> dict[str, Any]:
        value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss_before = ranks.total(value.item()) / ranks.size()
        return {"loss_before": loss_before, "loss_after": float("nan"), "trials": 0, "units": []}

    def _search_step(self, loss: Callable[[], Tensor]) -> dict[str, Any]:
        self.optimizer.step(loss)
        report = self.optimizer.report
        return report.as_dict() | {"trials": report.trials}

    @ranks.by_first
    def _finish(self, accuracy: float) -> dict[str, Any]:
        """Save the model and the summary."""
        with self.run.writing(self.run.model), replacing(self.run.model) as folder:
            self.model.save_pretrained(folder)
            self.experiment.tokenizer.save_pretrained(folder)
        summary = self._summary(accuracy)
        self.run.finish(summary)
        return summary

    def _summary(self, accuracy: float) -> dict[str, Any]:
        lines = self.run.read_metrics()
        last_fifth = lines[-max(1, len(lines) // 5) :]
        return {
            "optimizer": self.name,
            "steps": self.experiment.steps,
            "loss": statistics.mean(line["loss_before"] for line in last_fifth),
            "accuracy": accuracy,
            "trials": statistics.mean(line.get("trials", 0) for line in lines),
            "seconds": self.seconds,
            "forwards": self.forwards,
            "device": self.experiment.device_name(),
            "versions": versions(),
        }

    def _save_checkpoint(self) -> None:
        """Save what a run with as many processes needs to go on bit by bit: the random states are those of all."""
        states = ranks.gathered(rng.get_state(self._gpu()))
        self.run.save_checkpoint(
            {
                "run": self._origin(),
                "step": self.step, "seconds": self.seconds, "forwards": self.forwards, "rng": states,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
        )  # fmt: skip

    def _origin(self) -> dict[str, Any]:
        """The options that tell the checkpoints of this run from those of others."""
        return replace(self.experiment.config, optimizer=self.name).origin()

    def _resume(self) -> None:
        """Continue from the last checkpoint, if there is one; metrics of later steps are dropped.

        Nothing in the folder changes before all of it was found good.
        """
        state = self.run.load_checkpoint(self._origin())
        if state is not None:
            ranks.agreed(lambda: self._restore(state))
        self.run.truncate_metrics(self.step)

    def _restore(self, state: dict[str, Any]) -> None:
        """Load a checkpoint.

        A process that the interrupted run did not have begins with its own random state of the start.
        """
        try:
            self._check(state)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            states = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]  # older runs had one process
            if ranks.rank() < len(states):
                cpu, cuda = states[ranks.rank()]
                rng.set_state((cpu, dict(zip(self._gpu(), cuda.values(), strict=False))))
        except Exception as error:  # whatever a foreign state leads to
            raise self.run.refused(self.run.checkpoint, first_line(error)) from error
        self.step, self.seconds, self.forwards = state["step"], state["seconds"], state["forwards"]

    def _check(self, state: dict[str, Any]) -> None:
        """Refuse what torch would load without a word."""
        step, reached = state["step"], state["scheduler"].get("last_epoch")
        if not 0 < step <= self.experiment.steps or step != reached:
            raise ValueError(f"it is of step {step} of {self.experiment.steps}, its schedule of step {reached}")
        for name, value in self.model.state_dict().items():
            saved = state["model"][name]
            if (saved.shape, saved.dtype) != (value.shape, value.dtype):
                raise ValueError(f"{name} is {saved.dtype} of shape {tuple(saved.shape)} in it")
        if not isinstance(self.optimizer, ALS):  # which looks itself
            _check_moments(state["optimizer"]["state"], self.optimizer)
        if self.name != "adamw":  # which may have diverged
            _refuse_nan(state)

    def _gpu(self) -> tuple[int, ...]:
        """Index of the GPU of this process, if it has one."""
        return rng.cuda_devices(self.model.parameters())


def _check_moments(state: dict[int, dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Refuse the state of other parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in state.items():
        for name, value in entry.items():
            if value.ndim and value.shape != params[index].shape:
                raise ValueError(f"{name} of parameter {index} has the shape {tuple(value.shape)}")


def _refuse_nan(value: Any, name: str = "it") -> None:
    """Refuse a checkpoint that no step could go on from."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_nan(inner, f"{name}[{key!r}]")
    elif isinstance(value, Tensor | float) and torch.as_tensor(value).isnan().any():
        raise ValueError(f"{name} is not a number")


def _scheduler(optimizer: torch.optim.Optimizer, anneal: str, steps: int, warmup: bool) -> Any:
    from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

    if anneal == "constant":
        return get_constant_schedule(optimizer)
    return get_cosine_schedule_with_warmup(optimizer, steps // 10 if warmup else 0, steps)


@contextmanager
def _polite_interrupt() -> Iterator[list]:
    """A list that a Ctrl-C fills, so that the step can end first; a second Ctrl-C stops at once."""
    interrupts: list = []
    previous = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(True)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
