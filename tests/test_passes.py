"""Passes over a unit's buffers, a block at a time, against one block per segment and against float64."""

import gc
import math

import pytest
import torch
from helpers.units import passes
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastals import blocks
from fastals.buffers import Unit

kinds = st.sampled_from(["adam", "sgd"])
seeds = st.integers(0, 2**31)
SHAPES = st.sampled_from([(1,), (63,), (64,), (65,), (), (0,), (5, 7), (130, 3), (2, 3, 4, 5), (8, 8, 3, 3)])
FORMATS = st.sampled_from(["plain", "parameter", "gradient"])  # what of a parameter is not contiguous
partitions = st.lists(st.tuples(SHAPES, FORMATS, st.booleans(), st.integers(0, 2)), min_size=1, max_size=6).filter(
    lambda partition: any(has_gradient for _, _, has_gradient, _ in partition)
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def numbers(shape, dtype, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def turned(x):
    """The same numbers with another order in memory."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def make(partition, dtype=torch.float32, kind="adam", seed=0, scale=1.0, decay=0.1):
    """Passes that have begun a mini-batch, with the state of their optimizer."""
    params, state = [], {}
    for j, (shape, kept, has_gradient, count) in enumerate(partition):
        p, g = (numbers(shape, dtype, seed + 10 * j + k) for k in (0, 1))
        p = torch.nn.Parameter(turned(p) if kept == "parameter" else p)
        if has_gradient:
            p.grad = turned(g) if kept == "gradient" else g
        wide = torch.promote_types(dtype, torch.float32)
        moments = numbers(shape, wide, seed + 10 * j + 2), numbers(shape, wide, seed + 10 * j + 3).abs()
        state[p] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
        state[p] |= {"step": torch.tensor(float(count)), "master": p.detach().to(wide)}
        params.append(p)
    group = {"name": "g", "params": params, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": decay}
    unit = Unit([group], state, adam=kind == "adam")
    unit.find_active()
    twin = passes(unit)
    twin.begin()
    twin.grad_scale = scale
    return twin, state


def bits(tensors):
    return [x.detach().clone().contiguous().view(-1).view(torch.uint8) for x in tensors]


def everything(twin):
    """Parameters and buffers, to the last bit."""
    return bits([p for p, _ in twin.unit.members]) + bits([twin.unit.m, twin.unit.v, twin.unit.w])


def assert_same(mine, theirs):
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture
def size(monkeypatch):
    """Sets the size of the blocks that are cut from now on."""
    return lambda n: monkeypatch.setattr(blocks, "largest", lambda device: n)


# Blocks of any size do the same


@given(
    partition=partitions, dtype=dtypes, kind=kinds, seed=seeds, averaged=st.booleans(),
    size=st.sampled_from([64, 128, 192]), scale=st.sampled_from([1.0, 0.3]), decay=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_small_blocks_do_the_same_as_one_per_segment(partition, dtype, kind, seed, averaged, size, scale, decay):
    whole, whole_state = make(partition, dtype, kind, seed, scale, decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "largest", lambda device: size)
        small, small_state = make(partition, dtype, kind, seed, scale, decay)
    before = bits(whole.unit.params)
    for sums in (small.survey(averaged, 0.25), small.survey(averaged)):
        assert sums == pytest.approx(whole.survey(averaged, 0.25), rel=1e-5, abs=1e-4)
    assert small.weight_norm == pytest.approx(whole.weight_norm, rel=1e-6)
    assert_same(everything(small), everything(whole))
    for eta in (0.5, 0.0, 0.125):
        small.trial(eta)
        whole.trial(eta)
        assert_same(everything(small), everything(whole))
        if not eta:
            assert_same(bits(small.unit.params), before)
    for twin, state in ((small, small_state), (whole, whole_state)):
        twin.commit(state, 0.125)
    assert_same(everything(small), everything(whole))
    assert small.unit.counts == whole.unit.counts


@given(partition=partitions, dtype=dtypes, kind=kinds, seed=seeds, scale=st.sampled_from([1.0, 0.3]))
def test_sums_of_small_blocks_against_float64(partition, dtype, kind, seed, scale):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "largest", lambda device: 64)
        twin, _ = make(partition, dtype, kind, seed, scale)
    before = [p.detach().clone() for p in twin.unit.active_params()]
    sums = twin.survey(False)
    slope, length = sums.slope, sums.length
    twin.trial(0.0)
    g, d, w = [], [], []
    for i in twin.unit.active:
        p, v, count = twin.unit.members[i][0], twin.unit.v_views, twin.unit.counts[i] + 1
        scaled, weights = scale * p.grad.double(), p.detach().double()
        if kind == "adam":
            scaled = scaled / (((0.99 * v[i].double() + 0.01 * scaled**2) / (1 - 0.99**count)).sqrt() + 1e-8)
        g.append(p.grad.double().flatten())
        d.append((scaled + 0.1 * weights).flatten())
        w.append(weights.flatten())
    g, d, w = map(torch.cat, (g, d, w))
    moving = max(int((g != 0).sum()), 1)
    assert slope == pytest.approx(float(g @ d), abs=1e-6 * float((g * d).abs().sum()))
    assert length == pytest.approx(float(d.norm()) / math.sqrt(moving), rel=1e-6)
    assert twin.weight_norm == pytest.approx(float(w.norm()), rel=1e-6)
    assert sums.weight_rms == pytest.approx(float(w.norm()) / math.sqrt(max(len(w), 1)), rel=1e-6)
    assert twin.gradient_norm() == pytest.approx(float(g.norm()), rel=1e-6)
    assert_same(bits(twin.unit.active_params()), bits(before))


def test_blocks_are_at_most_as_large_as_asked_for_and_cover_every_active_entry(size):
    size(128)
    shapes = [(300,), (65,), (1,), (0,), (64,), (7, 9)]
    twin, _ = make([(shape, "plain", i != 1, i // 4) for i, shape in enumerate(shapes)])
    assert all(len(block.w) <= 128 for block in twin.blocks)
    covered = {i: [] for i in range(len(shapes))}
    for block in twin.blocks:
        for i, part, where in block.pieces:
            covered[i] += range(math.prod(shapes[i])) if part is None else range(part.start, part.stop)
            assert block.w[where].data_ptr() >= block.w.data_ptr()
    expected = {i: list(range(math.prod(shape))) if i != 1 else [] for i, shape in enumerate(shapes)}
    assert covered == expected
    assert len({block.segment for block in twin.blocks}) == 3


def test_what_cannot_be_cut_lies_in_a_block_as_a_whole(size):
    size(128)
    formats = ["plain", "parameter", "plain", "gradient", "parameter", "plain"]
    shapes = [(200,), (20, 20), (300,), (9, 7), (4, 5), (100,)]
    twin, _ = make([(shape, kept, True, 0) for shape, kept in zip(shapes, formats, strict=True)])
    whole = {piece.param for block in twin.blocks for piece in block.pieces if piece.part is None}
    assert whole >= {1, 3, 4}
    assert max(len(block.w) for block in twin.blocks) == 400
    assert all(len(block.w) <= 128 for block in twin.blocks if 1 not in {piece.param for piece in block.pieces})


def test_gradients_are_read_only(size):
    size(64)
    twin, state = make([((130,), "plain", True, 1), ((5,), "plain", True, 1)], scale=0.5)
    before = bits([p.grad for p in twin.unit.active_params()])
    twin.survey(True, 0.25)
    twin.trial(0.5)
    twin.commit(state, 0.5)
    assert_same(bits([p.grad for p in twin.unit.active_params()]), before)


# Blocks are cut for what they hold


def next_batch(twin):
    twin.unit.find_active()
    twin.begin()
    return twin.blocks


def test_blocks_are_cut_anew_only_if_what_they_hold_has_changed(size):
    size(64)
    twin, state = make([((100,), "plain", True, 0), ((20, 20), "plain", True, 0), ((30,), "plain", True, 0)])
    first = twin.blocks
    twin.survey(False, 0.1)
    twin.commit(state, 0.1)
    assert next_batch(twin) is first
    p = twin.unit.members[1][0]
    p.grad = turned(p.grad)
    assert next_batch(twin) is not first
    second, p.grad = twin.blocks, None
    assert next_batch(twin) is not second
    twin.survey(False, 0.1)
    twin.commit(state, 0.1)
    third, p.grad = twin.blocks, numbers((20, 20), torch.float32, 1)
    assert next_batch(twin) is not third
    assert len({block.segment for block in twin.blocks}) == 3  # its count lags behind those of its neighbours


@pytest.mark.parametrize("move", [0.0, 0.25])
def test_a_parameter_that_is_turned_within_a_step_is_restored(size, move):
    size(64)
    twin, state = make([((100,), "plain", True, 0), ((20, 20), "plain", True, 0)])
    before = bits(twin.unit.params)
    twin.survey(False, move)
    p = twin.unit.members[1][0]
    p.data = turned(p.data)
    twin.trial(0.5)
    assert not torch.equal(bits([p])[0], before[1])
    twin.trial(0.0)
    assert_same(bits(twin.unit.params), before)
    twin.commit(state, 0.0)


def test_non_contiguous_parameters_move_as_others_do(size):
    size(64)
    shapes = [(20, 20), (7, 9), (3, 4, 5)]
    twins = [make([(shape, kept, True, 1) for shape in shapes]) for kept in ("plain", "parameter", "gradient")]
    for twin, state in twins:
        twin.survey(True, 0.25)
        twin.commit(state, 0.25)
        assert_same(everything(twin), everything(twins[0][0]))


# A pass that is interrupted


class Operations(TorchDispatchMode):
    """Counts operations and raises at one of them, before it or after it."""

    def __init__(self, limit=-1, after=False):
        super().__init__()
        self.calls, self.limit, self.after = 0, limit, after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        here = self.calls == self.limit
        self.calls += 1
        if here and not self.after:
            raise KeyboardInterrupt
        result = func(*args, **(kwargs or {}))
        if here:
            raise KeyboardInterrupt
        return result


MIXED = [
    ((70,), "plain", True, 0),
    ((5, 3), "parameter", True, 0),
    ((9,), "plain", False, 0),
    ((60,), "plain", True, 1),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interrupted", ["survey", "second survey", "trial", "first trial", "hold"])
def test_an_interrupted_pass_is_undone_bitwise(size, interrupted, dtype, after):
    size(64)

    def run(limit):
        twin, _ = make(MIXED, dtype)
        before = bits(twin.unit.params)
        twin.unit.w.fill_(math.nan)  # nothing of it may come back before it is held
        if interrupted in ("second survey", "trial"):
            twin.survey(False, 0.5)
        passed = Operations(limit, after)
        try:
            with passed:
                if "survey" in interrupted:
                    twin.survey(True, 0.25)
                elif interrupted == "hold":
                    twin.hold()
                else:
                    twin.trial(0.25)
        finally:
            twin.trial(0.0)
            assert_same(bits(twin.unit.params), before)
        return passed.calls

    for limit in range(run(-1)):
        with pytest.raises(KeyboardInterrupt):
            run(limit)


def test_the_next_batch_starts_afresh_after_an_interrupted_one(size):
    size(64)
    twin, _ = make(MIXED)
    with pytest.raises(KeyboardInterrupt), Operations(20):
        twin.survey(True, 0.25)
    twin.trial(0.0)
    with torch.no_grad():
        for p, _ in twin.unit.members:
            p.add_(1)
    before = bits(twin.unit.params)
    next_batch(twin)
    assert not twin.held
    assert twin.weight_norm == 0
    twin.trial(0.0)
    assert_same(bits(twin.unit.params), before)
    other, _ = make(MIXED)
    with torch.no_grad():
        for p, _ in other.unit.members:
            p.add_(1)
    assert twin.survey(True, 0.25) == other.survey(True, 0.25)
    assert twin.weight_norm == other.weight_norm


# Memory


class Storages(TorchDispatchMode):
    """The sizes of all results, in bytes, that lie in memory of their own."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes = {x.untyped_storage().data_ptr() for x in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pass_needs_memory_of_the_size_of_the_unit(size, dtype):
    size(256)
    twin, state = make([((5000,), "plain", True, 1), ((50, 30), "plain", True, 1), ((9,), "plain", True, 1)], dtype)
    unit = twin.unit
    twin = type(twin)(unit, blocks.Scratch(unit.dtype, unit.device))
    params = unit.active_params()
    with Storages([unit.m, unit.v, unit.w, *params, *(p.grad for p in params)]) as found:
        twin.begin()
        twin.grad_scale = 0.5
        twin.survey(True, 0.25)
        twin.trial(0.5)
        twin.trial(0.0)
        twin.commit(state, 0.25)
    assert max(found.sizes) <= 256 * unit.dtype.itemsize


def test_gradients_are_not_kept_after_a_pass():
    twin, state = make([((1000,), "plain", True, 1)])
    twin.survey(True, 0.25)
    twin.commit(state, 0.25)
    there = twin.unit.members[0][0].grad.data_ptr()
    assert len([x for x in gc.get_objects() if type(x) is torch.Tensor and x.data_ptr() == there]) == 1


def test_blocks_that_were_cut_before_the_scratch_grew_still_work(size):
    size(64)
    first, _ = make([((70,), "plain", True, 0)])
    alone = first.survey(False, 0.25)
    second, _ = make([((70,), "plain", True, 0)])
    scratch = blocks.Scratch(torch.float32, torch.device("cpu"))
    twin = type(second)(second.unit, scratch)
    twin.begin()
    large, _ = make([((30, 30), "parameter", True, 0)])
    grown = type(large)(large.unit, scratch)
    grown.begin()
    grown.survey(False, 0.25)
    assert len(scratch.g) == 900
    assert twin.survey(False, 0.25) == alone
