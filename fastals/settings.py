"""The arguments of :class:`fastals.ALS`, sorted and checked."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from numbers import Integral
from operator import is_not, itemgetter
from typing import Any

from torch import Tensor, nn

from fastals.schedule import ORDERS, SCHEDULES
from fastals.search import (
    COUNT_FROM_1,
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_NONE,
    RANGES,
    Range,
    number,
    one_of,
)

ROUNDING = 1e-12  # as far below 0 may a scheduler of torch end
SMALL_LR = 1e-2  # below it, lr was probably meant as a learning rate of AdamW
#: Defaults that depend on the schedule: those of the relay, and of all others.
RELAY_DEFAULTS = {"c": 0.3, "trust": 0.2, "growth": 1.1, "every": 2}
OTHER_DEFAULTS = {"c": 0.1, "trust": 0.006, "growth": 1.3, "every": 1}
SETTINGS = {
    "direction": one_of(("adam", "sgd")),
    "momentum": one_of(("none", "after", "tested")),
    "schedule": one_of(tuple(SCHEDULES)),
    "order": one_of(ORDERS),
    "every": Range(lambda x: x == "auto" or COUNT_FROM_1.holds(x), "an integer of at least 1 or 'auto'"),
    "merge_below": POSITIVE_OR_NONE,
    "max_grad_norm": POSITIVE_OR_NONE,
    "cache": Range(lambda x: isinstance(x, bool) or x == "check", "True, False or 'check'"),
    "fused": Range(lambda x: isinstance(x, bool) or x == "auto", "True, False or 'auto'"),
    "seed": number(lambda _: True, "an integer", Integral),
}
LR = number(lambda x: -ROUNDING < x < math.inf, NON_NEGATIVE.words)
BETA = number(lambda x: 0 <= x < 1, "from 0 up to 1, 1 excluded")
#: The constants of the direction; those of the search are in :data:`fastals.search.RANGES`.
DIRECTION_RANGES = {
    "lr": Range(lambda x: LR.holds(_plain(x)), NON_NEGATIVE.words),  # schedulers may fill a tensor
    "betas": Range(
        lambda x: isinstance(x, Sequence) and len(x) == 2 and all(map(BETA.holds, x)),
        "two numbers from 0 up to 1, 1 excluded",
    ),
    "eps": POSITIVE,
    "weight_decay": NON_NEGATIVE,
}
CONSTANTS = DIRECTION_RANGES | RANGES
CHANGING = Tensor, list  # kinds of constants that may change in place
_constants = itemgetter(*CONSTANTS)


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
            require(name, getattr(self, name), allowed)


def sort_arguments(arguments: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The arguments of :class:`fastals.ALS` as settings that all units share, and constants of each unit, checked.

    Raises:
        ValueError: one is out of its range.
    """
    by_schedule = RELAY_DEFAULTS if arguments["schedule"] == "relay" else OTHER_DEFAULTS
    arguments = {k: by_schedule[k] if k in by_schedule and v == "default" else v for k, v in arguments.items()}
    settings = Settings(**{f.name: arguments[f.name] for f in fields(Settings)})
    constants = {k: v for k, v in arguments.items() if k in CONSTANTS}
    check_constants(constants)
    return settings, constants


def check_constants(constants: Mapping[str, Any], seen: tuple = ()) -> tuple:
    """Refuse constants out of their ranges, those of a group or those of all; ``seen`` have been looked at before.

    Returns what to hand over as ``seen`` the next time; what may change in place is looked at every time.

    Raises:
        ValueError: one is missing or out of its range.
    """
    try:
        values = _constants(constants)
    except KeyError as missing:
        raise ValueError(
            f"there is no {missing.args[0]}{_where(constants)}: set it, or make the optimizer anew"
        ) from None
    if seen and not any(map(is_not, values, seen)):
        return seen
    where = _where(constants)
    for name, value, before in zip(CONSTANTS, values, seen or repeat(_UNSEEN), strict=False):
        if value is not before:
            require(name, value, CONSTANTS[name], where)
    if constants["eta_max"] < constants["eta_min"]:
        raise ValueError(f"eta_max must be at least eta_min, and finite, not {constants['eta_max']!r}{where}")
    return tuple([_UNSEEN if isinstance(value, CHANGING) else value for value in values])


def _where(constants: Mapping[str, Any]) -> str:
    return f" (in the group {constants['name']!r})" if "name" in constants else ""


_UNSEEN = object()


def warn_of_small_lr(lr: float) -> None:
    """Say that ``lr`` is no learning rate, if it looks like one."""
    if 0 < float(lr) < SMALL_LR:
        warnings.warn(
            f"fastals: lr={float(lr):g} is no learning rate here: it multiplies the largest step that a "
            "search may try. Leave it out for the usual value, 1",
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


def _plain(x: object) -> object:
    """The number that a tensor holds; anything else as it is."""
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta else x


def require(name: str, value: object, allowed: Range, where: str = "") -> None:
    """Refuse a value out of its range.

    Raises:
        ValueError: it is; the message names it.
    """
    if not allowed.holds(value):
        raise ValueError(f"{name} must be {allowed.words}, not {value!r}{where}")
