"""Cut a model into units: parameter groups whose step sizes are searched one by one.

The blocks are the modules that a forward pass calls one by one from the outermost lists; no model is known by name.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from numbers import Real

from torch import Tensor, nn

from fastals.shards import unwrapped

_numbers = count(1 << 32)  # of units with several groups: those of two models may be put together


class Groups(list[dict]):
    """Parameter groups that know the model they were cut from, and how."""

    def __init__(self, groups: Iterable[dict], model: nn.Module, by: str | int | Sequence[str]) -> None:
        super().__init__(groups)
        self.model, self.by = model, by


def units(
    model: nn.Module,
    by: str | int | Sequence[str] = "block",
    *,
    weight_decay: float | None = None,
    decayed: Collection[str] | None = None,
) -> Groups:
    """Parameter groups ``{"name", "params", "param_names"}`` in forward order, ready for :class:`fastals.ALS`.

    The groups know their model, so ``ALS(fastals.units(model))`` is ``ALS(model)``. With a ``weight_decay`` above 0
    a unit has up to two groups, one that decays and one that does not, whose step size is searched together.

    Args:
        model: any module; only parameters with ``requires_grad`` are taken.
        by: ``"block"``: embeddings, each transformer block, head. ``"model"``: one unit.
            An integer n: n groups of consecutive blocks, embeddings in the first and head in the last.
            A sequence of regular expressions: one unit per pattern, and one named ``rest`` for parameters that no
            pattern matches. A parameter goes to the first pattern that matches its name.
        weight_decay: decoupled weight decay of the parameters that decay; 0 for the others. ``None`` leaves all to the
            ``weight_decay`` of :class:`fastals.ALS`.
        decayed: names of the parameters that decay; without it those of at least two dimensions do, so that biases and
            the weights of norms do not.

    Raises:
        TypeError: no module.
        ValueError: no trainable parameter, more groups than blocks, a pattern that is none or matches nothing, a
            ``weight_decay`` below 0, or a name in ``decayed`` that no parameter has.
    """
    _check(model, by, weight_decay, decayed)
    whole, model = model, unwrapped(model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: set requires_grad on those to train")
    unit_of = _unit_names(model, trainable, by)
    members = {unit: [n for n in trainable if unit_of[n] == unit] for unit in dict.fromkeys(unit_of.values())}
    groups = [group(unit, [(n, trainable[n]) for n in ns]) for unit, ns in members.items() if ns]
    if weight_decay is not None:
        names = {n for n, p in trainable.items() if p.ndim > 1} if decayed is None else _known(model, decayed)
        if not weight_decay:
            names |= trainable.keys()
        groups = [part for g in groups for part in _by_decay(g, next(_numbers), weight_decay, names)]
    return Groups(groups, whole, by)


def _check(model: object, by: object, weight_decay: object, decayed: object) -> None:
    """Refuse arguments of another kind."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"units are those of a torch.nn.Module, not of a {type(model).__name__}: pass the model")
    is_number = isinstance(weight_decay, Real) and not isinstance(weight_decay, bool)
    if weight_decay is not None and not (is_number and 0 <= weight_decay < math.inf):  # type: ignore[operator]
        raise ValueError(f"weight_decay must be 0 or more, or None, not {weight_decay!r}")
    if decayed is not None and (
        weight_decay is None or isinstance(decayed, str) or not isinstance(decayed, Collection)
    ):
        raise ValueError(f"decayed must be a list of names, beside a weight_decay, not {decayed!r}")


def _known(model: nn.Module, names: Collection[str]) -> set[str]:
    """The names under which the model lists these parameters; a tied one may be given by any of its names."""
    every = dict(model.named_parameters(remove_duplicate=False))
    if unknown := set(names) - every.keys():
        raise ValueError(f"decayed: the model has no parameter {sorted(unknown)[0]!r}")
    wanted = {id(every[n]) for n in names}
    return {n for n, p in model.named_parameters() if id(p) in wanted}


def _by_decay(whole: dict, unit: int, weight_decay: float, decayed: Collection[str]) -> Iterator[dict]:
    """The groups of one unit: of the parameters that decay, and of the others."""
    members = list(zip(whole["param_names"], whole["params"], strict=True))
    for decay, part in (
        (weight_decay, [(n, p) for n, p in members if n in decayed]),
        (0.0, [(n, p) for n, p in members if n not in decayed]),
    ):
        if part:
            yield group(whole["name"], part) | {"unit": unit, "weight_decay": decay}


def _unit_names(model: nn.Module, trainable: Mapping[str, Tensor], by: str | int | Sequence[str]) -> dict[str, str]:
    """The unit of every parameter, by name; parameter groups follow the order of the units here."""
    if by == "block":
        return _by_block(model)
    if by == "model":
        return dict.fromkeys(trainable, "model")
    if isinstance(by, int) and not isinstance(by, bool):
        return _by_count(model, by)
    if isinstance(by, list | tuple) and by and all(isinstance(pattern, str) for pattern in by):
        return _by_pattern(trainable, by)
    raise ValueError(f"by must be 'block', 'model', an integer or a list of patterns, not {by!r}")


def group(name: str, members: Sequence[tuple[str, Tensor]]) -> dict:
    """One parameter group as :func:`units` returns it, from pairs of name and parameter."""
    return {"name": name, "params": [p for _, p in members], "param_names": [n for n, _ in members]}


def named(group: dict, model: nn.Module) -> dict:
    """The group with ``param_names`` added from the model, unless it has them already.

    Raises:
        ValueError: the group holds a parameter that the model does not have.
    """
    if "param_names" in group:
        return group
    names = {id(p): n for n, p in unwrapped(model).named_parameters()}
    members = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    if not all(id(p) in names for p in members):
        raise ValueError("the group holds parameters that the model does not have: add them to the model first")
    return group | {"params": members, "param_names": [names[id(p)] for p in members]}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated modules, by name, in registration order: the entries of the model's stacks.

    Lists of bare layers are stacks only in a model without others. A model that is a ``Sequential`` is one itself only
    if nothing inside is.
    """
    root = list(_entries(model)) if isinstance(model, nn.Sequential) else []
    parts = root or [model]
    found = set(_stacked(parts, _is_stack)) or set(_stacked(parts, _is_list_of_layers))
    if root and not found:
        found = set(root)
    return {name: module for name, module in model.named_modules() if module in found}


def _stacked(modules: Iterable[nn.Module], is_stack: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The entries of the outermost stacks in the modules; nothing inside an entry is looked at."""
    for module in modules:
        yield from _entries(module) if is_stack(module) else _stacked(module.children(), is_stack)


def _entries(stack: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters that code which walks through the stack calls: lists in it are opened."""
    for child in stack.children():
        if _is_container(child):
            yield from _entries(child)
        elif _has_parameters(child):
            yield child


def _is_container(module: nn.Module) -> bool:
    """Whether the module is never called because it has no ``forward``, as a ``ModuleList`` or a ``ModuleDict``."""
    return getattr(module.forward, "__func__", None) is nn.Module.forward


def _is_stack(module: nn.Module) -> bool:
    """Whether it is a list with a composite module, or a sequence of composite modules of one type."""
    children = [c for c in module.children() if _has_parameters(c)]
    composite = [c for c in children if any(True for _ in c.children())]
    if isinstance(module, nn.ModuleList):
        return bool(composite)
    if isinstance(module, nn.Sequential):
        return len(composite) == len(children) > 1 and len(set(map(type, children))) == 1
    return False


def _is_list_of_layers(module: nn.Module) -> bool:
    """Whether it is a list of at least two modules, which are bare layers where no list is a stack."""
    return isinstance(module, nn.ModuleList) and len(list(_entries(module))) > 1


def _holds(module: nn.Module, found: set[nn.Module]) -> bool:
    """Whether the module is one of ``found`` or has one inside."""
    return not found.isdisjoint(module.modules())


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _by_block(model: nn.Module) -> dict[str, str]:
    """The unit of every parameter in registration order; one between two blocks joins the block after it."""
    stack = blocks(model)
    if not stack:
        return {n: n.split(".")[0] if "." in n else "model" for n, _ in model.named_parameters()}
    block_of = {n: _block_name(n, stack) for n, _ in model.named_parameters()}
    positions = [i for i, block in enumerate(block_of.values()) if block]
    following, unit_of = "head", dict[str, str]()
    for i, n in reversed(list(enumerate(block_of))):
        following = block_of[n] or following
        unit_of[n] = "embeddings" if i < positions[0] else following
    return {n: unit_of[n] for n in block_of}


def _block_name(param_name: str, stack: Mapping[str, nn.Module]) -> str:
    """The block that holds the parameter; empty if none does."""
    return next((block for block in stack if param_name.startswith(f"{block}.")), "")


def _by_count(model: nn.Module, count: int) -> dict[str, str]:
    """Deal consecutive blocks to ``count`` units; the first takes the embeddings too, the last the head."""
    block_of = _by_block(model)
    stack = [u for u in dict.fromkeys(block_of.values()) if u not in ("embeddings", "head")]
    if not 1 <= count <= len(stack):
        raise ValueError(f"by={count}: this model has {len(stack)} blocks, so by must be 1 to {len(stack)}")
    group_of = {block: f"group{i * count // len(stack)}" for i, block in enumerate(stack)}
    group_of |= {"embeddings": "group0", "head": f"group{count - 1}"}
    return {n: group_of[block] for n, block in block_of.items()}


def _by_pattern(trainable: Mapping[str, Tensor], patterns: Sequence[str]) -> dict[str, str]:
    """The first pattern that matches each parameter, in the order of the patterns."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"by: {pattern!r} is no regular expression ({error}): escape it with re.escape") from error
    unit_of = {n: next((p for p in patterns if re.search(p, n)), "rest") for n in trainable}
    unmatched = [p for p in patterns if p not in unit_of.values()]
    if unmatched:
        raise ValueError(f"no trainable parameter is matched by {unmatched}: names look like {next(iter(unit_of))!r}")
    order = [*patterns, "rest"]
    return dict(sorted(unit_of.items(), key=lambda item: order.index(item[1])))


def observed(groups: Sequence[dict], position: Callable[[Tensor], str]) -> list[list[str]]:
    """Parameter names of every group, with each parameter in the unit in which a forward pass first used it.

    ``position`` gives the unit's name for a parameter that has a gradient. A parameter without one, or with a position
    where no group of the same weight decay is, stays in its group.
    """
    members: list[list[str]] = [[] for _ in groups]
    index = {(g["name"], g["weight_decay"]): i for i, g in enumerate(groups)}
    for i, group in enumerate(groups):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            unit = position(p) if p.grad is not None else group["name"]
            members[index.get((unit, group["weight_decay"]), i)].append(name)
    return members


def boundaries(model: nn.Module) -> list[nn.Module]:
    """The blocks, and the largest modules outside them that hold no block; a forward pass calls these one by one.

    A container is none of them, because it is never called.
    """
    stack = set(blocks(model).values())

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child in stack or not (_is_container(child) or _holds(child, stack)):
                yield child
            else:
                yield from walk(child)

    return list(dict.fromkeys(walk(model)))
