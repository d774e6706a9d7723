"""One set-up trained in four ways: cached, uncached, with a checked cache, and by the eager baseline.

All start alike and see the same mini-batches. Step by step the first is compared with plain passes of a twin, which
knows nothing of fastals, and the others with the first.
"""

import math
import random
import re
from contextlib import contextmanager, nullcontext
from itertools import islice

import numpy as np
import torch
from helpers.random_models import batches, build, closures
from helpers.side_by_side import assert_same_step, hand_over
from helpers.states import (
    assert_all_same,
    comparable,
    footprint,
    gradients,
    put,
    put_rest,
    rest,
    set_generators,
    trained,
    warnings_of_fastals,
)

import fastals
from fastals.eager import EagerALS
from fastals.errors import CheckError

STEPS = 3


class FaultError(AssertionError):
    """A way of training did what it must not do."""


@contextmanager
def blamed_on(way):
    """Say in which way and step something has failed."""
    try:
        yield
    except Exception as error:
        raise FaultError(f"{way}: {type(error).__name__}: {error}") from error


def plain_pass(case, model, batch, *, backward=False):
    """The loss of a mini-batch by plain passes, with gradients if asked for."""
    losses = []
    with torch.set_grad_enabled(backward or "slope" in case.closure):
        for closure in closures(case, model, *batch):
            losses.append(closure())
            if backward:
                losses[-1].backward()
    return float(sum((loss.detach() for loss in losses[1:]), losses[0].detach()))


class Way:
    """A model with an optimizer of fastals; ``groups`` gives the names of its units and of their parameters."""

    def __init__(self, case, cache, groups=None):
        self.case, self.model, self.cache = case, build(case), cache
        units = self.model if groups is None else named(groups, self.model)
        self.opt = fastals.ALS(units, model=self.model, cache=cache, **case.options)
        self.footprint, self.warned = footprint(self.model), []

    def step(self, batch, start):
        """One step from this state of generators, buffers and frozen weights; returns what it has left."""
        set_generators(start["generators"])
        loss = given_loss(self.case, self.opt, self.model, batch, start)
        with warnings_of_fastals() as caught:
            value = self.opt.step(closures(self.case, self.model, *batch), loss)
        self.warned += [str(w.message) for w in caught]
        assert footprint(self.model) == self.footprint, "the step has left something on the model"
        return {"report": self.opt.report.as_dict() | {"f(w_t)": float(value)}, **left(self.model)}


def named(groups, model):
    """Groups of these names, of the parameters of another model."""
    own = dict(model.named_parameters())
    return [{"name": name, "param_names": names, "params": [own[n] for n in names]} for name, names in groups]


def given_loss(case, opt, model, batch, start):
    """The loss and its gradients by the caller, who leaves everything else as it was; None if the step takes them."""
    if not case.given:
        return None
    opt.zero_grad()
    loss = plain_pass(case, model, batch, backward=True)
    put_rest(model, start)
    return loss


def left(model):
    return {"weights": trained(model), "gradients": gradients(model)} | comparable(rest(model))


def train(case, steps=STEPS):
    """Train the set-up in all ways.

    Raises:
        FaultError: one of them went wrong.
    """
    seed = case.seed
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    first, twin, others, eager = Way(case, cache=True), build(case), [], None
    for i, batch in enumerate(islice(batches(case), steps)):
        weights, start = trained(first.model), rest(first.model)
        with blamed_on(f"step {i}, cached"):
            found = first.step(batch, start)
            check_against_plain_passes(first, found, twin, batch, weights, start)
        if not i:
            groups = [(g["name"], g["param_names"]) for g in first.opt.param_groups]
            others = [Way(case, cache=False, groups=groups), Way(case, cache="check", groups=groups)]
            eager = Eager(case, groups) if case.dtype in ("float32", "float64") else None
        end = rest(first.model)["generators"]
        for way in list(others):
            with blamed_on(f"step {i}, cache={way.cache!r}"):
                if not goes_along(way, batch, start, first.warned, found):
                    others.remove(way)
        if eager is not None:
            with blamed_on(f"step {i}, eager"):
                eager.step(batch, start, first)
        set_generators(end)


def goes_along(way, batch, start, warned, found):
    """Make the step in another way and compare what it leaves; False if the way ends here for a good reason.

    It may refuse what the first has warned of. Without the cache nobody sees in which order a step calls the modules,
    so where that varies the units may be searched in another order.
    """
    weights = trained(way.model)
    try:
        made = way.step(batch, start)
        if not way.cache and reordered(way.case, made["report"], found["report"]):
            return False
        assert_all_same(made, found)
    except CheckError as error:
        unit = re.search("unit '.*?'", str(error)).group()
        if not any(f"{unit} run without the activation cache" in warning for warning in warned):
            raise
        before = {"weights": weights} | comparable(start)
        assert_all_same({part: left(way.model)[part] for part in before}, before)
        return False
    return True


def reordered(case, report, other):
    """Whether modules are left out now and then, and the units of two reports are in another order."""
    names, theirs = ([unit["name"] for unit in r["units"]] for r in (report, other))
    varies = any(spec.glue in ("skips", "tosses") or spec.kind == "numpy draw" for spec in case.blocks)
    varies |= case.closure in ("self-conditioning", "rollout")
    return varies and names != theirs and sorted(names) == sorted(theirs)


def check_against_plain_passes(way, found, twin, batch, weights, start):
    """What the step reports and leaves is what plain passes of the twin give."""
    case, report = way.case, way.opt.report
    put(twin, weights, start)
    twin.zero_grad()
    before = plain_pass(case, twin, batch, backward=True)
    expected = comparable(start if case.given else rest(twin)) | {"gradients": gradients(twin)}
    assert_all_same({part: found[part] for part in expected}, expected)
    put(twin, found["weights"], start)
    after = plain_pass(case, twin, batch)
    assert report.loss_before == before, f"f(w_t) is {report.loss_before}, by a plain pass {before}"
    if math.isnan(report.loss_after):
        return
    assert report.loss_after == after, f"the loss after the step is {report.loss_after}, by a plain pass {after}"
    if case.options["reference"] == "monotone":
        dtype = torch.float32 if case.dtype == "autocast" else getattr(torch, case.dtype)
        required = sum(case.options["c"] * u.step_size * u.slope for u in report.units if dtype.itemsize > 2)
        hidden = len(report.units) * torch.finfo(dtype).eps / 2 * abs(before)  # decreases that a loss cannot show
        assert after <= before - required + hidden + 1e-14, f"from {before} to {after} by steps worth {required}"


class Eager:
    """The eager baseline, which goes on from the cached way after each step.

    It holds torch's generator only, so each of its evaluations is told to start from the state of the step. It rounds
    otherwise than the fast path, and one weight that is rounded to bfloat16 the other way would change a whole loss: so
    it takes part in float32 and float64 only.
    """

    def __init__(self, case, groups):
        self.case, self.model = case, build(case)
        self.opt = EagerALS(named(groups, self.model), **case.options)

    def step(self, batch, start, fast):
        """The step of the fast path once more, and its decisions compared."""
        set_generators(start["generators"])
        put_rest(self.model, start)
        loss = given_loss(self.case, self.opt, self.model, batch, start)
        first, *more = closures(self.case, self.model, *batch)

        def restarted():
            put_rest(self.model, start)
            return first()

        def differentiable(closure):
            with torch.enable_grad() if "slope" in self.case.closure else nullcontext():
                return closure()

        self.opt.step([lambda c=c: differentiable(c) for c in (restarted, *more)], loss)
        if not reordered(self.case, self.opt.report.as_dict(), fast.opt.report.as_dict()):
            assert_same_step(fast.opt.report, self.opt.report, rtol=1e-5)
        hand_over(fast.opt, self.opt)
