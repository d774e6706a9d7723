"""Cut a model into units: parameter groups whose step sizes are searched one by one.

The transformer blocks are the entries of the outermost module lists; no model is known by name.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn


class Groups(list[dict]):
    """Parameter groups, and the model that they were cut from."""

    def __init__(self, groups: Iterable[dict], model: nn.Module) -> None:
        super().__init__(groups)
        self.model = model


def units(model: nn.Module, by: str | int | Sequence[str] = "block") -> Groups:
    """Parameter groups ``{"name", "params", "param_names"}`` in forward order, ready for :class:`fastals.ALS`.

    They know their model, so that ``ALS(fastals.units(model))`` caches its activations too.

    Args:
        model: any module; only parameters with ``requires_grad`` are taken.
        by: ``"block"``: embeddings, each transformer block, head. ``"model"``: one unit.
            An integer n: n groups of consecutive blocks, embeddings in the first and head in the last.
            A sequence of regular expressions: one unit per pattern (the first that matches a parameter's
            name wins) and one named ``rest`` for the others.

    Raises:
        ValueError: no trainable parameter, more groups than blocks, or a pattern that matches nothing.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: set requires_grad on those to train")
    if by == "block":
        names = _by_block(model)
    elif by == "model":
        names = dict.fromkeys(trainable, "model")
    elif isinstance(by, int) and not isinstance(by, bool):
        names = _by_count(model, by)
    elif isinstance(by, Sequence) and not isinstance(by, str):
        names = _by_pattern(trainable, by)
    else:
        raise ValueError(f"by must be 'block', 'model', an integer or a list of patterns, not {by!r}")
    order = dict.fromkeys(names.values())
    members = {unit: [n for n in trainable if names[n] == unit] for unit in order}
    return Groups((group(unit, [(n, trainable[n]) for n in ns]) for unit, ns in members.items() if ns), model)


def group(name: str, named: Sequence[tuple[str, torch.Tensor]]) -> dict:
    """One parameter group of the form that :func:`units` returns."""
    return {"name": name, "params": [p for _, p in named], "param_names": [n for n, _ in named]}


def named(group: dict, model: nn.Module) -> dict:
    """The group with the names that its parameters have in the model, if it came without.

    Raises:
        ValueError: the model does not have one of them.
    """
    if "param_names" in group:
        return group
    names = {id(p): n for n, p in model.named_parameters()}
    members = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    if not all(id(p) in names for p in members):
        raise ValueError("the group holds parameters that the model does not have")
    return group | {"params": members, "param_names": [names[id(p)] for p in members]}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated modules, by name, in registration order."""
    return dict(_stacks(model, ""))


def _stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_stack(module, root=not prefix):
            if any(True for _ in child.parameters()):
                yield path, child
        else:
            yield from _stacks(child, f"{path}.")


def _is_stack(module: nn.Module, root: bool) -> bool:
    """A list of composite modules, a sequence of alike composite modules, or a root ``nn.Sequential``."""
    children = [c for c in module.children() if any(True for _ in c.parameters())]
    composite = bool(children) and all(any(True for _ in c.children()) for c in children)
    if isinstance(module, nn.ModuleList):
        return composite
    if isinstance(module, nn.Sequential):
        return root or (composite and len(children) > 1 and len({type(c) for c in children}) == 1)
    return False


def _by_block(model: nn.Module) -> dict[str, str]:
    """Unit name of every parameter, units in registration order."""
    stacks = blocks(model)
    if not stacks:
        return {n: n.split(".")[0] if "." in n else "model" for n, _ in model.named_parameters()}
    owner = {n: _owner(n, stacks) for n, _ in model.named_parameters()}
    inside = [i for i, block in enumerate(owner.values()) if block]
    following, names = "head", dict[str, str]()
    for i, n in reversed(list(enumerate(owner))):
        following = owner[n] or following
        before, after = i < inside[0], i > inside[-1]
        names[n] = owner[n] or ("embeddings" if before else "head" if after else following)
    return {n: names[n] for n in owner}


def _owner(name: str, stacks: dict[str, nn.Module]) -> str:
    return next((b for b in stacks if name.startswith(f"{b}.")), "")


def _by_count(model: nn.Module, count: int) -> dict[str, str]:
    """Consecutive blocks share a unit; the first takes the embeddings, the last the head."""
    names = _by_block(model)
    stack = [u for u in dict.fromkeys(names.values()) if u not in ("embeddings", "head")]
    if not 1 <= count <= len(stack):
        raise ValueError(f"by={count}: this model has {len(stack)} blocks, so by must be 1 to {len(stack)}")
    place = {u: f"group{i * count // len(stack)}" for i, u in enumerate(stack)}
    place |= {"embeddings": "group0", "head": f"group{count - 1}"}
    return {n: place[u] for n, u in names.items()}


def _by_pattern(trainable: Mapping[str, torch.Tensor], patterns: Sequence[str]) -> dict[str, str]:
    names = {n: next((p for p in patterns if re.search(p, n)), "rest") for n in trainable}
    missing = [p for p in patterns if p not in names.values()]
    if missing:
        raise ValueError(f"no trainable parameter is matched by {missing}: names look like {next(iter(names))!r}")
    order = [*patterns, "rest"]
    return dict(sorted(names.items(), key=lambda item: order.index(item[1])))


def observed(groups: Sequence[dict], position: Callable[[torch.Tensor], str]) -> list[list[str]]:
    """Parameter names of every group, once the forward has shown what runs before, between and behind the blocks."""
    names: dict[str, list[str]] = {g["name"]: [] for g in groups}
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            seen = position(p) if p.grad is not None else group["name"]
            names[seen if seen in names else group["name"]].append(name)
    return list(names.values())


def boundaries(model: nn.Module) -> list[nn.Module]:
    """The blocks, and the largest modules beside them that contain none: a forward is a run of their calls."""
    stacks = set(map(id, blocks(model).values()))

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            holds_block = any(id(m) in stacks for m in child.modules() if m is not child)
            container = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if id(child) in stacks or not (holds_block or container):
                yield child
            else:
                yield from walk(child)

    return list(dict.fromkeys(walk(model)))
