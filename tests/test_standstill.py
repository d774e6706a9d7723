"""Units that do not move are named, once, and without a wait for the device in every step."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from helpers.fused import CUDA, BrokenError, optimizer
from torch import nn

import fastals
from fastals import device
from fastals.report import EXHAUSTED, NOT_DESCENT, StepReport, UnitReport
from fastals.reports import KEPT_REPORTS
from fastals.standstill import PATIENCE, Standstill

KINDS = ["plain", "fused"]
HOOKS = {"flipped": -1.0, "zero": 0.0, "nan": math.nan}  # what the gradient of one unit is multiplied by
OUTCOMES = {"flipped": EXHAUSTED, "zero": NOT_DESCENT, "nan": NOT_DESCENT}


def stuck(name="flipped", kind="plain", **options):
    """A model of two units, of which the first does not move, with its optimizer and closure."""
    if kind == "fused":
        pytest.importorskip("triton")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(CUDA)
    for p in model[0].parameters():
        p.register_hook(lambda g: g * HOOKS[name])
    opt = optimizer(kind, model, by=["0.", "1."], **({"schedule": "sweep", "max_trials": 2} | options))
    x = torch.randn(16, 4, device=CUDA)
    return model, opt, lambda: (model(x) - x.sum(1, keepdim=True)).square().mean()


def warned(action):
    """What fastals has warned of in an action."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if str(w.message).startswith("fastals")]


def moved(*sizes, outcome=EXHAUSTED):
    """A report of a step of units a, b, … that have moved by these sizes."""
    units = [UnitReport(name, size, 1.0, 1, outcome) for name, size in zip("abc", sizes, strict=False)]
    return StepReport(1.0, 1.0, units)


def test_a_unit_is_named_once_until_it_moves_again():
    standstill, seen = Standstill(), []
    for size in [0.0] * 50 + [0.1] + [0.0] * 50:
        seen.append(warned(lambda: standstill.note(moved(size, 0.1))))  # noqa: B023
    assert [t for t, words in enumerate(seen) if words] == [PATIENCE - 1, 50 + PATIENCE]
    assert "'a' (exhausted)" in seen[PATIENCE - 1][0]
    assert "'b'" not in seen[PATIENCE - 1][0]


def test_units_that_stand_still_together_are_named_together_by_outcome():
    standstill = Standstill()
    for _ in range(PATIENCE - 1):
        standstill.note(moved(0.0, 0.0, 0.0))
    words = warned(lambda: standstill.note(moved(0.0, 0.0)))
    assert len(words) == 1
    assert "'a', 'b' (exhausted)" in words[0]
    words = warned(lambda: standstill.note(moved(0.1, 0.1, 0.0, outcome=NOT_DESCENT)))
    assert len(words) == 1, "a unit counts the steps in which it takes part"
    assert "'c' (not_descent)" in words[0]


def test_steps_at_rest_do_not_count_and_do_not_start_the_count_again():
    standstill = Standstill()
    for _ in range(PATIENCE - 1):
        standstill.note(moved(0.0))
    assert not warned(lambda: [standstill.note(moved(0.0), {"a"}) for _ in range(PATIENCE)])
    assert len(warned(lambda: standstill.note(moved(0.0)))) == 1
    assert not warned(lambda: standstill.note(moved(0.0), {"a"}))


@pytest.mark.parametrize("name", HOOKS)
def test_the_step_in_which_the_patience_ends_names_the_unit_and_its_outcome(name):
    _, opt, closure = stuck(name)
    words = [warned(lambda: opt.step(closure)) for _ in range(PATIENCE + 10)]
    assert [t for t, w in enumerate(words) if w] == [PATIENCE - 1]
    assert f"'0.' ({OUTCOMES[name]})" in words[PATIENCE - 1][0]
    assert opt.report.units[1].step_size > 0


def test_the_relay_names_all_units_that_one_wrong_gradient_holds():
    _, opt, closure = stuck(schedule="relay", c=0.9)
    (words,) = warned(lambda: [opt.step(closure) for _ in range(PATIENCE + 5)])
    assert "'0.'" in words
    assert all(u.outcome in words for u in opt.report.units if not u.step_size)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("kind", KINDS)
def test_lr_of_zero_is_no_standstill(kind):
    """At a warm-up, or at the end: the default filters of these tests raise every warning."""
    _, opt, closure = stuck("zero", kind)
    for t in range(2 * PATIENCE):
        opt.param_groups[0]["lr"] = 0.0
        opt.param_groups[1]["lr"] = float(t >= PATIENCE)
        opt.step(closure)
        assert opt.report.units[0].outcome == NOT_DESCENT


@pytest.mark.slow
def test_on_the_device_reports_are_read_once_before_the_oldest_goes(monkeypatch):
    _, opt, closure = stuck("zero", "fused")
    reads, plain = [0], device._read
    monkeypatch.setattr(device, "_read", lambda *a: (reads.append(reads[-1] + 1), plain(*a))[1])
    words, losses = [], []
    for _ in range(KEPT_REPORTS + 2):
        words.append(warned(lambda: losses.append(float(opt.step(closure)))))
        assert reads[-1] == len(losses) // KEPT_REPORTS * KEPT_REPORTS
    assert [t for t, w in enumerate(words) if w] == [KEPT_REPORTS - 1]
    assert "'0.' (not_descent)" in words[KEPT_REPORTS - 1][0]
    assert [r.loss_before for r in opt.reports] == losses[-KEPT_REPORTS:]
    assert reads[-1] == len(losses)


def test_on_the_device_the_warning_comes_when_reports_are_read():
    _, opt, closure = stuck("flipped", "fused")
    assert not warned(lambda: [opt.step(closure) for _ in range(PATIENCE)])
    (words,) = warned(lambda: opt.report)
    assert "'0.' (exhausted)" in words
    assert not warned(lambda: opt.reports)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_undone_does_not_count_and_leaves_no_report(kind):
    _, opt, closure = stuck("zero", kind)
    for _ in range(PATIENCE - 1):
        opt.step(closure)
    before, calls = opt.reports, itertools.count()

    def broken():
        if next(calls) == 2:
            raise BrokenError
        return closure()

    with pytest.raises(BrokenError):
        opt.step(broken)
    assert opt.reports == before
    assert len(before) == opt.param_groups[0]["count"] == PATIENCE - 1
    assert len(warned(lambda: (opt.step(closure), opt.report))) == 1


def test_a_warning_that_is_raised_as_an_error_leaves_the_step_made():
    model, opt, closure = stuck("zero")
    for _ in range(PATIENCE - 1):
        opt.step(closure)
    before = float(closure().detach())
    with pytest.raises(UserWarning, match="have not moved"):
        opt.step(closure)
    assert opt.param_groups[0]["count"] == len(opt.reports) == PATIENCE
    assert opt.report.loss_before == before
    assert float(closure().detach()) == opt.report.loss_after < before
    assert int(opt.state[model[1].weight]["step"]) == PATIENCE
    opt.step(closure)


def test_a_copy_goes_on_counting():
    model, opt, closure = stuck("zero")
    for _ in range(PATIENCE - 1):
        opt.step(closure)
    twin, again = copy.deepcopy((model, opt))
    x = torch.randn(16, 4, device=CUDA)
    assert isinstance(again, fastals.ALS)
    twin[0].requires_grad_().zero_grad()
    for p in twin[0].parameters():
        p.register_hook(lambda g: g * 0)
    assert len(warned(lambda: again.step(lambda: twin(x).square().mean()))) == 1
