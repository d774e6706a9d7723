"""The training loop behind ``fastals finetune``."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastals import rng
from fastals.cli import ranks
from fastals.cli.experiment import Experiment, build_optimizer
from fastals.cli.runs import RunFolder
from fastals.optimizer import ALS

Progress = Callable[[int, int, float, int], None]  # step, steps of the run, loss, trials


class Interrupted(Exception):  # noqa: N818
    """The user asked the run to stop; it has saved a checkpoint."""


class TrainingLoop:
    """One optimizer's run, from the start or from its last checkpoint to the end."""

    def __init__(self, experiment: Experiment, name: str, run: RunFolder, show: Progress) -> None:
        self.experiment, self.name, self.run, self.show = experiment, name, run, show
        self.model: Any = experiment.build_model()
        self.wrapped: Any = ranks.wrapped(self.model)
        self.optimizer: Any = build_optimizer(name, self.wrapped, experiment)
        self.scheduler = _scheduler(self.optimizer, experiment.config.anneal, experiment.steps, warmup=name == "adamw")
        self.step, self.seconds, self.forwards = 0, 0.0, 0.0

    def train(self) -> None:
        """Train, then save the model and the summary.

        Raises:
            Interrupted: the user pressed Ctrl-C; the run has saved a checkpoint.
        """
        self._resume()
        config = self.experiment.config
        with _polite_interrupt() as interrupts:
            while self.step < self.experiment.steps:
                line = self._one_step()
                self.run.append_metrics(line)
                self.show(self.step, self.experiment.steps, line["loss_before"], line["trials"])
                stop = ranks.total(len(interrupts)) > 0
                if stop or self.step % config.checkpoint_every == 0:
                    self._save_checkpoint()
                if stop:
                    raise Interrupted
        self._finish(self.experiment.accuracy(self.model))

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
    def _finish(self, accuracy: float) -> None:
        """Save the model and the summary."""
        self.model.save_pretrained(self.run.folder / "model")
        self.experiment.tokenizer.save_pretrained(self.run.folder / "model")
        self.run.finish(self._summary(accuracy))

    def _summary(self, accuracy: float) -> dict[str, Any]:
        lines = self.run.read_metrics()
        last_fifth = lines[-max(1, len(lines) // 5) :]
        return {
            "optimizer": self.name,
            "steps": self.experiment.steps,
            "loss": statistics.mean(line["loss_before"] for line in last_fifth),
            "accuracy": accuracy,
            "trials": statistics.mean(line["trials"] for line in lines),
            "seconds": self.seconds,
            "forwards": self.forwards,
        }

    def _save_checkpoint(self) -> None:
        """Save what a run with as many processes needs to go on bit by bit: the random states are those of all."""
        states = ranks.gathered(rng.get_state(self._gpu()))
        self.run.save_checkpoint(
            {
                "step": self.step, "seconds": self.seconds, "forwards": self.forwards, "rng": states,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
        )  # fmt: skip

    def _resume(self) -> None:
        """Continue from the last checkpoint, if there is one; metrics of later steps are dropped.

        A process that the interrupted run did not have begins with its own random state of the start.
        """
        state = ranks.shared(self.run.load_checkpoint)
        self.run.truncate_metrics(state["step"] if state else 0)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.seconds, self.forwards = state["step"], state["seconds"], state["forwards"]
        states = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]  # older runs had one process
        if ranks.rank() < len(states):
            cpu, cuda = states[ranks.rank()]
            rng.set_state((cpu, dict(zip(self._gpu(), cuda.values(), strict=False))))

    def _gpu(self) -> tuple[int, ...]:
        """Index of the GPU of this process, if it has one."""
        return rng.cuda_devices(self.model.parameters())


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
