"""Settings of the optimizer and their checks."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastals.schedule import ORDERS, SCHEDULES
from fastals.search import INITIALS, REFERENCES

DIRECTIONS = ("adam", "sgd")
MOMENTA = ("none", "after", "tested")
SMALL_LR = 1e-2  # below it someone means a learning rate of AdamW


@dataclass(frozen=True)
class Settings:
    """What holds for all units alike; the constants of each unit are in its parameter group."""

    direction: str
    momentum: str
    schedule: str
    order: str
    every: int | str
    merge_below: float | None
    max_grad_norm: float | None
    cache: bool
    fused: bool | str
    seed: int

    def __post_init__(self) -> None:
        one_of("direction", self.direction, DIRECTIONS)
        one_of("momentum", self.momentum, MOMENTA)
        one_of("schedule", self.schedule, tuple(SCHEDULES))
        one_of("order", self.order, ORDERS)
        if self.fused not in (True, False, "auto"):
            raise ValueError(f"fused must be True, False or 'auto', not {self.fused!r}")
        every = self.every
        if every != "auto" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be an integer of at least 1 or 'auto', not {every!r}")
        for name in ("merge_below", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None:
                _require(name, value, 0 < value < math.inf, "greater than 0, or None")


def check_ranges(values: Mapping[str, Any]) -> None:
    """Refuse constants for which the search makes no sense."""
    for name in ("c", "backtrack"):
        _require(name, values[name], 0 < values[name] < 1, "between 0 and 1, both excluded")
    for name in ("lr", "weight_decay"):
        _require(name, values[name], 0 <= float(values[name]) < math.inf, "0 or more")
    if 0 < float(values["lr"]) < SMALL_LR:
        warnings.warn(
            f"fastals: lr={float(values['lr']):g} is no learning rate here: it multiplies the largest step that a "
            "search may try, and 1.0 is the usual value",
            stacklevel=4,
        )
    for name in ("eps", "eta_min", "polyak_c"):
        _require(name, values[name], 0 < values[name] < math.inf, "greater than 0")
    for name in ("trust", "eta_init"):
        value = values[name]
        _require(name, value, value is None or 0 < value < math.inf, "greater than 0, or None")
    betas = values["betas"]
    pair = isinstance(betas, Sequence) and len(betas) == 2 and all(0 <= b < 1 for b in betas)
    _require("betas", betas, pair, "two numbers from 0 up to 1, 1 excluded")
    _require("growth", values["growth"], 1 <= values["growth"] < math.inf, "1 or more")
    largest = values["eta_max"]
    _require("eta_max", largest, values["eta_min"] <= largest < math.inf, "at least eta_min, and finite")
    trials = values["max_trials"]
    _require("max_trials", trials, isinstance(trials, int) and trials >= 1, "an integer of at least 1")
    _require("smoothing", values["smoothing"], 0 <= values["smoothing"] < 1, "from 0 up to 1, 1 excluded")
    weight = values["nonmonotone_weight"]
    _require("nonmonotone_weight", weight, 0 <= weight <= 1, "from 0 to 1")
    one_of("initial", values["initial"], INITIALS)
    one_of("reference", values["reference"], REFERENCES)


def check_coverage(groups: Sequence[dict], model: nn.Module | None) -> None:
    """Refuse units that are no units of the model's trainable parameters."""
    if model is None:
        return
    named = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    held = {id(p) for g in groups for p in g["params"]}
    missing = [n for i, n in named.items() if i not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameters are in no unit, {missing[0]!r} first: pass all of them "
            "(add_param_group for what has been unfrozen), or set requires_grad=False on those that should stay as "
            "they are"
        )
    if not held <= {id(p) for p in model.parameters()}:
        raise ValueError("the units hold parameters that the model does not have: pass the model they belong to")


def warn_of_processes() -> None:
    """Say that every process would decide by its own loss."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            warnings.warn(
                f"fastals: {processes} processes are running, and each decides by the loss of its own closure: weights "
                "drift apart unless closures return the same loss everywhere (average it over the processes), and "
                "gradients are averaged too (loss.backward() and opt.step(closure, loss=loss))",
                stacklevel=4,
            )


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a name that is not allowed, and say which are."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
