"""What an optimizer is handed over, checked before it is used: parameters, groups, modules, and saved states."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fastals.search import COUNT, MEMORY_RANGES, Range
from fastals.settings import CONSTANTS, SETTINGS, check_constants, require
from fastals.shards import local

PARAMS = "pass the model, fastals.units(model), or tensors or groups of tensors as for any optimizer"
GROUP = "a group is a dict with a list of parameters under 'params'"
SAVED = "load what opt.state_dict() has returned"
TEXT = Range(lambda x: isinstance(x, str), "a string")
STORED = ("exp_avg", "exp_avg_sq", "master")


def listed(params: object) -> list:
    """The parameters or groups that an optimizer is made of.

    Raises:
        TypeError, ValueError: there are none.
    """
    if isinstance(params, Tensor | str | Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"params is a {type(params).__name__}: {PARAMS}")
    if not (found := list(params)):
        raise ValueError(f"params is empty: {PARAMS}")
    return found


def check_modules(params: object, model: object, modules: Any) -> list[nn.Module]:
    """The further modules, after a look at the model.

    Raises:
        TypeError: something is no module.
        ValueError: there are two models.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}: leave it out without one")
    if isinstance(params, nn.Module) and model is not None and model is not params:
        raise ValueError("there are two models: pass the one to train, and the other one as modules=[...]")
    single = isinstance(modules, nn.Module | Tensor) or not isinstance(modules, Iterable)
    further = [modules] if single else list(modules)
    if single or not all(isinstance(module, nn.Module) for module in further):
        raise TypeError(f"modules must be a list of modules, as modules=[teacher], not a {type(modules).__name__}")
    return further


def as_group(group: object, others: Iterable[dict]) -> dict[str, Any]:
    """A copy of the group with a list of parameters, or of pairs of name and parameter.

    Raises:
        TypeError: it is no group.
        ValueError: parameters that cannot be trained or are in a group already, or a setting of the whole optimizer.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"{GROUP}, not {list(group) if isinstance(group, dict) else type(group).__name__}")
    if common := [name for name in SETTINGS if name in group]:
        raise ValueError(f"{common[0]} is a setting of all units: pass it to the optimizer, not in a group")
    params = group["params"]
    if isinstance(params, str | set | Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"{GROUP}, as list(model.parameters()), not a {type(params).__name__}")
    members = [params] if isinstance(params, Tensor) else list(params)
    _check_tensors([p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in members], others)
    return group | {"params": members}


def _check_tensors(tensors: list, others: Iterable[dict]) -> None:
    if strangers := [p for p in tensors if not isinstance(p, Tensor)]:
        raise TypeError(f"parameters are tensors, and one is a {type(strangers[0]).__name__}: {PARAMS}")
    if made := [p for p in tensors if not (p.is_leaf or p.retains_grad)]:
        raise ValueError(f"a tensor of shape {tuple(made[0].shape)} is the result of an operation: pass its parameter")
    there = [id(p) for other in others for p in other["params"]]
    if len(set(ids := [*there, *map(id, tensors)])) < len(ids):
        raise ValueError("parameters appear twice, or in more than one parameter group: pass each of them once")


def check_group(group: dict, model: nn.Module | None) -> None:
    """Refuse a group whose constants, memory or parameters cannot be those of a unit.

    Raises:
        ValueError: something is out of its range, or a parameter is complex.
    """
    check_constants(group)
    check_memory(group)
    check_real(group, model)


def check_memory(group: Mapping[str, Any]) -> None:
    """Refuse a name, a unit or a memory that no optimizer has written.

    Raises:
        ValueError: one is of another kind or out of its range.
    """
    where = f" (in the group {group.get('name')!r})"
    require("name", group.get("name"), TEXT, where)
    require("unit", group.get("unit"), COUNT, where)
    for name, allowed in MEMORY_RANGES.items():
        if name in group:  # it may have been saved before there was one
            require(name, group[name], allowed, where)


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


def check_saved(saved: Mapping[str, Any]) -> None:
    """Refuse what is no saved state, or that of another optimizer.

    Raises:
        ValueError: it is; the message names what is wrong.
    """
    state, groups = saved.get("state"), saved.get("param_groups")
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise ValueError(f"the state has no dict 'state' with a dict for each parameter: {SAVED}")
    if not isinstance(groups, list) or not all(map(_is_saved_group, groups)):
        raise ValueError(f"the state has no list 'param_groups' of dicts with a list 'params': {SAVED}")
    for group in groups:
        if missing := [name for name in ("name", "unit", *CONSTANTS) if name not in group]:
            raise ValueError(f"the state has no {missing[0]!r}: it was saved by another optimizer; {SAVED}")
        check_constants(group)
        check_memory(group)


def _is_saved_group(group: object) -> bool:
    return (
        isinstance(group, Mapping)
        and isinstance(group.get("params"), list)
        and isinstance(group.get("param_names", []), list)
    )


def check_entry(name: str | int, p: Tensor, entry: Mapping[str, Any]) -> None:
    """Refuse a saved state that cannot be that of the parameter.

    Raises:
        ValueError: a count or a moment is none, or that of another model.
    """
    step = entry.get("step")
    count = step.item() if isinstance(step, Tensor) and not step.ndim and not step.is_meta else -1
    if count < 0 or not float(count).is_integer():
        raise ValueError(f"the state of parameter {name!r} has no count 'step', but {step!r}: {SAVED}")
    for key in (key for key in STORED if key in entry):
        value = entry[key]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
            kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the state of parameter {name!r} has no tensor of real numbers {key!r} ({kind}): {SAVED}")
        if value.shape != p.shape:
            raise ValueError(
                f"the state of parameter {name!r} was saved with another model: its {key} has the shape "
                f"{tuple(value.shape)}, the parameter has {tuple(p.shape)}"
            )
        if local(value).isnan().any():
            raise ValueError(f"the state of parameter {name!r} is damaged: its {key} is not a number")
