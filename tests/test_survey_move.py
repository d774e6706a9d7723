"""A survey that moves the parameters in the same pass, surveys of one unit, and what a program takes."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")
from helpers.units import device_units
from test_fused import make_groups, refresh

from fastals.kernels.arena import STATE
from fastals.kernels.moments import survey
from fastals.kernels.table import BLOCK, MOST_CHUNKS, Entry, Table
from fastals.kernels.trial import trial

pytestmark = pytest.mark.proves(claim="fused-kernels")
RAGGED = [1, 7, 2 * BLOCK + 1, BLOCK - 1, BLOCK, BLOCK + 1, 300, 511, 512, 513]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOVE, AT, AVERAGED, HELD = map(STATE.index, ("move", "at", "averaged", "held"))


def build(partition, kind="adam", averages=False, eta=0.125, averaged=False):
    """Units as an earlier step has left them; sums are NaN, and every unit is to stand at its step."""
    groups, state = make_groups(partition, seed=5, weight_decay=0.1)
    device = device_units(groups, kind, averages, state, several=True)
    refresh(device)
    device.arena.sums.fill_(math.nan)
    device.arena.grad_scale.fill_(0.7)
    device.arena.state[:, MOVE] = eta
    device.arena.state[:, AT] = math.nan
    device.arena.state[:, AVERAGED] = float(averaged)
    return groups, device


def contents(groups, device):
    """Bits of all that a survey may write."""
    params = [p.detach() for g in groups for p in g["params"]]
    arena = device.arena
    return [t.clone().view(torch.uint8) for t in (*params, arena.w, arena.sums)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow(keep=9)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "averages", "tested"), [
    ("adam", False, True), ("sgd", False, True), ("adam", True, True), ("sgd", True, True), ("adam", True, False),
])  # fmt: skip
def test_it_is_a_survey_and_then_a_trial_to_the_last_bit(dtype, kind, averages, tested):
    partition = [[(n, dtype, n != 300, 2) for n in RAGGED], [(64, dtype, True, 0)] * 3]
    averaged = averages and tested
    groups, device = build(partition, kind, averages, averaged=averaged)
    before, count = contents(groups, device), len(RAGGED) + 3
    survey(device.table, device.arena, averaged=tested)
    assert same(before[:count], contents(groups, device)[:count]), "a survey alone moves nothing"
    trial(device.table, device.arena)
    wanted = contents(groups, device)
    twins, twin = build(partition, kind, averages, averaged=averaged)
    survey(twin.table, twin.arena, averaged=tested, move=True)
    assert same(contents(twins, twin), wanted)
    assert not torch.equal(wanted[2], before[2])
    assert twin.arena.state[:2, AT].tolist() == twin.arena.state[:2, MOVE].tolist() == [0.125] * 2
    assert twin.arena.state[:2, HELD].tolist() == device.arena.state[:2, HELD].tolist() == [1.0] * 2
    assert math.isnan(device.arena.state[0, AT])
    twin.arena.state[:, MOVE] = 0.0
    trial(twin.table, twin.arena)
    assert same(contents(twins, twin)[:count], before[:count]), "it is undone bitwise"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_a_gradient_that_is_not_finite_shows_in_its_unit_alone_and_is_undone(dtype, bad):
    groups, device = build([[(BLOCK + 9, dtype, True, 0), (65, dtype, True, 0)], [(65, dtype, True, 2)]])
    p, q, other = (p for g in groups for p in g["params"])
    with torch.no_grad():
        q[0] = -0.0
    p.grad[BLOCK + 3] = bad
    before = contents(groups, device)
    survey(device.table, device.arena, move=True)
    assert not math.isfinite(float(device.arena.sums[0, 0]))
    assert torch.isfinite(other).all()
    assert torch.isfinite(device.arena.sums[1]).all()
    device.arena.state[:, MOVE] = 0.0
    trial(device.table, device.arena)
    assert same(contents(groups, device)[:3], before[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_survey_of_one_unit_leaves_all_others_alone(dtype):
    partition = [[(65, dtype, True, 0)], [(BLOCK + 1, dtype, True, 2), (7, torch.float32, True, 0)]]
    partition.append([(64, dtype, True, 0)])
    groups, device = build(partition)
    arena, before = device.arena, contents(groups, device)
    held = [device.units[row].w_views[0].clone() for row in (0, 2)]
    survey(device.table, arena, unit=1, move=True)
    after = contents(groups, device)
    assert [torch.equal(a, b) for a, b in zip(before[:4], after[:4], strict=True)] == [True, False, False, True]
    assert arena.state[:3, HELD].tolist() == [0, 1, 0]
    assert [math.isnan(x) for x in arena.sums[:, 0].tolist()] == [True, False, True]
    assert [math.isnan(x) for x in arena.state[:3, AT].tolist()] == [True, False, True]
    assert same([device.units[row].w_views[0] for row in (0, 2)], held)
    twin = build(partition)[1]
    survey(twin.table, twin.arena)
    assert torch.equal(arena.sums[1], twin.arena.sums[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_zero_and_a_missing_gradient_write_no_parameter(dtype):
    groups, device = build([[(65, dtype, True, 0)], [(65, dtype, False, 2)]], eta=0.0)
    device.arena.state[1, MOVE] = 0.5
    w = device.units[1].w_views[0].clone()
    before = contents(groups, device)
    survey(device.table, device.arena, move=True)
    assert same(contents(groups, device)[:2], before[:2])
    assert torch.equal(device.units[1].w_views[0], w)
    assert not device.arena.sums[1].any()
    assert device.arena.state[:2, HELD].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_masters_follow_only_what_was_written(dtype):
    groups, device = build([[(BLOCK + 65, dtype, True, 2)]], eta=0.0)
    (p,), (w,) = groups[0]["params"], device.units[0].w_views
    w.copy_(p.detach().float() * (1 + 2**-13))
    w.copy_(torch.where(w.to(dtype) == p, w, p.detach().float()))
    wanted = w.clone()
    survey(device.table, device.arena, move=True)
    assert torch.equal(w, wanted)
    with torch.no_grad():
        p[3], p[BLOCK + 64] = 5.0, 7.0
    wanted[3], wanted[BLOCK + 64] = 5.0, 7.0
    survey(device.table, device.arena, move=True)
    assert torch.equal(w, wanted)


def table_of(units):
    params = [(torch.nn.Parameter(torch.empty(n, device="meta")), u) for u, sizes in enumerate(units) for n in sizes]
    table = Table([Entry(p, 0, u, 0) for p, u in params])
    table.device = torch.device("cpu")
    table._cut([(torch.float32, torch.float32)] * len(params))
    (chunks,) = table.by_dtypes.values()
    return table, chunks


BERT_LAYER = [768 * 768] * 4 + [768] * 9 + [3072 * 768, 3072, 768 * 3072]
BERT = [[30522 * 768, 512 * 768, 2 * 768, 768, 768], *[BERT_LAYER] * 12, [768 * 768, 768, 5 * 768, 5]]
SETS = {"LoRA": ([[8 * 768] * 12] * 12, 432, 216), "biases": ([[64] * 256], 256, 32), "BERT": (BERT, 53537, 26726)}


@pytest.mark.parametrize(("units", "chunks", "programs"), SETS.values(), ids=SETS)
def test_how_many_programs_a_set_of_tensors_takes(units, chunks, programs):
    table, found = table_of(units)
    assert (table.n_chunks, len(found.programs)) == (chunks, programs)


def test_a_program_takes_neighbours_of_one_unit():
    """At most two whole chunks and few small ones; every chunk once, and rows of a unit side by side."""
    table, found = table_of([RAGGED * 3, [5] * 40, [], [BLOCK * 5]])
    rows = found.programs.tolist()
    assert [first for first, *_ in rows] == [0] + [last for _, last, *_ in rows[:-1]]
    assert rows[-1][1] == table.n_chunks == len(found.rows)
    unit_of = [table.entries[p].unit for p, _ in found.rows.tolist()]
    sizes = [min(BLOCK, table.sizes[p] - b * BLOCK) for p, b in found.rows.tolist()]
    for first, last, row, unit in rows:
        assert set(unit_of[first:last]) == {unit}
        assert last - first <= MOST_CHUNKS
        assert sizes[first:last].count(BLOCK) <= 2
        assert table.spans[unit, 0] <= row < table.spans[unit, 1]
    assert all(a[3] <= b[3] for a, b in pairwise(rows))
    assert table.most_chunks == max(Counter(unit_of).values())
    assert not len(found.of_unit(2))
    assert sum(len(found.of_unit(u)) for u in range(4)) == len(found.of_unit(None))
