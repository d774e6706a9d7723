"""Random models and losses: no evaluation of a step may differ from a plain forward, and no step may leave a trace.

Each loss that a step sees is compared, bitwise, with that of a twin: another model, built from the same description,
with the weights of the moment and otherwise as everything stood before the step. The twin knows nothing of fastals.
"""

import copy
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers.random_models import (
    ALIASING,
    ARGUMENTS,
    BEHIND_COUNTERS,
    CLOSURES,
    DRAWING,
    GLUES,
    HIDDEN,
    KINDS,
    SHARING,
    WRITING,
    batches,
    build,
    cases,
    evaluate,
)
from helpers.states import (
    assert_all_same,
    comparable,
    footprint,
    generators_held,
    gradients,
    put,
    rest,
    trained,
    warnings_of_fastals,
)
from helpers.tiny import assert_same
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fastals

STEPS = 4
PURE = DRAWING | ARGUMENTS | SHARING | {k: ALIASING[k] for k in ("tuple", "dict", "list")}


def many(examples):
    """So many models, the same ones in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# The twin and the watch over a step


@dataclass
class Wrong:
    """An evaluation that went wrong: where, what the step saw, and what a full forward gives."""

    number: int
    weights: bytes
    seen: object
    true: float

    @property
    def raised(self):
        return isinstance(self.seen, BaseException)

    def __str__(self):
        return f"evaluation {self.number} gave {self.seen!r}, a full forward {self.true!r}"


@dataclass
class Watch:
    """The closure of one step, which compares all that it returns with the twin.

    ``fails`` maps an evaluation to an error and the place where it is raised.
    """

    case: object
    model: torch.nn.Module
    twin: torch.nn.Module
    batch: tuple
    fails: dict = field(default_factory=dict)

    def __post_init__(self):
        self.before = rest(self.model)
        self.truths, self.right, self.wrong, self.count, self.first = {}, set(), [], -1, b""

    def __call__(self):
        self.count += 1
        weights = trained(self.model)
        key = b"".join(w.contiguous().view(torch.uint8).numpy().tobytes() for w in weights.values())
        self.first = self.first or key
        if key not in self.truths:
            self.truths[key] = self.truth(weights)
        true = self.truths[key]
        error, place = self.fails.get(self.count, (None, None))
        try:
            if place == "before":
                raise error
            self.model.fuse = error if place == "inside" else None
            loss = evaluate(self.case, self.model, *self.batch)
            if place == "after":
                raise error
        except BaseException as raised:
            if raised is not error:
                self.wrong.append(Wrong(self.count, key, raised, float(true)))
            raise
        finally:
            self.model.fuse = None
        if loss.dtype == true.dtype and torch.equal(loss.detach(), true):
            self.right.add(key)
        else:
            self.wrong.append(Wrong(self.count, key, loss.item(), true.item()))
        return loss

    def truth(self, weights):
        """The loss of a full forward at these weights."""
        with generators_held(), torch.set_grad_enabled("slope" in self.case.closure):
            put(self.twin, weights, self.before)
            return evaluate(self.case, self.twin, *self.batch).detach()

    def check(self, noticed):
        """Refuse wrong evaluations.

        Those by which fastals notices something are allowed, if the step has made a right one at the same weights:
        it notices by an error what a closure needs, by looking at w_t again what the loss reads, and with a warning
        what a memo cannot see. No trial is at w_t.
        """
        allowed = [
            w for w in self.wrong if w.weights in self.right and (noticed or w.raised or w.weights == self.first)
        ]
        left = [w for w in self.wrong if w not in allowed]
        assert not left, f"{len(left)} of {self.count + 1} evaluations are wrong: {left[0]}"


class Run:
    """A model under test, its twin and its optimizer."""

    def __init__(self, case, cache):
        torch.manual_seed(case.seed)
        random.seed(case.seed)
        np.random.seed(case.seed)
        self.case, self.model, self.twin, self.batches = case, build(case), build(case), batches(case)
        self.opt = fastals.ALS(self.model, cache=cache, **case.options)
        self.footprint = footprint(self.model)
        self.warned = []

    def step(self):
        """One step on the next mini-batch, with all that must hold before and after it."""
        batch = next(self.batches)
        loss = self.differentiate(batch) if self.case.given else None
        watch, weights = Watch(self.case, self.model, self.twin, batch), trained(self.model)
        given = gradients(self.model)
        start = watch.truth(weights)
        with warnings_of_fastals() as caught:
            try:
                value = self.opt.step(watch, loss)
            except Exception as error:
                watch.check(noticed=False)
                raise AssertionError("the step failed though no evaluation is wrong") from error
        self.warned += [str(w.message) for w in caught]
        watch.check(noticed=bool(self.warned))
        assert_same(value, start)
        self.check_report(watch, start)
        self.check_what_is_left(watch, weights, given)

    def differentiate(self, batch):
        """The loss and its gradients by the caller, who leaves everything else as it was."""
        weights, others = trained(self.model), rest(self.model)
        self.opt.zero_grad()
        loss = evaluate(self.case, self.model, *batch)
        loss.backward()
        put(self.model, weights, others)
        return loss.detach()

    def check_report(self, watch, start):
        report = self.opt.report
        assert report.loss_before == float(start)
        tested = self.case.options["momentum"] == "none" and all(u.outcome != "kept" for u in report.units)
        if tested:
            assert report.loss_after == float(watch.truth(trained(self.model)))

    def check_what_is_left(self, watch, weights, given):
        """Buffers, frozen weights, generators and gradients are as one plain forward and backward leaves them."""
        expected, grads = watch.before, given
        if not self.case.given:
            with generators_held():
                put(self.twin, weights, watch.before)
                self.twin.zero_grad()
                evaluate(self.case, self.twin, *watch.batch).backward()
                expected, grads = rest(self.twin), gradients(self.twin)
        assert_all_same(
            comparable(rest(self.model)) | {"gradients": gradients(self.model)},
            comparable(expected) | {"gradients": grads},
        )
        self.check_footprint()

    def check_footprint(self):
        assert footprint(self.model) == self.footprint
        assert not any({"forward", "_call_impl"} & set(m.__dict__) for m in self.model.modules())

    def failing_step(self, number, place, error, *, lasting):
        """A step in which this evaluation fails, and with ``lasting`` the later ones too: nothing may change."""
        batch = next(self.batches)
        loss = self.differentiate(batch) if self.case.given else None
        failing = range(number, 1000) if lasting else [number]
        watch = Watch(self.case, self.model, self.twin, batch, dict.fromkeys(failing, (error, place)))
        before, report, raised = self.everything(), self.opt.report, None
        with warnings_of_fastals() as caught:
            try:
                self.opt.step(watch, loss)
            except BaseException as outcome:
                raised = outcome
        self.warned += [str(w.message) for w in caught]
        if raised is not error:  # otherwise there was no time to make right what was found wrong
            watch.check(noticed=bool(self.warned))
        reached = watch.count >= number
        if raised is not (error if reached else None):
            raise AssertionError(f"the step ended with {raised!r}") from raised
        if reached:
            assert_all_same(self.everything(), before)
            assert self.opt.report is report
        self.check_footprint()

    def everything(self):
        state = {"weights": trained(self.model), "gradients": gradients(self.model)}
        return state | {"state": copy.deepcopy(self.opt.state_dict())} | comparable(rest(self.model))


def check(case, cache=True):
    run = Run(case, cache)
    for _ in range(STEPS):
        run.step()
    return run


# Losses and states


@many(30)
@given(cases(("plain",), closures=("one pass", "micro-batches", "without gradient")))
def test_plain_blocks(case):
    check(case)


@many(40)
@given(cases(DRAWING, glues=("plain", "dropout", "skips"), closures=("one pass", "micro-batches")))
def test_random_draws(case):
    check(case)


@pytest.mark.slow
@many(50)
@given(cases(WRITING, closures=("one pass", "micro-batches", "second in eval")))
def test_buffers_and_frozen_weights_that_the_forward_writes(case):
    check(case)


@many(50)
@given(cases(ALIASING, glues=("plain", "residual", "in place")))
def test_tensors_and_containers_that_others_write_to(case):
    check(case)


@many(50)
@given(cases((*SHARING, "peeking"), glues=("plain", "residual", "twice")))
def test_weights_with_several_users(case):
    check(case)


@pytest.mark.slow
@many(60)
@given(cases(HIDDEN, closures=("one pass", "micro-batches")))
def test_side_effects(case):
    check(case)


@many(40)
@given(cases(("plain", "list"), glues=("plain", *BEHIND_COUNTERS)))
def test_writes_behind_the_version_counters(case):
    check(case)


@pytest.mark.slow
@many(40)
@given(cases(ARGUMENTS, glues=("plain", "residual", "selects"), closures=("one pass", "micro-batches", "selection")))
def test_arguments_besides_the_activations(case):
    check(case)


@pytest.mark.slow
@many(60)
@given(cases(("plain", "dropout"), glues=GLUES))
def test_code_between_the_blocks(case):
    check(case)


@pytest.mark.slow
@many(70)
@given(cases(("plain", "dropout"), closures=tuple(CLOSURES)))
def test_closures(case):
    check(case)


@pytest.mark.slow
@many(100)
@given(cases(KINDS, glues=GLUES, closures=tuple(CLOSURES)))
def test_everything_at_once(case):
    check(case)


@many(40)
@given(cases(PURE, glues=("plain", "residual", "dropout", "twice", "skips", "tosses")))
def test_calls_that_hide_nothing_are_replayed_without_a_warning(case):
    assert check(case).warned == []


# The same without a memo, and with one that is checked in every trial


@many(30)
@given(cases(KINDS, glues=GLUES, closures=tuple(CLOSURES)))
def test_without_the_cache(case):
    assert check(case, cache=False).warned == []


@pytest.mark.slow
@many(40)
@given(cases(KINDS, glues=GLUES, closures=tuple(CLOSURES)))
def test_a_checked_cache_finds_nothing(case):
    check(case, cache="check")


# Errors


class InjectedError(Exception):
    """Raised by the closure in a test."""


FAILURE = st.fixed_dictionaries(
    {
        "number": st.integers(0, 8),
        "place": st.sampled_from(["before", "inside", "after"]),
        "error": st.sampled_from([InjectedError, RuntimeError, KeyboardInterrupt]).map(lambda kind: kind("injected")),
        "lasting": st.booleans(),
    }
)


@pytest.mark.slow
@many(60)
@given(cases(KINDS, glues=GLUES, closures=tuple(CLOSURES)), st.lists(FAILURE, min_size=1, max_size=3))
def test_an_error_leaves_everything_as_it_was(case, failures):
    """It is also the one that is raised, and the steps after it are right."""
    run = Run(case, cache=True)
    for failure in failures:
        run.failing_step(**failure)
        run.step()
