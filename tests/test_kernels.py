"""The flat-buffer kernels against plain formulas in float64, and a unit's buffers over random partitions."""

import importlib
import math

import pytest
import torch
from helpers.units import passes
from hypothesis import given
from hypothesis import strategies as st

from fastals.buffers import ALIGNED_ELEMENTS, Unit
from fastals.kernels import arena, plain

SIZES = st.sampled_from([1, 63, 64, 65, 1000])
RTOL = {torch.bfloat16: 2**-8, torch.float32: 1e-5, torch.float64: 1e-12}  # of the value itself
ATOL = {torch.bfloat16: 1e-6, torch.float32: 1e-6, torch.float64: 1e-14}  # of the largest value (cancellation)
kinds = st.sampled_from(["adam", "sgd"])
seeds = st.integers(0, 2**32 - 1)
buffer_dtypes = st.sampled_from([torch.float32, torch.float64])
hyper = st.fixed_dictionaries(
    {
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.99, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "count": st.integers(1, 1000),
        "grad_scale": st.sampled_from([1.0, 0.3]),
    }
)


def numbers(n, dtype, seed, positive=False):
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.abs() if positive else x


def assert_near(got, exact, terms=()):
    """Non-finite where the exact value is, and near it elsewhere; ``terms`` are what it is the difference of."""
    rtol, atol = RTOL[got.dtype], ATOL[got.dtype]
    got, exact = got.double(), exact.double()
    assert torch.equal(torch.isnan(got), torch.isnan(exact))
    assert torch.equal(torch.isinf(got), torch.isinf(exact))
    finite = torch.isfinite(exact)
    scale = max((float(x[finite].abs().max()) for x in (exact, *terms) if finite.any()), default=0.0)
    assert (got[finite] - exact[finite]).abs().le(rtol * exact[finite].abs() + atol * scale).all()


def exact_direction(kind, averaged, g, m, v, w, betas, eps, weight_decay, count, grad_scale):
    b1, b2 = betas
    g, m, v, w = (x.double() for x in (g * grad_scale, m, v, w))
    if kind == "sgd":
        x = b1 * m + g if averaged else g
        return x + weight_decay * w if weight_decay else x
    x = (b1 * m + (1 - b1) * g) / (1 - b1**count) if averaged else g
    d = x / (((b2 * v + (1 - b2) * g**2) / (1 - b2**count)).sqrt() + eps)
    return d + weight_decay * w if weight_decay else d


@given(n=SIZES, seed=seeds, dtype=buffer_dtypes, kind=kinds, averaged=st.booleans(), hyper=hyper)
def test_direction(n, seed, dtype, kind, averaged, hyper):
    g, m, w = (numbers(n, dtype, seed + i) for i in range(3))
    v = numbers(n, dtype, seed + 3, positive=True)
    inputs = [x.clone() for x in (g, m, v, w)]
    out, scratch = torch.full((n,), math.nan, dtype=dtype), torch.full((n,), math.nan, dtype=dtype)
    plain.direction(g, m, v, w, out=out, scratch=scratch, adam=kind == "adam", averaged=averaged, **hyper)
    assert_near(out, exact_direction(kind, averaged, g, m, v, w, **hyper))
    assert all(torch.equal(a, b) for a, b in zip(inputs, (g, m, v, w), strict=True)), "inputs are read only"


@given(
    n=SIZES, seed=seeds, kind=kinds, averaged=st.booleans(), hyper=hyper, where=st.integers(0, 999),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]), buffer=st.sampled_from(["g", "m", "w"]),
)  # fmt: skip
def test_direction_keeps_a_bad_number_where_it_is(n, seed, kind, averaged, hyper, where, bad, buffer):
    given_ = {k: numbers(n, torch.float32, seed + i) for i, k in enumerate("gmw")}
    given_["v"] = numbers(n, torch.float32, seed + 3, positive=True)
    given_[buffer][where % n] = bad
    out, scratch = torch.empty(n), torch.empty(n)
    plain.direction(
        *(given_[k] for k in "gmvw"), out=out, scratch=scratch, adam=kind == "adam", averaged=averaged, **hyper
    )
    assert_near(out, exact_direction(kind, averaged, *(given_[k] for k in "gmvw"), **hyper))
    assert torch.isfinite(out).sum() >= n - 1


@given(n=SIZES, seed=seeds, dtype=buffer_dtypes, kind=kinds, hyper=hyper)
def test_advance(n, seed, dtype, kind, hyper):
    g, m = (numbers(n, dtype, seed + i) for i in range(2))
    v = numbers(n, dtype, seed + 3, positive=True)
    b1, b2 = hyper["betas"]
    clipped = g.double() * hyper["grad_scale"]
    adam, old_m = kind == "adam", m.double()
    exact_m = b1 * m.double() + (1 - b1 if adam else 1) * clipped
    exact_v = b2 * v.double() + (1 - b2) * clipped**2 if adam else v.double()
    given_ = g.clone()
    scratch = torch.full((n,), math.nan, dtype=dtype)
    plain.advance(g, m, v, scratch=scratch, adam=adam, betas=hyper["betas"], grad_scale=hyper["grad_scale"])
    assert torch.equal(g, given_), "the gradient is read only"
    assert_near(m, exact_m, terms=(old_m, clipped))
    assert_near(v, exact_v)


parameter_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@given(sizes=st.lists(SIZES, min_size=1, max_size=4), dtype=parameter_dtypes, seed=seeds, eta=st.floats(1e-6, 10))
def test_trial(sizes, dtype, seed, eta):
    exact = torch.promote_types(dtype, torch.float32)
    w, d = ([numbers(n, exact, seed + i + shift) for i, n in enumerate(sizes)] for shift in (0, 50))
    params = [torch.full_like(x, math.nan, dtype=dtype) for x in w]
    plain.trial(params, w, d, eta)
    for p, a, b in zip(params, w, d, strict=True):
        assert p.dtype == dtype
        assert_near(p, a.double() - eta * b.double(), terms=(a.double(), eta * b.double()))


@given(sizes=st.lists(SIZES, min_size=1, max_size=4), dtype=parameter_dtypes, seed=seeds, data=st.data())
def test_trial_of_length_zero_restores_bitwise_whatever_the_direction_holds(sizes, dtype, seed, data):
    exact = torch.promote_types(dtype, torch.float32)
    before = [numbers(n, dtype, seed + i) for i, n in enumerate(sizes)]
    before[0][0] = -0.0
    params, w, d = [p.clone() for p in before], [p.to(exact) for p in before], [p.to(exact) for p in before]
    d[-1][data.draw(st.integers(0, sizes[-1] - 1))] = data.draw(st.sampled_from([math.nan, math.inf]))
    plain.trial(params, w, d, 0.5)
    plain.trial(params, w, d, 0.0)
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p.view(torch.uint8), q.view(torch.uint8))


@given(sizes=st.lists(SIZES, min_size=1, max_size=4), dtype=parameter_dtypes, seed=seeds)
def test_snapshot(sizes, dtype, seed):
    params = [numbers(n, dtype, seed + i) for i, n in enumerate(sizes)]
    out = [torch.full_like(p, math.nan, dtype=torch.float64) for p in params]
    plain.snapshot(params, out)
    assert all(torch.equal(o, p.double()) for o, p in zip(out, params, strict=True))


# A unit's buffers: any shapes, any dtypes, some parameters without a gradient


@st.composite
def partitions(draw):
    """Shapes, dtypes, presence of a gradient and past updates of the parameters of one to three groups."""
    one = st.tuples(SIZES, parameter_dtypes, st.booleans(), st.integers(0, 3))
    return draw(st.lists(st.lists(one, min_size=1, max_size=4), min_size=1, max_size=3))


def make_unit(partition, kind, seed, weight_decay):
    groups, state = [], {}
    for k, members in enumerate(partition):
        params = []
        for j, (n, dtype, has_gradient, count) in enumerate(members):
            start = seed + 100 * k + 10 * j
            p = torch.nn.Parameter(numbers(n, dtype, start))
            p.grad = numbers(n, dtype, start + 1) if has_gradient else None
            if count:
                moments = numbers(n, torch.float64, start + 2), numbers(n, torch.float64, start + 3, positive=True)
                state[p] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
                state[p] |= {"step": torch.tensor(float(count)), "master": p.detach().double()}
            params.append(p)
        groups.append(
            {
                "name": f"g{k}",
                "params": params,
                "betas": (0.9, 0.99 - k / 100),
                "eps": 1e-8,
                "weight_decay": weight_decay,
            }
        )
    return Unit(groups, state, adam=kind == "adam"), state


def begin(twin, grad_scale):
    twin.begin()
    twin.grad_scale = grad_scale


@given(partition=partitions(), kind=kinds, averaged=st.booleans(), seed=seeds, decay=st.sampled_from([0.0, 0.1]))
def test_a_units_direction_trial_restore_and_commit(partition, kind, averaged, seed, decay):
    unit, state = make_unit(partition, kind, seed, decay)
    assert all(offset % ALIGNED_ELEMENTS == 0 for offset in unit.offsets)
    twin = passes(unit)
    before = [p.detach().clone() for p, _ in unit.members]
    old = {p: {k: v.clone() for k, v in s.items()} for p, s in state.items()}
    unit.find_active()
    begin(twin, grad_scale=0.7)
    slope = twin.survey(averaged).slope

    exact, moments = {}, {}
    for p, group in unit.members:
        if p.grad is None:
            continue
        s = old.get(p, {"step": 0, "exp_avg": torch.zeros(p.shape), "exp_avg_sq": torch.zeros(p.shape)})
        m, v, g = s["exp_avg"].to(unit.dtype), s["exp_avg_sq"].to(unit.dtype), p.grad.to(unit.dtype)
        count, (b1, b2) = int(s["step"]) + 1, group["betas"]
        w = p.detach().to(unit.dtype)
        exact[p] = exact_direction(kind, averaged, g, m, v, w, (b1, b2), 1e-8, decay, count, 0.7)
        scaled, adam = 0.7 * g.double(), kind == "adam"
        moments[p] = b1 * m.double() + (1 - b1 if adam else 1) * scaled, b2 * v.double() + (1 - b2) * scaled**2, count
    expected = sum(float(p.grad.double() @ d) for p, d in exact.items())
    size = sum(float(p.grad.double().norm() * d.norm()) for p, d in exact.items())
    assert slope == pytest.approx(expected, abs=1e-5 * size if unit.dtype == torch.float32 else 1e-11 * size)

    twin.trial(0.25)
    for (p, _), w in zip(unit.members, before, strict=True):
        assert_near(p.detach(), w.double() - 0.25 * exact[p] if p in exact else w)
    twin.trial(0.0)
    for (p, _), w in zip(unit.members, before, strict=True):
        assert torch.equal(p.detach().view(torch.uint8), w.view(torch.uint8))

    twin.trial(0.25)
    twin.commit(state := state | {p: state.get(p, {}) for p, _ in unit.members}, 0.25)
    for p, (m, v, count) in moments.items():
        assert int(state[p]["step"]) == count
        assert_near(state[p]["exp_avg"], m)
        if kind == "adam":
            assert_near(state[p]["exp_avg_sq"], v)
        if "master" in state[p] and p.dtype != unit.dtype:
            assert torch.equal(state[p]["master"].to(p.dtype), p.detach()), "the parameter is its master, rounded"


def test_bfloat16_steps_below_its_resolution_add_up_in_the_master():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    group = {"name": "g", "params": [p], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    state = {p: {}}
    unit = Unit([group], {}, adam=False)
    twin = passes(unit)
    for _ in range(10):
        p.grad = torch.ones_like(p)
        unit.find_active()
        twin.begin()
        twin.survey(False)
        twin.trial(1e-3)  # half a unit in the last place of bfloat16 is 2e-3 here
        twin.commit(state, 1e-3)
    assert torch.allclose(state[p]["master"], torch.full((3,), 0.99), rtol=1e-6)
    assert torch.equal(p.detach(), torch.full((3,), 0.99).bfloat16())


def test_weights_that_someone_else_wrote_replace_their_master():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    group = {"name": "g", "params": [p], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    state = {p: {}}
    unit = Unit([group], {}, adam=False)
    twin = passes(unit)
    for start in (1.0, 5.0):
        with torch.no_grad():
            p.fill_(start)
        p.grad = torch.ones_like(p)
        unit.find_active()
        twin.begin()
        twin.survey(False)
        twin.trial(0.25)
        twin.commit(state, 0.25)
        assert torch.equal(state[p]["master"], torch.full((3,), start - 0.25))


# Names of the columns of the tables


def test_columns_are_found_by_name():
    pytest.importorskip("triton")
    columns = importlib.import_module("fastals.kernels.columns")
    assert columns.RULE_BACKTRACK.value == arena.RULES.index("backtrack")
    assert columns.BATCH_LOSS.value == arena.BATCH.index("loss")
    assert columns.N_RULES.value == len(arena.RULES)
    with pytest.raises(AttributeError, match="no table of the kernels has a column RULE_NONE"):
        columns.RULE_NONE  # noqa: B018
    with pytest.raises(ImportError):
        from fastals.kernels.columns import RULE_NONE  # noqa: F401


def test_the_last_row_of_the_state_has_its_own_names():
    assert len(arena.BATCH) == len(arena.STATE)
    for written_to_all_rows in ("go", "resolution"):
        assert arena.BATCH.index(written_to_all_rows) == arena.STATE.index(written_to_all_rows)
