"""A run's folder: its configuration, a metrics line a step, checkpoints and the summary."""

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


@dataclass(frozen=True)
class Config:
    """Everything that a run is a function of."""

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
    preset: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    units: str = "block"
    anneal: str = "cosine"
    checkpoint_every: int = 50
    compare: bool = False


class Run:
    """The folder of one optimizer's run. Nothing is created before :meth:`create`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pt"
        self.configuration, self.summary = folder / "config.json", folder / "summary.json"

    def create(self, config: Config) -> None:
        """Make the folder and write the configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.configuration) as path:
            path.write_text(json.dumps(asdict(config), indent=2))

    def config(self) -> Config:
        """The configuration the run was started with."""
        if not self.configuration.is_file():
            raise UserError(f"{self.folder} is no run: it has no {self.configuration.name}")
        values = json.loads(self.configuration.read_text())
        values["text_column"] = tuple(values["text_column"])
        values["options"] = tuple((k, v) for k, v in values["options"])
        known = {f.name for f in fields(Config)}
        return Config(**{k: v for k, v in values.items() if k in known})

    def append(self, line: dict[str, Any]) -> None:
        """Add one step to the metrics; NaN becomes null."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """The metrics of all steps so far."""
        if not self.metrics.is_file():
            raise UserError(f"{self.folder} is no run: it has no {self.metrics.name}")
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; a crash halfway leaves the previous one."""
        with replacing(self.checkpoint) as path:
            torch.save(state, path)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint, with the metrics cut back to it; None if the run has not come so far."""
        if not self.checkpoint.is_file():
            self.metrics.unlink(missing_ok=True)
            return None
        state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        kept = self.metrics.read_text().splitlines()[: state["step"]]
        with replacing(self.metrics) as path:
            path.write_text("".join(f"{line}\n" for line in kept))
        return state

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary; a run that has one is complete."""
        with replacing(self.summary) as path:
            path.write_text(json.dumps(_finite(summary), indent=2))
        self.checkpoint.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """The summary of a complete run."""
        return json.loads(self.summary.read_text()) if self.summary.is_file() else None


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write to a temporary neighbour that replaces ``target`` in one move."""
    temporary = target.with_name(f".{target.name}.tmp")
    yield temporary
    os.replace(temporary, target)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
