r"""The Armijo test on the device: scalar programs in float64 over the rows of the arena; no number visits the host.

They compute the same as :class:`fastals.search.Search`, their plain version: a step η is accepted iff

    f(w − η d) ≤ R − c η s

and multiplied by the backtracking factor otherwise; the last rejection puts the unit back. If rounding hides a
decrease of c η s, f(w − η d) ≤ R is enough. A NaN loss is a rejection, and the programs count the trials, so every
loop on ``go`` ends. In a step whose f(w_t) is not finite (``refused``) nothing is tried and nothing is learned.
"""

import torch
import triton
from torch import Tensor

from fastals.kernels.all_units import (
    begin_kernel,
    follow_kernel,
    judge_together_kernel,
    open_together_kernel,
    remember_kernel,
    restore_kernel,
)
from fastals.kernels.arena import Arena
from fastals.kernels.one_unit import judge_kernel, open_kernel, put_back_kernel
from fastals.kernels.table import SCALAR


def _padded(arena: Arena) -> int:
    return triton.next_power_of_2(arena.units + 1)


def begin(arena: Arena, loss: Tensor) -> None:
    """Start a mini-batch at f(w_t) = ``loss``, a 0-d tensor on the device."""
    begin_kernel[(1,)](
        state=arena.state,
        flags=arena.flags,
        loss=loss,
        units=arena.units,
        eps=torch.finfo(loss.dtype).eps,
        UP=_padded(arena),
        **SCALAR,
    )


def open_search(arena: Arena, unit: int, *, tested: bool, keep: bool = False) -> None:
    """Aim the unit and set its first step; with ``keep`` its remembered step, untested."""
    open_kernel[(1,)](
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        rounding=arena.rounding,
        sums=arena.sums,
        flags=arena.flags,
        unit=unit,
        units=arena.units,
        TESTED=tested,
        KEEP=keep,
        UP=_padded(arena),
        **SCALAR,
    )


def judge(arena: Arena, unit: int, loss: Tensor) -> None:
    """Accept or shrink the unit's step by the loss of its trial."""
    judge_kernel[(1,)](
        state=arena.state,
        rules=arena.rules,
        lead=arena.lead,
        flags=arena.flags,
        loss=loss,
        unit=unit,
        units=arena.units,
        **SCALAR,
    )


def put_back(arena: Arena, unit: int) -> None:
    """Ask for the unit to stand at w_t again; the result of its search stays in its row."""
    put_back_kernel[(1,)](state=arena.state, unit=unit, units=arena.units, **SCALAR)


def open_together(arena: Arena) -> None:
    """Start the joint test of all steps found."""
    open_together_kernel[(1,)](
        state=arena.state,
        rules=arena.rules,
        lead=arena.lead,
        flags=arena.flags,
        units=arena.units,
        UP=_padded(arena),
        **SCALAR,
    )


def judge_together(arena: Arena, unit: int, loss: Tensor, *, once: bool) -> None:
    """Accept or shrink the common factor, by the rules of ``unit``.

    ``once`` tries the factor 1 only and credits every unit with its part.
    """
    judge_together_kernel[(1,)](
        state=arena.state,
        rules=arena.rules,
        lead=arena.lead,
        flags=arena.flags,
        loss=loss,
        unit=unit,
        units=arena.units,
        ONCE=once,
        UP=_padded(arena),
        **SCALAR,
    )


def follow(arena: Arena) -> None:
    """Ask for every move to be made along the averaged direction."""
    follow_kernel[(1,)](state=arena.state, units=arena.units, UP=_padded(arena), **SCALAR)


def restore(arena: Arena) -> None:
    """Ask for every unit to be put back to w_t, if a step is under way."""
    restore_kernel[(1,)](state=arena.state, units=arena.units, UP=_padded(arena), **SCALAR)


def remember(arena: Arena) -> None:
    """Write the memory of all units and this step's row of the history."""
    remember_kernel[(1,)](
        state=arena.state,
        memory=arena.memory,
        rules=arena.rules,
        lead=arena.lead,
        history=arena.history,
        step=arena.step,
        units=arena.units,
        UP=_padded(arena),
        **SCALAR,
    )
