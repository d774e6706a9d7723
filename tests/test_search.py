"""The scalar rules: what is accepted, where a search starts, what it remembers."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastals.search import MEMORY, Search, initial_step, schedule_next_search, zhang_hager

RULES = {
    "c": 0.5, "backtrack": 0.5, "growth": 2.0, "max_trials": 8, "initial": "reset", "eta_init": None, "eta_min": 1e-10,
    "reference": "monotone", "polyak_c": 0.1, "nonmonotone_weight": 1.0, "smoothing": 0.9,
}  # fmt: skip


def rules(**changed):
    return RULES | MEMORY | changed


def open_search(r, loss, slope, cap, *, uniform=0.5, **rounding):
    """A search from the first step that the rules give."""
    return Search(r, loss, slope, initial_step(r, loss, slope, cap, uniform=uniform), **rounding)


def run(search, f):
    """Search along f(η); returns the steps tried and their losses."""
    tried = []
    while search.running:
        tried.append((search.eta, f(search.eta)))
        search.judge(tried[-1][1])
    return tried


waves = st.lists(
    st.tuples(st.floats(-2, 2), st.floats(0.1, 5), st.floats(0, 6.3)), min_size=1, max_size=4
)  # amplitude, frequency, phase
constants = {
    "c": st.floats(0.01, 0.99),
    "backtrack": st.floats(0.1, 0.9),
    "max_trials": st.integers(1, 12),
    "reference": st.sampled_from(["monotone", "nonmonotone", "smoothed"]),
    "smoothing": st.floats(0, 0.95),
    "nonmonotone_weight": st.floats(0, 1),
    "average": st.floats(-5, 5),
    "average_weight": st.floats(0, 5),
    "mean_decrease": st.floats(-1, 1),
    "mean_slope": st.floats(0, 10),
}


@given(waves=waves, x=st.floats(-3, 3), cap=st.floats(1e-3, 30), chosen=st.fixed_dictionaries(constants))
def test_the_returned_point_satisfies_the_armijo_inequality(waves, x, cap, chosen):
    """On random functions of one variable, along minus the derivative, for every reference."""

    def f(y):
        return 0.05 * y * y + sum(a * math.cos(b * y + p) for a, b, p in waves)

    d = 0.1 * x - sum(a * b * math.sin(b * x + p) for a, b, p in waves)
    assume(abs(d) > 1e-6)
    r = rules(**chosen)
    search = open_search(r, f(x), d * d, cap)
    tried = run(search, lambda eta: f(x - eta * d))

    def passes(eta, loss):
        return loss <= search.reference - r["c"] * eta * search.required_slope

    assert 1 <= len(tried) == search.trials <= r["max_trials"]
    assert [eta for eta, _ in tried] == pytest.approx([cap * r["backtrack"] ** i for i in range(len(tried))])
    assert not any(passes(*trial) for trial in tried[:-1])
    assert search.accepted == passes(*tried[-1])
    if search.accepted:
        assert (search.eta, search.final_loss) == tried[-1]
    else:
        assert (search.eta, search.final_loss) == (0.0, f(x))
    if r["reference"] == "monotone" and search.accepted:
        assert f(x - search.eta * d) <= f(x) - r["c"] * search.eta * d * d


@given(bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_trial_loss_that_is_not_finite_is_a_rejection(bad):
    search = open_search(rules(), loss=1.0, slope=1.0, cap=1.0)
    search.judge(bad)
    assert search.running
    assert search.eta == 0.5
    search.judge(0.0)
    assert search.accepted


def test_a_search_ends_at_the_smallest_step():
    search = open_search(rules(eta_min=0.2, max_trials=100), loss=1.0, slope=1.0, cap=1.0)
    assert [eta for eta, _ in run(search, lambda eta: 2.0)] == [1.0, 0.5, 0.25]
    assert search.outcome == "exhausted"


@pytest.mark.parametrize("invisible", [{"resolution": 0.1}, {"hidden": 0.2}], ids=["in the loss", "in the weights"])
def test_where_rounding_hides_the_decrease_the_loss_only_must_not_rise(invisible):
    """With c = 0.5 steps from 0.2 on are asked for 0.1 or more."""
    search = open_search(rules(), loss=1.0, slope=1.0, cap=0.25, **invisible)
    search.judge(1.0)
    assert search.running, "0.25 could have shown 0.125"
    search.judge(1.001)
    assert search.running, "the loss has risen"
    search.judge(1.0)
    assert search.accepted
    assert (search.eta, search.required, search.final_loss) == (0.0625, 0.0, 1.0)


# First step


@given(loss=st.floats(0.01, 10), slope=st.floats(0.01, 100), backtracks=st.integers(0, 5), p=st.floats(0.05, 1))
def test_polyak(loss, slope, backtracks, p):
    r = rules(initial="polyak", polyak_c=p, backtracks=backtracks, backtrack=0.7)
    assert initial_step(r, loss, slope, cap=1e9) == pytest.approx(loss / (p * slope) * 0.7**backtracks)
    assert open_search(r, loss, slope, cap=1e-3).eta == pytest.approx(min(1e-3, loss / (p * slope) * 0.7**backtracks))


@given(uniform=st.floats(0, 1, exclude_max=True), cap=st.floats(1e-8, 1e3), least=st.floats(1e-9, 1e-2))
def test_random_is_log_uniform_within_its_range(uniform, cap, least):
    r = rules(initial="random", eta_min=least)
    eta, low = open_search(r, 1.0, 1.0, cap, uniform=uniform).eta, min(max(least, 1e-4 * cap), cap)
    assert low * (1 - 1e-12) <= eta <= cap
    if low < cap:
        assert math.log(eta / low) == pytest.approx(uniform * math.log(cap / low), abs=1e-9)


def test_warm_and_reset():
    assert open_search(rules(initial="reset", step_size=0.1), 1.0, 1.0, cap=3.0).eta == 3.0
    assert open_search(rules(initial="warm"), 1.0, 1.0, cap=3.0).eta == 3.0
    assert open_search(rules(initial="warm", eta_init=0.2), 1.0, 1.0, cap=3.0).eta == 0.2
    assert open_search(rules(initial="warm", eta_init=0.2, step_size=0.4), 1.0, 1.0, cap=3.0).eta == 0.8
    assert open_search(rules(initial="warm", step_size=2.0), 1.0, 1.0, cap=3.0).eta == 3.0


# Reference


@given(losses=st.lists(st.floats(0, 10), min_size=1, max_size=20), weight=st.floats(0, 1))
def test_zhang_hager(losses, weight):
    """C is the mean of the losses so far, each weighted with ξ to the number of steps since."""
    r = rules(reference="nonmonotone", nonmonotone_weight=weight)
    for t, loss in enumerate(losses):
        weights = [weight ** (t - i) for i in range(t + 1)]
        mean = sum(w * f for w, f in zip(weights, losses, strict=False)) / sum(weights)
        assert zhang_hager(r, loss)[0] == pytest.approx(mean, abs=1e-9)
        search = open_search(r, loss, 1.0, 1.0)
        assert search.reference == pytest.approx(max(mean, loss), abs=1e-9)
        run(search, lambda eta: -1e3)
        search.remember()


unit = st.floats(0.01, 1)


@given(
    b=st.floats(0, 0.99),
    h=st.floats(-1, 1),
    mean=st.floats(0, 10),
    loss=unit,
    trial=unit,
    slope=unit,
    c=st.floats(0.1, 0.9),
)
def test_smoothed(b, h, mean, loss, trial, slope, c):
    """The paper's test: the averages of decrease and slope, this mini-batch taken in, against each other."""
    eta = 0.25
    decrease = b * h + (1 - b) * (loss - trial)
    required = c * eta * (b * mean + (1 - b) * slope)
    assume(abs(decrease - required) > 1e-9)
    r = rules(reference="smoothed", smoothing=b, mean_decrease=h, mean_slope=mean, c=c)
    search = open_search(r, loss, slope, eta)
    search.judge(trial)
    assert search.accepted == (decrease >= required)


def test_smoothed_averages_are_written_by_accepted_searches_only():
    r = rules(reference="smoothed", smoothing=0.9)
    search = open_search(r, 1.0, 2.0, 0.1)
    search.judge(0.5)
    search.remember()
    assert (r["mean_decrease"], r["mean_slope"]) == pytest.approx((0.1 * 0.5, 0.1 * 2.0))
    before = dict(r)
    search = open_search(r, 1.0, 2.0, 0.1)
    run(search, lambda eta: 9.0)
    search.remember()
    assert (r["mean_decrease"], r["mean_slope"]) == (before["mean_decrease"], before["mean_slope"])


# Memory


def test_an_accepted_step_is_remembered():
    r = rules(initial="warm")
    search = open_search(r, 1.0, 1.0, cap=1.0)
    search.judge(2.0)
    search.judge(0.0)
    search.remember()
    assert r["step_size"] == search.eta == 0.5


def test_the_backtracks_of_polyak_are_remembered():
    """PoNoS: l ← max(l + backtracks − 1, 0)."""
    r = rules(initial="polyak", backtracks=1)
    for rejections, expected in ((0, 0), (0, 0), (3, 2), (1, 2), (0, 1)):
        search = open_search(r, 1.0, 1.0, cap=100.0)
        for _ in range(rejections):
            search.judge(9.0)
        search.judge(-100.0)
        assert search.accepted
        search.remember()
        assert r["backtracks"] == expected


@pytest.mark.parametrize("max_trials", [3, 8])
def test_an_exhausted_search_moves_the_memory_by_one_notch(max_trials):
    """However many trials it made: 0.8, and not 0.8 times 0.5 to the eighth."""
    r = rules(initial="warm", step_size=0.4, max_trials=max_trials)
    search = open_search(r, 1.0, 1.0, cap=1.0)
    assert search.start == 0.8
    run(search, lambda eta: 9.0)
    search.remember()
    assert r["step_size"] == 0.4


def test_a_loss_that_cannot_show_the_decrease_lets_the_step_grow_until_it_can():
    r = rules(initial="warm", step_size=1e-3, growth=1.3)
    for _ in range(50):
        search = open_search(r, 1.0, 1e-2, cap=1.0, resolution=1e-4)
        run(search, lambda eta: 1.0)
        search.remember()
    visible = 1e-4 / (r["c"] * 1e-2)
    assert visible / 2 / 1.3 < r["step_size"] < visible


def test_a_loss_that_visibly_rises_shrinks_the_step_also_where_the_decrease_is_not_visible():
    r = rules(initial="warm", step_size=1e-3, growth=1.0)
    for _ in range(3):
        search = open_search(r, 1.0, 1e-6, cap=1e-2, resolution=6e-8)
        run(search, lambda eta: 1.1)
        search.remember()
    assert r["step_size"] == 1e-3 / 2**3


def test_a_collapsed_memory_restarts_where_a_search_from_the_cap_would_end():
    r = rules(initial="warm", step_size=1e-9, max_trials=4)
    search = open_search(r, 1.0, 1.0, cap=0.8)
    assert search.start == 0.8 * 0.5**3


# When to search next


def test_every_nth_step():
    r = rules(step_size=1.0)
    searched = []
    for count in range(10):
        if count >= r["next_search"]:
            searched.append(count)
            r["count"] = count + 1
            schedule_next_search(r, 3)
    assert searched == [0, 3, 6, 9]


@given(steps=st.lists(st.floats(1e-4, 1), min_size=2, max_size=15))
def test_auto_follows_the_change_of_the_step(steps):
    """⌊1 / (r − 1)⌋ steps, 1 to 10, with r the ratio of a fast and a slow mean of the step size."""
    r = rules()
    fast = slow = steps[0]
    for i, step in enumerate(steps):
        if i:
            fast, slow = 0.9 * fast + 0.1 * step, 0.99 * slow + 0.01 * step
        r.update(step_size=step, count=7)
        schedule_next_search(r, "auto")
        ratio = max(fast / slow, slow / fast)
        exact = 1 / (ratio - 1) if ratio > 1 else math.inf
        assume(math.isinf(exact) or abs(exact - round(exact)) > 1e-6)
        assert r["next_search"] - 6 == min(10, max(1, math.floor(min(exact, 10))))
