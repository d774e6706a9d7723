"""Cut a model into units: parameter groups whose step sizes are searched one by one.

The transformer blocks are the entries of the outermost module lists; no model is known by name.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn


class Groups(list[dict]):
    """Parameter groups that know the model they were cut from."""

    def __init__(self, groups: Iterable[dict], model: nn.Module) -> None:
        super().__init__(groups)
        self.model = model


def units(model: nn.Module, by: str | int | Sequence[str] = "block") -> Groups:
    """Parameter groups ``{"name", "params", "param_names"}`` in forward order, ready for :class:`fastals.ALS`.

    The groups know their model, so ``ALS(fastals.units(model))`` caches its activations like ``ALS(model)``.

    Args:
        model: any module; only parameters with ``requires_grad`` are taken.
        by: ``"block"``: embeddings, each transformer block, head. ``"model"``: one unit.
            An integer n: n groups of consecutive blocks, embeddings in the first and head in the last.
            A sequence of regular expressions: one unit per pattern, and one named ``rest`` for parameters that no
            pattern matches. A parameter goes to the first pattern that matches its name.

    Raises:
        ValueError: no trainable parameter, more groups than blocks, or a pattern that matches nothing.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: set requires_grad on those to train")
    unit_of = _unit_names(model, trainable, by)
    members = {unit: [n for n in trainable if unit_of[n] == unit] for unit in dict.fromkeys(unit_of.values())}
    return Groups((group(unit, [(n, trainable[n]) for n in ns]) for unit, ns in members.items() if ns), model)


def _unit_names(model: nn.Module, trainable: Mapping[str, Tensor], by: str | int | Sequence[str]) -> dict[str, str]:
    """The unit of every parameter, by name; parameter groups follow the order of the units here."""
    if by == "block":
        return _by_block(model)
    if by == "model":
        return dict.fromkeys(trainable, "model")
    if isinstance(by, int) and not isinstance(by, bool):
        return _by_count(model, by)
    if isinstance(by, Sequence) and not isinstance(by, str):
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
    names = {id(p): n for n, p in model.named_parameters()}
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if not all(id(p) in names for p in members):
        raise ValueError("the group holds parameters that the model does not have")
    return group | {"params": members, "param_names": [names[id(p)] for p in members]}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated modules, by name, in registration order."""
    return dict(_stacked(model, ""))


def _stacked(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of the blocks below ``module``; nothing inside a block is a block."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_stack(module, root=not prefix):
            if any(True for _ in child.parameters()):
                yield path, child
        else:
            yield from _stacked(child, f"{path}.")


def _is_stack(module: nn.Module, root: bool) -> bool:
    """Whether the children are blocks.

    They are in a list of composite modules, in a sequence of composite modules of one type, and in a ``Sequential``
    that is the whole model.
    """
    children = [c for c in module.children() if any(True for _ in c.parameters())]
    composite = bool(children) and all(any(True for _ in c.children()) for c in children)
    if isinstance(module, nn.ModuleList):
        return composite
    if isinstance(module, nn.Sequential):
        return root or (composite and len(children) > 1 and len({type(c) for c in children}) == 1)
    return False


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
    unit_of = {n: next((p for p in patterns if re.search(p, n)), "rest") for n in trainable}
    unmatched = [p for p in patterns if p not in unit_of.values()]
    if unmatched:
        raise ValueError(f"no trainable parameter is matched by {unmatched}: names look like {next(iter(unit_of))!r}")
    order = [*patterns, "rest"]
    return dict(sorted(unit_of.items(), key=lambda item: order.index(item[1])))


def observed(groups: Sequence[dict], position: Callable[[Tensor], str]) -> list[list[str]]:
    """Parameter names of every group, with each parameter in the group in which a forward pass first used it.

    ``position`` gives the group's name for a parameter that has a gradient. A parameter without one, or with a
    position that is no group, stays in its group.
    """
    members: dict[str, list[str]] = {g["name"]: [] for g in groups}
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            unit = position(p) if p.grad is not None else group["name"]
            members[unit if unit in members else group["name"]].append(name)
    return list(members.values())


def boundaries(model: nn.Module) -> list[nn.Module]:
    """The blocks, and the largest modules outside them that hold no block; a forward pass calls these one by one."""
    stack = set(map(id, blocks(model).values()))

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            holds_block = any(id(m) in stack for m in child.modules() if m is not child)
            container = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if id(child) in stack or not (holds_block or container):
                yield child
            else:
                yield from walk(child)

    return list(dict.fromkeys(walk(model)))
