"""Steps that are disturbed at some of their places; ``tests/interruptions.py`` disturbs them at all."""

import contextlib

import pytest
import torch
from helpers.interruptions import SETUPS, Visits, handled

from fastals import optimizer
from fastals.host import HostBatch
from fastals.losses import Losses

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="visits are forks, which CUDA does not survive")
PLACES = [  # a set-up, a kind of points, and how many of them are visited
    ("relay", "evaluations", 16), ("relay", "operations", 24), ("relay", "allocations", 12), ("relay", "lines", 32),
    ("relay", "lines after ctrl-c", 8), ("first step", "evaluations", 4), ("first step", "operations", 3),
    ("first step", "lines", 2), ("sweep", "operations", 12), ("sweep", "lines", 4), ("bfloat16", "operations", 16),
    ("bfloat16", "evaluations", 8), ("independent", "operations", 8), ("joint", "allocations", 8),
    ("joint", "lines", 4), ("kept", "operations", 8), ("cycle", "evaluations", 8), ("fused between", "evaluations", 1),
    ("fused between", "launches", 3), ("captured", "pieces", 2),
]  # fmt: skip


def faults(case, kind, most):
    """What is wrong after some visits, evenly spread over the points and the ways of this kind."""
    with handled():
        visits = Visits(case, kind)
        pairs = visits.pairs(every=False)
        stride = max(1, len(pairs) // most) | 1  # odd, so that every way has its turn
        outcomes = visits(pairs[::-stride])
    assert outcomes
    return [(visits.where[n], action, found) for (n, action), found in outcomes.items() if found.fault]


@pytest.mark.parametrize(("setup", "kind", "most"), PLACES, ids=lambda value: str(value).replace(" ", "-"))
def test_a_disturbed_step_is_as_before_or_made(setup, kind, most):
    if "fused" in setup or "captured" in setup:
        pytest.importorskip("triton")
    with handled():
        case = SETUPS[setup]()
    assert not faults(case, kind, most)


def allocating(plain):
    def commit(batch, state):
        plain(batch, state)
        torch.zeros(())

    return commit


#: Faults of a step: what is replaced, by what, and where it shows.
PLANTED = {
    "generators stay": (Losses, "undoing", lambda plain: lambda losses: plain(losses)[:-1], "evaluations"),
    "weights stay": (HostBatch, "restore", lambda plain: lambda batch: None, "operations"),
    "the commit allocates": (HostBatch, "commit", allocating, "allocations"),
    "nothing is held back": (optimizer, "held_back", lambda plain: contextlib.nullcontext, "lines"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_visits_find_what_is_wrong_with_a_step(planted, monkeypatch):
    place, name, changed, kind = PLANTED[planted]
    case = SETUPS["relay"]()
    monkeypatch.setattr(place, name, changed(getattr(place, name)))
    assert faults(case, kind, 24 if kind == "lines" else 12)
