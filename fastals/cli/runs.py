"""The folder of a run: configuration, one line of metrics per step, checkpoint and summary."""

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastals.cli.errors import UserError, first_line
from fastals.cli.ranks import by_first
from fastals.files import check_sums, remove, replacing, settle

NUMBER, NUMBER_OR_NULL = (int, float), (int, float, type(None))  # NaN is null in the files
#: What must be in a line of metrics, of a unit in it, in a summary and in a checkpoint.
METRICS = {"step": int, "loss_before": NUMBER_OR_NULL, "units": list}
UNIT = {"name": str, "step_size": NUMBER_OR_NULL}
SUMMARY = {"steps": int, "loss": NUMBER_OR_NULL, "accuracy": NUMBER, "seconds": NUMBER, "forwards": NUMBER_OR_NULL}
#: What may be in a summary: those of older versions have none of it.
LATER = {"optimizer": str, "trials": NUMBER, "device": str, "versions": dict}
CHECKPOINT = {
    "step": int, "seconds": NUMBER, "forwards": NUMBER, "rng": (list, tuple), "model": dict, "optimizer": dict,
    "scheduler": dict,
}  # fmt: skip
CHOICES = {
    "precision": ("fp32", "bf16"), "device": ("auto", "cpu", "cuda"), "anneal": ("cosine", "constant"),
    "optimizer": ("als", "eager", "adamw"),
}  # fmt: skip
#: Options that may differ between a checkpoint and the run that goes on with it.
FREE = {"device", "compare", "checkpoint_every"}


@dataclass(frozen=True)
class Config:
    """All options that the result of a run depends on."""

    model: str = "minilm"
    dataset: str = "bbc-news"
    text_column: tuple[str, ...] = ()
    label_column: str = "label"
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 16
    max_length: int = 64
    precision: str = "fp32"
    seed: int = 0
    device: str = "auto"
    optimizer: str = "als"
    adamw_lr: float = 1e-4
    preset: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    units: str = "block"
    anneal: str = "cosine"
    checkpoint_every: int = 50
    compare: bool = False
    data: str = ""  # digest of texts and labels; runs of older versions have none

    @classmethod
    def of(cls, values: Any) -> "Config":
        """The configuration with these values, as JSON holds them; those of other versions are passed over.

        Raises:
            TypeError: a value is of a wrong type, or it is no dict.
            ValueError: it is none of the choices.
        """
        defaults = asdict(cls())
        types = {name: _json_type(value) for name, value in defaults.items()}
        _check_types(values, {name: types[name] for name in types.keys() & set(values)})
        known = {name: values[name] for name in defaults if name in values}
        for name, choices in CHOICES.items():
            if known.get(name, choices[0]) not in choices:
                raise ValueError(f"{name} is none of {', '.join(choices)}")
        return cls(
            **known
            | {"text_column": tuple(map(str, known.get("text_column", ())))}
            | {"options": tuple((str(name), value) for name, value in known.get("options", ()))}
        )

    def origin(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on with it, as JSON holds it."""
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name not in FREE}))


class RunFolder:
    """The files of one optimizer's run. :meth:`create` makes the folder; nothing is written before.

    Of several processes, the first one reads and writes. A file or folder that is damaged, or cannot be read or
    written, is a :class:`UserError`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pt"
        self.configuration, self.summary = folder / "config.json", folder / "summary.json"
        self.model = folder / "model"

    @by_first
    def create(self, config: Config) -> None:
        """Make the folder with the configuration in it, if it is not there."""
        if self.configuration.exists():
            return
        text = json.dumps(asdict(config), indent=2)
        with explained(self.folder, "cannot be written", "choose another --output"):
            if self.folder.exists():
                with replacing(self.configuration) as path:
                    path.write_text(text)
                return
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder) as path:
                path.mkdir()
                (path / self.configuration.name).write_text(text)

    def read_config(self) -> Config:
        """The configuration that the run was started with."""
        if not self.configuration.exists():
            raise UserError(f"{self.folder} is no run: it has no {self.configuration.name}")
        with self._reading(self.configuration):
            return Config.of(json.loads(self.configuration.read_text()))

    @by_first
    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add the line of one step; NaN becomes null."""
        with self.writing(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def read_metrics(self, steps: int | None = None) -> list[dict[str, Any]]:
        """The lines of all steps so far, or of the first ``steps``."""
        return [_with_nan(json.loads(line)) for line in self._lines(steps)]

    @by_first
    def truncate_metrics(self, steps: int) -> None:
        """Keep the lines of the first ``steps`` steps, which must be there. A kill may have cut short a later one."""
        lines = self._lines(steps) if steps else []
        with self.writing(self.metrics):
            if not lines:
                self.metrics.unlink(missing_ok=True)
                return
            with replacing(self.metrics) as path:
                path.write_text("".join(f"{line}\n" for line in lines))

    @by_first
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; a crash meanwhile leaves the previous one."""
        with self.writing(self.checkpoint):
            settle(self.metrics)  # a checkpoint goes on from these lines
            with replacing(self.checkpoint) as path, path.open("wb") as file:
                torch.save(state, file)

    @by_first
    def load_checkpoint(self, origin: dict[str, Any]) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU, of a run with these options; None if there is none yet."""
        if not self.checkpoint.exists():
            return None
        with self._reading(self.checkpoint):
            check_sums(self.checkpoint)
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            _check_types(state, CHECKPOINT)
            _check_origin(state.get("run", {}), origin)
            return state

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and remove the checkpoint."""
        with self.writing(self.summary):
            with replacing(self.summary) as path:
                path.write_text(json.dumps(_finite(summary), indent=2))
            self.checkpoint.unlink(missing_ok=True)
            for cut_short in self.folder.glob(".*.tmp"):  # by kills
                remove(cut_short)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None if the run is not finished."""
        if not self.summary.exists():
            return None
        with self._reading(self.summary):
            summary = json.loads(self.summary.read_text())
            _check_types(summary, SUMMARY)
            _check_types(summary, {name: LATER[name] for name in LATER.keys() & summary.keys()})
            return _with_nan(summary)

    def writing(self, path: Path) -> Any:
        """Explain why something in the folder cannot be written."""
        again = f"fastals finetune --resume {shlex.quote(str(self.folder))}"
        return explained(path, "cannot be written", f"mend that and go on with {again}; what was saved before is whole")

    def refused(self, path: Path, reason: object) -> UserError:
        """The error for a damaged or foreign file."""
        return UserError(f"{path} is damaged or of another run ({reason}): {self._remedy(path)}")

    def _lines(self, steps: int | None) -> list[str]:
        """The lines of the first ``steps`` steps, or of all, checked."""
        if not self.metrics.exists():
            raise UserError(f"{self.folder} is no run: it has no {self.metrics.name}")
        with self._reading(self.metrics):
            lines = self.metrics.read_text().splitlines()[:steps]
            for number, line in enumerate(lines, start=1):
                _check_line(line, number)
            if len(lines) < (steps or 1):
                raise ValueError(f"it has the lines of {len(lines)} steps of {steps or 1}")
            return lines

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Refuse a damaged file."""
        try:
            with explained(path, "cannot be read", self._remedy(path)):
                yield
        except UserError:
            raise
        except Exception as error:  # whatever the bytes of a damaged file lead to
            raise self.refused(path, first_line(error)) from error

    def _remedy(self, path: Path) -> str:
        begin_anew = f"remove {path} to begin the run anew" if path == self.checkpoint else "start a new run"
        return f"put back a copy of it, or {begin_anew}"


@contextmanager
def explained(path: Path, what: str, advice: str) -> Iterator[None]:
    """Turn an error of the operating system into one that the user can fix."""
    try:
        yield
    except Exception as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise UserError(f"{path} {what} ({reason}): {advice}") from error


def _system_error(error: BaseException | None) -> str | None:
    """What the operating system has said, if it is the reason: torch and safetensors have errors of their own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if "(os error" in str(error):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


def _check_types(values: Any, types: dict[str, Any]) -> None:
    """Refuse values that lack one of these names, or have something else under it."""
    if not isinstance(values, dict):
        raise TypeError(f"it holds {type(values).__name__}, not names with values")
    for name, wanted in types.items():
        if name not in values:
            raise KeyError(f"{name} is missing")
        value = values[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise TypeError(f"{name} is {value!r:.40}")


def _check_line(text: str, number: int) -> None:
    try:
        line = json.loads(text)
        _check_types(line, METRICS)
        for unit in line["units"]:
            _check_types(unit, UNIT)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"line {number}: {first_line(error)}") from error
    if line["step"] != number:
        raise ValueError(f"line {number} is of step {line['step']}")


def _check_origin(saved: dict[str, Any], origin: dict[str, Any]) -> None:
    """Refuse the checkpoint of a run with other options; those of older versions do not say which they had."""
    for name in saved.keys() & origin.keys():
        if saved[name] != origin[name]:
            raise ValueError(f"it was saved with {name}={saved[name]!r}, and the run has {origin[name]!r}")


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The values with NaN for null, as they were before they were written."""
    return {k: math.nan if v is None else v for k, v in values.items()}


def _json_type(value: Any) -> Any:
    """The type that JSON has for values of this kind."""
    return {tuple: list, float: NUMBER}.get(type(value), type(value))


def _finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
