"""The arguments of :class:`fastals.ALS`, sorted and checked."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from fastals.schedule import ORDERS, SCHEDULES
from fastals.search import MEMORY, POSITIVE, POSITIVE_OR_NONE, RANGES, Range, one_of
from fastals.shards import local

SMALL_LR = 1e-2  # below it, lr was probably meant as a learning rate of AdamW
NON_NEGATIVE = Range(lambda x: 0 <= float(x) < math.inf, "0 or more")
FINITE = Range(math.isfinite, "a finite number")
#: Defaults that depend on the schedule: those of the relay, and of all others.
RELAY_DEFAULTS = {"c": 0.3, "trust": 0.2, "growth": 1.1, "every": 2}
OTHER_DEFAULTS = {"c": 0.1, "trust": 0.006, "growth": 1.3, "every": 1}
SETTINGS = {
    "direction": one_of(("adam", "sgd")),
    "momentum": one_of(("none", "after", "tested")),
    "schedule": one_of(tuple(SCHEDULES)),
    "order": one_of(ORDERS),
    "every": Range(
        lambda x: x == "auto" or (isinstance(x, int) and not isinstance(x, bool) and x >= 1),
        "an integer of at least 1 or 'auto'",
    ),
    "merge_below": POSITIVE_OR_NONE,
    "max_grad_norm": POSITIVE_OR_NONE,
    "cache": Range(lambda x: x in (True, False, "check"), "True, False or 'check'"),
    "fused": Range(lambda x: x in (True, False, "auto"), "True, False or 'auto'"),
}
#: The constants of the direction; those of the search are in :data:`fastals.search.RANGES`.
DIRECTION_RANGES = {
    "lr": NON_NEGATIVE,
    "betas": Range(
        lambda x: isinstance(x, Sequence) and len(x) == 2 and all(0 <= b < 1 for b in x),
        "two numbers from 0 up to 1, 1 excluded",
    ),
    "eps": POSITIVE,
    "weight_decay": NON_NEGATIVE,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that all units share; the constants of each unit are in its parameter group."""

    direction: str
    momentum: str
    schedule: str
    order: str
    every: int | str
    merge_below: float | None
    max_grad_norm: float | None
    cache: bool | str
    fused: bool | str
    seed: int

    @property
    def moves_together(self) -> bool:
        """Whether trials move all units at once."""
        return self.schedule in ("relay", "independent", "joint")

    @property
    def takes_turns(self) -> bool:
        """Whether a step searches another unit than the step before."""
        return self.schedule in ("relay", "cycle")

    def __post_init__(self) -> None:
        for name, allowed in SETTINGS.items():
            _require(name, getattr(self, name), allowed)


def sort_arguments(arguments: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The arguments of :class:`fastals.ALS` as settings that all units share, and constants of each unit, checked.

    Raises:
        ValueError: one is out of its range.
    """
    by_schedule = RELAY_DEFAULTS if arguments["schedule"] == "relay" else OTHER_DEFAULTS
    arguments = {k: by_schedule[k] if k in by_schedule and v == "default" else v for k, v in arguments.items()}
    settings = Settings(**{f.name: arguments[f.name] for f in fields(Settings)})
    constants = {k: v for k, v in arguments.items() if k in DIRECTION_RANGES or k in RANGES}
    for name, allowed in (DIRECTION_RANGES | RANGES).items():
        _require(name, constants[name], allowed)
    if constants["eta_max"] < constants["eta_min"]:
        raise ValueError(f"eta_max must be at least eta_min, and finite, not {constants['eta_max']!r}")
    return settings, constants


def warn_of_small_lr(lr: float) -> None:
    """Say that ``lr`` is no learning rate, if it looks like one."""
    if 0 < float(lr) < SMALL_LR:
        warnings.warn(
            f"fastals: lr={float(lr):g} is no learning rate here: it multiplies the largest step that a "
            "search may try, and 1.0 is the usual value",
            stacklevel=3,
        )


def warn_of_decay_groups(groups: Sequence[dict]) -> None:
    """Say that groups are units, if they look like those of AdamW: one that decays and one that does not."""
    ours = any(g["name"] != f"group{i}" for i, g in enumerate(groups))
    decays = [float(g["weight_decay"]) for g in groups]
    if not ours and len(set(decays)) > 1 and 0.0 in decays:
        warnings.warn(
            f"fastals: {len(groups)} groups that differ in weight decay are {len(groups)} units here, each with one "
            "step size. For units by blocks whose biases and norms do not decay: fastals.units(model, "
            f"weight_decay={max(decays):g})",
            stacklevel=3,
        )


def refuse_replaced(groups: Sequence[dict], model: nn.Module | None) -> None:
    """Refuse trainable parameters that the model has got since the optimizer was made, and that are in no unit."""
    if model is None:
        return
    in_units = {id(p) for g in groups for p in g["params"]}
    new = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in in_units]
    if new:
        raise ValueError(
            f"{len(new)} trainable parameters are in no unit, {new[0]!r} first: they were unfrozen, added or put in "
            "place of others (resize_token_embeddings, a new head) after the optimizer was made, and would never be "
            "trained. Make the optimizer anew, pass them to add_param_group, or set requires_grad=False"
        )


def refuse_resized(groups: Sequence[dict]) -> None:
    """Refuse parameters that do not have the shape of their last gradient any more."""
    for group in groups:
        for i, p in enumerate(group["params"]):
            if p.grad is not None and p.grad.shape != p.shape:
                name = group["param_names"][i] if "param_names" in group else f"a parameter of {group['name']}"
                raise RuntimeError(
                    f"{name} was {tuple(p.grad.shape)} when its last gradient was computed and is {tuple(p.shape)} "
                    "now: resize the model before making the optimizer"
                )


def check_coverage(groups: Sequence[dict], model: nn.Module | None) -> None:
    """Refuse units that leave out trainable parameters of the model, or hold parameters that it does not have."""
    if model is None:
        return
    trainable = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    in_units = {id(p) for g in groups for p in g["params"]}
    missing = [n for i, n in trainable.items() if i not in in_units]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameters are in no unit, {missing[0]!r} first: pass all of them (unfrozen "
            "ones with add_param_group), or set requires_grad=False on those that are not to be trained"
        )
    if not in_units <= {id(p) for p in model.parameters()}:
        raise ValueError("the units hold parameters that the model does not have: pass the model they belong to")


def check_real(group: dict, model: nn.Module | None) -> None:
    """Refuse trainable complex parameters: slopes, norms and flat buffers are those of real numbers."""
    names = {id(p): n for n, p in model.named_parameters()} if model is not None else {}
    names |= {id(p): n for n, p in zip(group.get("param_names", ()), group["params"], strict=False)}
    for p in group["params"]:
        if p.is_complex() and p.requires_grad:
            which = repr(names[id(p)]) if id(p) in names else f"of shape {tuple(p.shape)}"
            raise ValueError(
                f"the parameter {which} is complex, and the search works on real numbers: hold it as such with "
                "torch.view_as_real and use torch.view_as_complex in forward, or freeze it with requires_grad=False"
            )


def check_saved(state: Mapping[str, Any]) -> None:
    """Refuse a saved state of something else, or one that was damaged."""
    if missing := {"state", "param_groups"} - state.keys():
        raise ValueError(f"this is no state of an optimizer: it has no {sorted(missing)[0]!r}")
    for group in state["param_groups"]:
        for name, allowed in (DIRECTION_RANGES | RANGES).items():
            if name not in group:
                raise ValueError(f"the state has no {name!r}: it was saved by another optimizer")
            _require(f"{name} of the state", group[name], allowed)
        for name in MEMORY.keys() & group.keys():
            _require(f"{name} of the state", group[name], FINITE)
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if not isinstance(value, Tensor) or local(value).isnan().any():
                raise ValueError(f"{name!r} of parameter {index} is damaged in the state: it is not a number")


def _require(name: str, value: object, allowed: Range) -> None:
    try:
        holds = allowed.holds(value)
    except TypeError:  # a string where a number belongs, as a misspelt "default"
        holds = False
    if not holds:
        raise ValueError(f"{name} must be {allowed.words}, not {value!r}")
