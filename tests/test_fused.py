"""The Triton kernels against their plain versions and float64: compiled on a GPU, interpreted without one."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from helpers.units import device_units, passes

from fastals.buffers import Gradients, Unit
from fastals.kernels import all_units, armijo
from fastals.kernels.arena import BATCH, OUTCOMES, REMEMBERED, SPLIT, STATE, SUMS
from fastals.kernels.moments import ROWS, _add_up, advance, survey
from fastals.kernels.plain import rounding
from fastals.kernels.table import BLOCK
from fastals.kernels.trial import trial
from fastals.search import INITIALS, MEMORY, REFERENCES, Search, initial_step

pytestmark = pytest.mark.proves(claim="fused-kernels")
CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [1, 63, 64, 65, 1000, 2 * BLOCK + 5]
RULES = {
    "lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "c": 0.1, "backtrack": 0.5, "growth": 1.3,
    "max_trials": 4, "trust": 0.01, "initial": "warm", "eta_init": None, "eta_min": 1e-10, "eta_max": 10.0,
    "reference": "monotone", "polyak_c": 0.1, "nonmonotone_weight": 1.0, "smoothing": 0.9,
}  # fmt: skip
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
members = st.tuples(st.sampled_from(SIZES), dtypes, st.booleans(), st.integers(0, 3))
partitions = st.lists(st.lists(members, min_size=1, max_size=3), min_size=1, max_size=3)
kinds = st.sampled_from(["adam", "sgd"])
seeds = st.integers(0, 2**32 - 1)


def numbers(n, dtype, seed):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype).to(CUDA)


def make_groups(partition, seed, **rules):
    """Groups of parameters with gradients, and a state as earlier steps have left it."""
    groups, state = [], {}
    for k, unit in enumerate(partition):
        params = []
        for j, (n, dtype, has_gradient, count) in enumerate(unit):
            at = seed + 100 * k + 10 * j
            p = torch.nn.Parameter(numbers(n, dtype, at))
            p.grad = numbers(n, dtype, at + 1) if has_gradient else None
            if count:
                moments = {
                    "exp_avg": numbers(n, torch.float32, at + 2),
                    "exp_avg_sq": numbers(n, torch.float32, at + 3).abs(),
                }
                master = p.detach().float() * (1 + 1e-4) if dtype != torch.float32 else p.detach().float()
                state[p] = moments | {"step": torch.tensor(float(count)), "master": master}
            params.append(p)
        betas = (0.9, 0.99 - k / 100)
        groups.append(RULES | MEMORY | {"name": f"g{k}", "params": params, "betas": betas} | rules)
    return groups, state


def gradients_of(device):
    return Gradients([unit for unit in device.units if unit.find_active()])


def refresh(device, seed="0"):
    device.refresh_rules(seed)
    device.refresh_table(gradients_of(device))


def moved(device):
    found = gradients_of(device)
    return device.table.moved(found.params, found.held)


def copies(groups, state):
    """The same groups and state around copies of the parameters."""
    twins = {}
    for g in groups:
        for p in g["params"]:
            twins[p] = torch.nn.Parameter(p.detach().clone())
            twins[p].grad = None if p.grad is None else p.grad.clone()
    copied = [g | {"params": [twins[p] for p in g["params"]]} for g in groups]
    return copied, {twins[p]: {k: v.clone() for k, v in s.items()} for p, s in state.items()}


def near(got, wanted, rtol, *terms):
    """``terms`` are what ``wanted`` is the sum of: where they cancel, their rounding stays."""
    got, wanted = got.detach().double(), wanted.detach().double()
    assert torch.equal(torch.isfinite(got), torch.isfinite(wanted))
    ok = torch.isfinite(wanted)
    scale = max(float(x[ok].abs().max()) for x in (wanted, *terms)) if ok.any() else 0.0
    assert not ok.any() or (got[ok] - wanted[ok]).abs().max() <= rtol * (scale + 1e-30)


# bfloat16 and float16: one rounding more than in the twin, which the interpreter does by cutting off
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@example([[(1, torch.bfloat16, True, 1)]], "adam", False, 0.1, 4935)  # the direction and the decay nearly cancel
@given(partition=partitions, kind=kinds, averages=st.booleans(), decay=st.sampled_from([0.0, 0.1]), seed=seeds)
def test_survey_trial_and_advance_do_what_the_plain_versions_do(partition, kind, averages, decay, seed):
    groups, state = make_groups(partition, seed, weight_decay=decay)
    twin_groups, twin_state = copies(groups, state)
    device = device_units(groups, kind, averages, state, several=True)
    units = [Unit([g], twin_state, adam=kind == "adam", averages=averages) for g in twin_groups]
    arena, table = device.arena, device.table
    arena.grad_scale.fill_(0.7)
    arena.partials.fill_(math.nan)
    arena.sums.fill_(math.nan)
    refresh(device)
    survey(table, arena)
    before = [[p.detach().clone() for p in g["params"]] for g in groups]
    sums = arena.sums.tolist()
    for row, unit in enumerate(units):
        found = dict(zip(SUMS, sums[row], strict=True))
        if not unit.find_active():
            assert not any(found.values())
            continue
        twin = passes(unit)
        twin.begin()
        twin.grad_scale = 0.7
        for averaged in (False, True) if averages else (False,):
            own = twin.survey(averaged)
            slope, length = own.slope, own.length
            names = ("averaged_slope", "averaged_direction") if averaged else ("slope", "direction")
            g = torch.cat([p.grad.double().flatten() for p in unit.active_params()])
            moving = max(int((g != 0).sum()), 1)
            assert found["moving"] == int((g != 0).sum())
            assert found["elements"] == len(g)
            norm = length * math.sqrt(moving)
            terms = norm + 2 * decay * twin.weight_norm  # of d = x + λ w, which may cancel
            assert found[names[0]] == pytest.approx(slope, abs=1e-5 * terms * float(g.norm()))
            assert math.sqrt(found[names[1]]) == pytest.approx(norm, abs=1e-5 * terms)
        assert math.sqrt(found["weights"]) == pytest.approx(twin.weight_norm, rel=1e-5)
        eta, averaged = 0.25 / (row + 1), averages
        arena.state[row, STATE.index("averaged")] = float(averaged)
        twin.survey(averaged)
        twin.trial(eta)
        put(device, row, eta)
        for p, q, old in zip(groups[row]["params"], twin_groups[row]["params"], before[row], strict=True):
            near(p, q, RTOL[p.dtype], old)
        twin.commit(twin_state | {p: twin_state.get(p, {}) for p in twin_groups[row]["params"]}, eta)
    arena.state[:, STATE.index("slope")] = 1.0
    advance(table, arena)
    for fused, plain, olds in zip(device.units, units, before, strict=True):
        for name in ("m", "v", "w"):
            mine, theirs = getattr(fused, name), getattr(plain, name)
            moved = fused.has_masters or name != "w"  # the snapshot of a float32 parameter is taken anew
            if len(mine) and moved:
                for i in plain.active:
                    terms = {"m": [plain.members[i][0].grad], "v": [], "w": [olds[i]]}[name]
                    near(fused.views(mine)[i], plain.views(theirs)[i], 1e-4 if name == "w" else 2e-6, *terms)
        assert fused.steps[: len(fused.members)].tolist() == plain.counts
    for row in range(len(units)):
        put(device, row, 0.0)  # masters have moved on: where there are none, the old weights come back
    for g, olds in zip(groups, before, strict=True):
        for p, old in zip(g["params"], olds, strict=True):
            if p.dtype == torch.float32 or p.grad is None:
                assert torch.equal(p.detach(), old)


def put(device, row, eta):
    """Move one unit to η and say so."""
    device.arena.state[row, STATE.index("move")] = eta
    device.arena.state[row, STATE.index("at")] = math.nan
    trial(device.table, device.arena, row)
    device.arena.state[row, STATE.index("at")] = eta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_a_step_of_zero_restores_bitwise_whatever_the_direction_holds(dtype, bad):
    groups, state = make_groups([[(1000, dtype, True, 0), (65, dtype, True, 2)]], seed=3)
    p = groups[0]["params"][0]
    with torch.no_grad():
        p[0] = -0.0
    p.grad[5] = bad
    before = [q.detach().clone() for q in groups[0]["params"]]
    device = device_units(groups, "adam", False, state)
    refresh(device)
    survey(device.table, device.arena)
    put(device, 0, 0.5)
    assert not torch.equal(p.detach(), before[0])
    assert math.isnan(float(device.arena.sums[0, 0])), "a gradient that is not finite shows in the slope"
    put(device, 0, 0.0)
    for q, old in zip(groups[0]["params"], before, strict=True):
        assert torch.equal(q.detach().view(torch.uint8), old.view(torch.uint8))


LARGE = 3 * 2**16 + 7  # 97 chunks and a remainder, in 49 programs; all sizes of a unit: test_partial_sums
PRECISE = [(1000, t, kind, avg) for t in RTOL for kind in ("adam", "sgd") for avg in (False, True)]
PRECISE += [(LARGE, torch.float32, "adam", False), (LARGE, torch.bfloat16, "adam", True)]


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(("size", "dtype", "kind", "averages"), PRECISE, ids=lambda x: str(x).removeprefix("torch."))
def test_survey_trial_and_advance_against_float64(size, dtype, kind, averages):
    """The third update of a parameter, with weight decay, along the averaged direction if there is one."""
    groups, state = make_groups([[(size, dtype, True, 2)]], seed=1, weight_decay=0.1)
    (p,), (beta1, beta2), eta = groups[0]["params"], groups[0]["betas"], 0.125
    g, old = p.grad.double(), {k: v.double() for k, v in state[p].items() if k != "step"}
    w = torch.where(old["master"].to(dtype) == p, old["master"], p.detach().double())
    new_v = beta2 * old["exp_avg_sq"] + (1 - beta2) * g**2
    new_m = beta1 * old["exp_avg"] + (1 - beta1 if kind == "adam" else 1) * g
    scale = 1 / ((new_v / (1 - beta2**3)).sqrt() + 1e-8) if kind == "adam" else 1.0
    mean = new_m / (1 - beta1**3) if kind == "adam" else new_m
    plain, averaged = g * scale + 0.1 * w, mean * scale + 0.1 * w
    d = averaged if averages else plain
    device = device_units(groups, kind, averages, state)
    arena = device.arena
    arena.partials.fill_(math.nan)
    refresh(device)
    survey(device.table, arena)
    sums = dict(zip(SUMS, arena.sums[0].tolist(), strict=True))
    for name, direction in (("slope", plain), ("averaged_slope", d)):
        assert sums[name] == pytest.approx(float(g @ direction), abs=1e-6 * float(g.norm() * direction.norm()))
    for name, direction in (("direction", plain), ("averaged_direction", d)):
        assert sums[name] == pytest.approx(float(direction @ direction), rel=1e-6)
    assert sums["weights"] == pytest.approx(float(w @ w), rel=1e-6)
    assert (sums["elements"], sums["moving"]) == (size, int((g != 0).sum()))
    near(device.units[0].w_views[0], w, 1e-7)
    arena.state[0, STATE.index("averaged")] = float(averages)
    arena.state[0, STATE.index("slope")] = 1.0
    put(device, 0, eta)
    near(p, w - eta * d, RTOL[dtype])
    advance(device.table, arena)
    if dtype != torch.float32:
        near(device.units[0].w_views[0], w - eta * d, 2e-6)
    if averages:
        near(device.units[0].m_views[0], new_m, 1e-6)
    if kind == "adam":
        near(device.units[0].v_views[0], new_v, 1e-6)
    assert arena.counts.tolist() == [3]


def test_the_same_inputs_give_the_same_bits():
    groups, state = make_groups([[(3 * BLOCK + 7, torch.float32, True, 1)]], seed=1)
    device = device_units(groups, "adam", True, state)
    refresh(device)
    seen = []
    for _ in range(2):
        device.arena.partials.fill_(math.nan)
        device.arena.sums.fill_(math.nan)
        survey(device.table, device.arena)
        seen.append(device.arena.sums.clone())
    assert torch.equal(*seen)


@pytest.mark.parametrize("rows", [1, 1024, 1025, 70_000])
def test_partial_sums_of_units_of_any_size(rows):
    """More rows than the programs of a unit take in one turn; the unit between has none."""
    spans = torch.tensor([[0, rows], [rows, rows], [rows, rows + 5]], dtype=torch.int32, device=CUDA)
    partials = numbers(len(SUMS) * (rows + 5), torch.float32, 1).view(len(SUMS), -1)
    parts = torch.zeros(3, SPLIT, len(SUMS), dtype=torch.float64, device=CUDA)
    parts[:, : min(SPLIT, -(-max(rows, 5) // ROWS))] = math.nan  # of a step before, where there are programs
    sums = torch.full((3, len(SUMS)), math.nan, dtype=torch.float64, device=CUDA)
    table = SimpleNamespace(spans=spans, n_chunks=rows + 5, most_chunks=max(rows, 5))
    _add_up(table, SimpleNamespace(partials=partials, parts=parts, sums=sums, units=3), None)
    for found, (first, last) in zip(sums, spans.tolist(), strict=True):
        wanted = partials[:, first:last].double()
        near(found, wanted.sum(1), 1e-13, wanted.abs().sum(1))


floats = st.floats(0.01, 0.9)
memories = st.fixed_dictionaries(
    {
        "step_size": st.sampled_from([0.0, 1e-6, 0.02, 3.0]), "backtracks": st.integers(0, 5),
        "average": st.floats(0.5, 3), "average_weight": st.sampled_from([0.0, 1.0, 4.5]),
        "mean_decrease": st.floats(0, 0.1), "mean_slope": st.floats(0, 10),
    }
)  # fmt: skip
searches = st.fixed_dictionaries(
    {
        "c": floats, "backtrack": floats, "growth": st.floats(1, 3), "max_trials": st.integers(1, 6),
        "trust": st.sampled_from([None, 0.01]), "initial": st.sampled_from(INITIALS),
        "eta_init": st.sampled_from([None, 0.005]), "reference": st.sampled_from(REFERENCES),
        "eta_min": st.sampled_from([1e-10, 1e-3]), "lr": st.floats(0.1, 1), "smoothing": floats,
    }
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(rules=searches, memory=memories, losses=st.lists(st.one_of(st.floats(0.5, 3), st.just(math.nan)), min_size=8, max_size=8), seed=seeds, start=st.floats(0.8, 2.5), dtype=dtypes, precision=st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip  # noqa: E501
def test_the_armijo_kernels_search_like_the_search_on_the_host(rules, memory, losses, seed, start, dtype, precision):
    """Same first step, same outcomes trial for trial, same memory: by rounding of float64 apart."""
    losses, start = [float(torch.tensor(x, dtype=precision)) for x in losses], torch.tensor(start, dtype=precision)
    losses = [start.item() if i % 3 == 1 else x for i, x in enumerate(losses)]  # what rounding hides looks like this
    groups, state = make_groups([[(1000, dtype, True, 0)]], seed, **rules)
    groups[0].update(memory)
    device = device_units(groups, "adam", False, state)
    twin = groups[0] | {k: float(groups[0][k]) for k in REMEMBERED}
    arena = device.arena
    refresh(device, "7")
    survey(device.table, arena)
    all_units.begin(arena, start.to(CUDA))
    armijo.open_search(arena, 0, tested=False)
    drawn = arena.rules[0, -1].item()
    row = at(arena, 0)
    sums = dict(zip(SUMS, arena.sums[0].tolist(), strict=True))
    length = math.sqrt(sums["direction"] / max(sums["moving"], 1))
    limit = rules["trust"] * math.sqrt(sums["weights"] / sums["elements"]) / length if rules["trust"] else math.inf
    cap = min(twin["eta_max"], limit) * rules["lr"]
    resolution = torch.finfo(precision).eps * start.item() / 2
    hidden = rounding(groups[0]["params"]) * math.sqrt(sums["weights"] / sums["elements"]) / length
    first = initial_step(twin, start.item(), sums["slope"], cap, uniform=drawn)
    search = Search(twin, start.item(), sums["slope"], first, resolution=resolution, hidden=hidden)
    assert row["eta"] == pytest.approx(search.eta, rel=1e-12)
    left = iter(losses)
    while search.running:
        assert arena.flags[0].tolist() == [1, 0, 0, 0]
        loss = next(left)
        search.judge(loss)
        armijo.judge(arena, 0, torch.tensor(loss, dtype=precision, device=CUDA))
        row = at(arena, 0)
        assert row["eta"] == pytest.approx(search.eta, rel=1e-12)
        assert OUTCOMES[int(row["outcome"])] == (search.outcome or "running")
    assert arena.flags[0].tolist() == [0, int(search.accepted), 0, 0]
    assert at(arena, -1, BATCH)["loss"] == search.final_loss
    armijo.judge(arena, 0, torch.tensor(0.0, device=CUDA))
    assert at(arena, 0) == row, "a search that has ended judges no more"
    stood = arena.state.tolist()
    all_units.remember(arena)
    search.remember()
    for key in REMEMBERED:
        assert float(groups[0][key]) == pytest.approx(twin[key], rel=1e-11, abs=1e-15), key
    assert arena.history[0].tolist() == stood
    assert math.isnan(at(arena, -1, BATCH)["loss_before"]), "between two steps there is nothing to put back"


def at(arena, row, columns=STATE):
    return dict(zip(columns, arena.state[row].tolist(), strict=True))


def test_elements_are_counted_in_64_bits():
    """The same tensors seen from two thousand million elements before them."""
    found = []
    for shift in (0, 2**20 + 3):  # in blocks
        groups, state = make_groups([[(3000, torch.float32, True, 2), (65, torch.float32, True, 0)]], 3)
        device = device_units(groups, "adam", True, state)
        table, arena = device.table, device.arena
        refresh(device)
        elements = shift * BLOCK
        (chunks,) = table.by_dtypes.values()
        chunks.rows[:, 1] += shift
        table.layout[:, 0] -= elements
        table.layout[:, 1] += elements
        table.places[:, :2] -= elements
        all_units.begin(arena, torch.ones((), device=CUDA))
        survey(table, arena)
        put(device, 0, 1e-3)
        arena.state[:, STATE.index("slope")] = 1.0
        moved = [p.detach().clone() for p in groups[0]["params"]]
        advance(table, arena)
        found.append([arena.sums[:, [0, 1, 3, 5, 6]].clone(), arena.m, arena.v, arena.w, *moved])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_start_that_is_not_finite_is_refused_and_teaches_nothing():
    groups, state = make_groups([[(65, torch.float32, True, 1)]], 0)
    device = device_units(groups, "adam", False, state)
    arena, before = device.arena, device.arena.memory.clone()
    moments = arena.v.clone()
    refresh(device)
    all_units.begin(arena, torch.tensor(math.nan, device=CUDA))
    survey(device.table, arena)
    armijo.open_search(arena, 0, tested=False)
    assert arena.flags[0].tolist() == [0, 0, 1, 0]
    advance(device.table, arena)
    all_units.remember(arena)
    assert torch.equal(arena.memory, before)
    assert torch.equal(arena.v, moments)


def test_the_table_follows_tensors_that_move():
    groups, state = make_groups([[(100, torch.float32, True, 0), (70, torch.float32, True, 0)]], 0)
    device = device_units(groups, "sgd", False, state)
    p, q = groups[0]["params"]
    refresh(device)
    assert not moved(device)
    p.grad = p.grad.clone()
    assert moved(device)
    refresh(device)
    assert not moved(device)
    q.grad = None
    refresh(device)
    survey(device.table, device.arena)
    assert float(device.arena.sums[0, SUMS.index("elements")]) == 100
    assert float(device.arena.sums[0, 0]) == pytest.approx(float(p.grad.double() @ p.grad.double()), rel=1e-6)
    p.data = p.detach().clone()
    assert moved(device)
    p.grad = torch.zeros(200, device=CUDA)[::2]
    with pytest.raises(RuntimeError, match="not contiguous"):
        refresh(device)


def test_the_table_follows_a_gradient_that_another_parameter_takes_over():
    groups, state = make_groups([[(65, torch.float32, True, 0), (65, torch.float32, False, 0)]], 0)
    device = device_units(groups, "sgd", False, state)
    p, q = groups[0]["params"]
    refresh(device)
    p.grad, q.grad = None, p.grad
    assert moved(device)
    refresh(device)
    assert device.table.places[:, 2].tolist() == [0, 1]


CHANGES = {"transposed": lambda x: x.t(), "cut": lambda x: x[:4], "converted": lambda x: x.view(torch.float16)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_parameter_that_changes_where_it_lies_is_refused(change):
    """With a gradient where the last one was, as autograd would make it."""
    groups, state = make_groups([[(64, torch.bfloat16, False, 0)]], 0)
    p, gradient = groups[0]["params"][0], torch.ones(8, 8, dtype=torch.bfloat16, device=CUDA)
    p.data, p.grad = p.data.view(8, 8), gradient
    device = device_units(groups, "sgd", False, state)
    refresh(device)
    assert not moved(device)
    p.grad = None
    p.data = change(p.data)
    p.grad = change(gradient)
    assert moved(device)
    with pytest.raises(RuntimeError, match=r"not contiguous|was .* when the optimizer first saw it"):
        refresh(device)


def test_a_gradient_that_is_transposed_where_it_lies_is_refused():
    p = torch.nn.Parameter(torch.ones(8, 8, device=CUDA))
    gradient = p.grad = numbers(64, torch.float32, 0).view(8, 8)
    groups = [RULES | MEMORY | {"name": "g", "params": [p]}]
    device = device_units(groups, "sgd", False, {})
    refresh(device)
    p.grad = gradient.t()
    with pytest.raises(RuntimeError, match="not contiguous"):
        refresh(device)


def test_a_gradient_that_is_converted_where_it_lies_is_read_as_what_it_is():
    p = torch.nn.Parameter(torch.ones(64, device=CUDA))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has gradients of the parameter's dtype only")
    p.grad_dtype = None
    p.grad = numbers(64, torch.float32, 0)
    groups = [RULES | MEMORY | {"name": "g", "params": [p]}]
    device = device_units(groups, "sgd", False, {})
    refresh(device)
    converted = p.grad.view(torch.bfloat16)[:64].nan_to_num_(1.0).clamp_(-4, 4)
    p.grad = converted
    refresh(device)
    survey(device.table, device.arena)
    wanted = converted.double() @ converted.double()
    assert float(device.arena.sums[0, SUMS.index("slope")]) == pytest.approx(float(wanted), rel=1e-6)


def test_parameters_without_a_gradient_may_be_anything():
    groups, state = make_groups([[(65, torch.float32, True, 0), (65, torch.float32, False, 0)]], 0)
    p, q = groups[0]["params"]
    device = device_units(groups, "sgd", False, state)
    q.data = q.data.double()[:3]
    refresh(device)
    survey(device.table, device.arena)
    wanted = float(p.grad.double() @ p.grad.double())
    assert float(device.arena.sums[0, SUMS.index("slope")]) == pytest.approx(wanted, rel=1e-6)
    all_units.begin(device.arena, torch.ones((), device=CUDA))
    put(device, 0, 0.5)
    advance(device.table, device.arena)


def test_unaligned_tensors_are_read_right():
    storage = torch.zeros(1 + 3 * BLOCK, device=CUDA)
    p = torch.nn.Parameter(storage[1:])
    with torch.no_grad():
        p.copy_(numbers(3 * BLOCK, torch.float32, 1))
    p.grad = numbers(3 * BLOCK, torch.float32, 2)
    groups = [RULES | MEMORY | {"name": "g", "params": [p]}]
    device = device_units(groups, "sgd", False, {})
    refresh(device)
    (chunks,) = device.table.by_dtypes.values()
    assert not chunks.aligned
    survey(device.table, device.arena)
    assert float(device.arena.sums[0, 0]) == pytest.approx(float(p.grad.double().square().sum()), rel=1e-6)
