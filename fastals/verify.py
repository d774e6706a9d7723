"""Find out for which units cached trials equal full forwards.

A memo of calls cannot see what a call leaves outside of its module (features that a hook keeps, a list), nor what it
reads besides its arguments and its module (a weight through a reference). So a cached trial is compared with a full
forward, in loss and outputs, at weights of the unit that have really moved, after a forward at other weights has
disturbed whatever a replayed call may have left.
"""

import random
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastals.errors import CheckError
from fastals.losses import Losses
from fastals.repeatable import AGAIN
from fastals.schedule import Batch
from fastals.shards import local

Moves = dict[str, list[Tensor]]  # parameters that a trial moves, by the name of their unit
MOST_SEQUENCES = 8  # sequences of calls that are verified; a model with more (layer drop) is looked at now and then
SPOT_CHECKS = 1 / 128  # part of the steps that verify one unit again: under 1 % of the time
DISTURBING, MOVING = 4.0, 0.5  # noise, relative to the weights: it must show in a loss of low precision
SHARES = (1.0, 1 / 16, 1 / 256)  # of this noise, until the closure raises no error
LOOK_AT = (
    "Look for what a module leaves behind or reads besides its arguments: features kept by hooks, attributes that are "
    "no tensors, outputs of layers inside a block (attentions, router logits), weights of other modules"
)


def inspect(batch: Batch) -> None:
    """Verify the units without a verdict, all of them after a new sequence of calls; now and then one unit again."""
    losses = batch.losses
    if losses.cache is None or not losses.cache.records or losses.learned.gradients:
        return
    moves: Moves = {unit.name: unit.active_params() for unit in batch.units}
    if losses.unseen and losses.learned.looks < MOST_SEQUENCES:
        losses.learned.looks += 1
        losses.learned.sequences.add(losses.cache.sequence)
        _warn_of_obstacles(losses)
        _verify(batch, moves)
        return
    missing = {name: params for name, params in moves.items() if name not in losses.learned.trusted}
    if missing:
        _verify(batch, missing)
        return
    draw, trusted = random.Random(f"{batch.seed}-spot"), [name for name in moves if losses.learned.trusted[name]]
    if trusted and draw.random() < SPOT_CHECKS:
        name = draw.choice(trusted)
        _verify(batch, {name: moves[name]})


def _verify(batch: Batch, moves: Mapping[str, Sequence[Tensor]]) -> None:
    """Enter the verdicts on these units; warn of a unit that loses its trust.

    A closure may refuse weights so far from w_t. An error that comes again at the same weights makes the noise smaller,
    any other one leaves the step.
    """
    for share in SHARES:
        error = _error(batch, moves, share)
        if error is None:
            return
        if isinstance(error, CheckError) or share == SHARES[-1] or _error(batch, moves, share) is None:
            raise error


def _error(batch: Batch, moves: Mapping[str, Sequence[Tensor]], share: float) -> Exception | None:
    """The error of a comparison, after which all units are put back."""
    try:
        _compare(batch, moves, share)
    except Exception as error:
        if batch.losses.processes.leaves(error):
            raise
        batch.rewind()
        return error
    return None


def _compare(batch: Batch, moves: Mapping[str, Sequence[Tensor]], share: float) -> None:
    """Compare a cached trial of each unit with a full forward, both at weights moved by this share of the noise.

    Before that a replay at w_t shows whether calls leave something outside, on the path that the closure takes there.
    """
    losses, counted = batch.losses, batch.losses.forwards
    assert losses.cache is not None
    batch.hold()
    with losses.waiting():
        cached, everything = {}, [p for unit in batch.units for p in unit.active_params()]
        start = losses.full()
        _nudge(everything, share * DISTURBING)
        losses.full()
        batch.rewind()
        losses.note_effects(start.difference(losses.cached(AGAIN, ()), losses.cache.names))
        for name, params in reversed(list(moves.items())):  # top down: no trial touches what those after it replay
            _nudge(params, share * MOVING)
            cached[name] = losses.cached(name, params)
            batch.rewind()
        for name, params in moves.items():
            _nudge(params, share * MOVING)
            full = losses.full()
            batch.rewind()
            _judge(losses, name, full.difference(cached[name], losses.cache.names))
    losses.forwards = counted


def _judge(losses: Losses, name: str, difference: str) -> None:
    """Enter a verdict.

    Raises:
        RuntimeError: there is a difference, and ``cache="check"`` asks for an error.
    """
    if losses.processes.any(bool(difference))[0]:
        difference = difference or "they differ in another process"
    if difference and losses.check:
        raise CheckError(name, f"{difference}. {LOOK_AT}")
    if difference and losses.learned.trusted.get(name, True):
        warnings.warn(
            f"fastals: trials of unit {name!r} run without the activation cache: {difference}. {LOOK_AT}", stacklevel=2
        )
    losses.learned.trusted[name] = not difference


def _warn_of_obstacles(losses: Losses) -> None:
    """Say which calls run in every trial, and why; those of modules without weights, as a pooling, cost nothing."""
    assert losses.cache is not None
    for call in losses.cache.records.values():
        if next(call.module.parameters(), None) is None:
            continue
        why = call.obstacle or ("" if call.output_stands(losses.cache.stamps) else "its output is changed in place")
        if why and why not in losses.learned.obstacles:
            losses.learned.obstacles.add(why)
            name = losses.cache.names[id(call.module)]
            warnings.warn(f"fastals: calls of {name!r} are computed in every trial: {why}", stacklevel=2)


def _nudge(params: Sequence[Tensor], scale: float) -> None:
    """Add noise to weights, always the same; ``scale`` is relative to their mean absolute value."""
    for p in params:
        generator = torch.Generator(p.device).manual_seed(0)
        weights = local(p.detach())
        noise = torch.empty_like(weights, requires_grad=False).uniform_(-1, 1, generator=generator)
        weights.add_(noise * (scale * (weights.abs().mean() + 0.1)))
