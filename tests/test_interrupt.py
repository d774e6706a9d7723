"""Signals that come while a step is made: none is lost, and none comes where it cannot be undone."""

import itertools
import signal
import threading

import pytest
import torch
from helpers.interruptions import at_lines, terminated
from torch import nn

import fastals
from fastals.interrupt import SIGNALS, hand_on, held_back, let_through, uninterrupted


def press():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def term():
    """SIGTERM raises SystemExit, and all handlers are those of before at the end."""
    before = signal.signal(signal.SIGTERM, terminated)
    yield
    assert signal.getsignal(signal.SIGTERM) is terminated
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)


def run(block):
    """A step of which this block is a part."""
    with held_back():
        block()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_comes_after_the_block(number, error):
    done = []

    def block():
        signal.raise_signal(number)
        done.append("whole")

    with pytest.raises(error):
        run(block)
    assert done


def test_a_signal_is_not_lost_if_the_block_raises():
    def block():
        press()
        raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        run(block)
    assert isinstance(caught.value.__context__, ValueError)


def test_each_of_two_signals_comes():
    def block():
        press()
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        run(block)
    assert {type(caught.value), type(caught.value.__context__)} == {KeyboardInterrupt, SystemExit}


def test_a_signal_comes_at_once_in_the_code_of_the_user():
    done = []

    def closure():
        press()
        done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        run(lambda: let_through(closure))
    assert not done


def test_another_one_comes_as_well_where_the_user_has_caught_the_first():
    caught = []

    def closure():
        for _ in range(3):
            try:
                press()
            except KeyboardInterrupt:
                caught.append(True)

    run(lambda: let_through(closure))
    assert len(caught) == 3


def test_thousands_may_wait():
    heard = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        run(lambda: [signal.raise_signal(signal.SIGALRM) for _ in range(5000)])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(heard) == 5000


def test_what_makes_the_micro_batches_may_be_interrupted():
    model, done = nn.Linear(2, 1), []

    def micro_batches():
        press()
        done.append(True)
        yield lambda: model(torch.ones(1, 2)).square().sum()

    with pytest.raises(KeyboardInterrupt):
        fastals.ALS(model).step(micro_batches())
    assert not done


def test_a_second_ctrl_c_does_not_disturb_what_undoes_the_first():
    done = []

    def block():
        try:
            let_through(press)
        finally:
            press()
            done.append("undone")

    with pytest.raises(KeyboardInterrupt):
        run(block)
    assert done


def test_one_that_has_waited_comes_where_it_is_handed_on():
    done = []

    def block():
        press()
        let_through(done.append, "a closure")
        hand_on()
        done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        run(block)
    assert done == ["a closure"]


def test_nothing_comes_where_nothing_may():
    done = []

    def block():
        with uninterrupted():
            let_through(press)
            hand_on()
            done.append("inside")
        hand_on()
        done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        run(block)
    assert done == ["inside"]


def test_a_step_within_the_closure_of_another_holds_back_as_well():
    done = []

    def inner():
        press()
        done.append("whole")

    def closure():
        run(inner)
        done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        run(lambda: let_through(closure))
    assert done == ["whole"]


def test_a_handler_that_raises_nothing_is_called_and_the_step_goes_on():
    called, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *caught: called.append("called"))
    try:
        with held_back():
            let_through(press)
            let_through(press)
            press()
            press()
            called.append("held")
    finally:
        signal.signal(signal.SIGINT, before)
    assert called == ["called", "called", "held", "called", "called"]


def test_a_handler_that_the_closure_sets_stays_and_may_call_the_one_before():
    called, before = [], signal.getsignal(signal.SIGINT)

    def closure():
        previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *caught: (called.append("new"), previous(*caught)))

    run(lambda: let_through(closure))
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                press()
    finally:
        signal.signal(signal.SIGINT, before)
    assert called == ["new", "new"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_any_line_a_signal_leaves_the_handlers_as_they_were(number):
    before, lines = [signal.getsignal(n) for n in SIGNALS], []

    def signalled(at):
        """At this line, and count them all."""
        passed = itertools.count()

        def point(where):
            lines.append(where)
            if next(passed) == at:
                signal.raise_signal(number)

        lines.clear()
        with at_lines(None, point):
            run(lambda: None)

    signalled(None)
    assert len(lines) > 40
    for at in range(len(lines)):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            signalled(at)
        assert [signal.getsignal(n) for n in SIGNALS] == before, lines[at]


def test_other_threads_get_no_signals_and_hold_none_back():
    done = []

    def work():
        with held_back(), uninterrupted():
            let_through(done.append, "made")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["made"]
