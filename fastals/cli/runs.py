"""The folder of a run: configuration, one line of metrics per step, checkpoint and summary."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastals.cli.errors import UserError
from fastals.cli.ranks import by_first


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


class RunFolder:
    """The files of one optimizer's run. :meth:`create` makes the folder; nothing is written before.

    Of several processes, the first one writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pt"
        self.configuration, self.summary = folder / "config.json", folder / "summary.json"

    @by_first
    def create(self, config: Config) -> None:
        """Make the folder and write the configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.configuration) as path:
            path.write_text(json.dumps(asdict(config), indent=2))

    def read_config(self) -> Config:
        """The configuration that the run was started with."""
        if not self.configuration.is_file():
            raise UserError(f"{self.folder} is no run: it has no {self.configuration.name}")
        values = json.loads(self.configuration.read_text())
        values["text_column"] = tuple(values["text_column"])
        values["options"] = tuple((k, v) for k, v in values["options"])
        known = {f.name for f in fields(Config)}
        return Config(**{k: v for k, v in values.items() if k in known})

    @by_first
    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add the line of one step; NaN becomes null."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of all steps so far."""
        if not self.metrics.is_file():
            raise UserError(f"{self.folder} is no run: it has no {self.metrics.name}")
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    @by_first
    def truncate_metrics(self, steps: int) -> None:
        """Keep the lines of the first ``steps`` steps."""
        lines = self.metrics.read_text().splitlines()[:steps] if self.metrics.is_file() else []
        if not lines:
            self.metrics.unlink(missing_ok=True)
            return
        with replacing(self.metrics) as path:
            path.write_text("".join(f"{line}\n" for line in lines))

    @by_first
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; a crash meanwhile leaves the previous one."""
        with replacing(self.checkpoint) as path:
            torch.save(state, path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU; None if there is none yet."""
        if not self.checkpoint.is_file():
            return None
        return torch.load(self.checkpoint, map_location="cpu", weights_only=True)

    @by_first
    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and remove the checkpoint."""
        with replacing(self.summary) as path:
            path.write_text(json.dumps(_finite(summary), indent=2))
        self.checkpoint.unlink(missing_ok=True)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None if the run is not finished."""
        return json.loads(self.summary.read_text()) if self.summary.is_file() else None


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``target`` that then replaces it atomically."""
    temporary = target.with_name(f".{target.name}.tmp")
    yield temporary
    os.replace(temporary, target)


def _finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
