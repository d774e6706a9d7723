"""Several processes take the steps that one process takes with the data of all."""

import pytest
import torch
from helpers.parallel import KINDS, batch, parallel, tiny_llama, train, train_alone
from helpers.processes import together
from torch.utils._python_dispatch import TorchDispatchMode

import fastals
from fastals.passes import Sums
from fastals.signals import LOSS

FORCED = {"c": 0.9, "trust": 1.0}  # most first trials are rejected
#: The eps of Adam's direction by which the rounding of gradients close to 0 does not decide the direction.
SMOOTH = {"eps": 1e-4}
CASES = {
    "relay": {}, "relay, forced": FORCED, "sweep, forced": FORCED | {"schedule": "sweep"},
    "after, clipped": {"momentum": "after", "max_grad_norm": 0.3, "weight_decay": 0.1, "schedule": "independent"},
    "tested": {"momentum": "tested", "schedule": "cycle", "reference": "smoothed"},
    "sgd": {"direction": "sgd", "momentum": "tested", "max_grad_norm": 0.3, "weight_decay": 0.1},
    "joint, auto": {"schedule": "joint", "every": "auto", "initial": "polyak", "reference": "nonmonotone"},
    "random": {"schedule": "sweep", "order": "random", "initial": "random"},
}  # fmt: skip


def made(kind):
    return KINDS[kind][0] * KINDS[kind][1]


def same_decisions(ours, theirs):
    """Equal trials and outcomes, and step sizes and losses up to rounding."""
    for (units, *joint), (others, *their_joint) in zip(ours, theirs, strict=True):
        assert [u[:3] for u in units] == [u[:3] for u in others]
        assert [u[3] for u in units] == pytest.approx([u[3] for u in others], rel=1e-3)
        assert joint == pytest.approx(their_joint, rel=1e-4, nan_ok=True)


def furthest(weights, others):
    """The largest relative distance between two weights of one name."""
    return max(float((weights[n] - others[n]).norm() / others[n].norm()) for n in others)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_steps_are_those_of_one_process_with_all_data(kind):
    options = FORCED | SMOOTH
    found = together(made(kind), train, kind, 30, options, True)
    expected, weights = train_alone(kind, 30, options, True)
    assert sum(d[1] for d in expected) > 30, "no joint trial was rejected"
    for ours, own_weights in found:
        assert ours == found[0][0], "the processes have decided otherwise"
        same_decisions(ours, expected)
        assert furthest(own_weights, weights) < 1e-6


def train_all(rank, kind, dtype):
    return [train(rank, kind, 4, options, True, dtype) for options in CASES.values()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_every_schedule_momentum_and_reference(kind):
    found = together(2, train_all, kind, torch.float64)
    for name, options, *ours in zip(CASES, CASES.values(), *found, strict=True):
        expected, weights = train_alone(kind, 4, options, True, torch.float64)
        for decided, own_weights in ours:
            assert repr(decided) == repr(ours[0][0]), name
            same_decisions(decided, expected)
            assert furthest(own_weights, weights) < 1e-9, name


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.counted = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counted[func._opname] = self.counted.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def count_collectives(rank, kind):
    """Reports, forwards and collectives of some steps."""
    model = parallel(kind, tiny_llama(num_hidden_layers=4))
    opt, found = fastals.ALS(model, schedule="sweep"), []
    for step in range(3):
        data = batch(step, rank, 3)
        with Collectives() as collectives:
            opt.step(lambda data=data: model(**data).loss)
        found.append((opt.report, opt.last_forwards, collectives.counted))
    return found


def test_one_reduction_an_evaluation_and_three_a_step():
    units = 6
    report, _, counted = together(2, count_collectives, "ddp")[0][-1]
    assert report.trials == units
    assert report.collectives == units + 4  # f(w_t), its check, sums, commit
    assert report.reduced_bytes == report.collectives * 8 * (LOSS + len(Sums._fields) * units)
    assert report.reduced_bytes < 1024 * report.collectives
    assert counted["allreduce_"] == report.collectives + 1  # gradients


def test_replayed_blocks_of_fsdp_gather_nothing():
    report, forwards, counted = together(2, count_collectives, "fsdp")[0][-1]
    assert (report.trials, forwards) == (6, 1 + (4 + 4 + 3 + 2 + 1 + 0) / 4)
    training, check = 5 + 4, 1  # the root and four blocks forward, the blocks backward; the root
    assert counted["_allgather_base_"] == training + check + (6 + 14)  # the roots and the blocks of the trials
