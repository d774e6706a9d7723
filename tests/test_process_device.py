"""Fused and recorded steps in several processes: those of the plain path, and of one process."""

import pytest
from helpers import interpreter
from helpers.parallel import batch, decisions, parallel, tiny_llama, whole
from helpers.processes import together
from helpers.recording import interpreted, recorded
from helpers.tiny import assert_same

import fastals

pytestmark = interpreted
FORCED = {"c": 0.9, "trust": 1.0, "eps": 1e-4}
CASES = {
    "relay": (3, FORCED | {"max_grad_norm": 0.3}),
    "sweep": (2, FORCED | {"schedule": "sweep", "momentum": "tested", "weight_decay": 0.1}),
}


def small():
    return tiny_llama(num_hidden_layers=1)


def train(rank, kind, options, steps):
    with interpreter.faster():
        return train_fused(rank, kind, options, steps)


def train_fused(rank, kind, options, steps):
    model = parallel(kind, small())
    opt, found = fastals.ALS(model, fused=True, **options), []
    for step in range(steps):
        data = batch(step, rank, 2)
        opt.step(lambda data=data: model(**data).loss)
        found.append((decisions(opt.report), opt.report.collectives))
    assert opt.engine.fused
    return found, whole(model)


def close(ours, theirs):
    for (units, *joint), (others, *their_joint) in zip(ours, theirs, strict=True):
        assert [u[:3] for u in units] == [u[:3] for u in others]
        assert [u[3] for u in units] == pytest.approx([u[3] for u in others], rel=1e-3)
        assert joint == pytest.approx(their_joint, rel=1e-4, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fused_steps_are_those_of_one_process(kind):
    for steps, options in CASES.values():
        found = together(2, train, kind, options, steps)
        expected, weights = alone(options, steps)
        for ours, own_weights in found:
            assert repr(ours) == repr(found[0][0])
            close([d for d, _ in ours], expected)
            assert max(float((own_weights[n] - w).norm() / w.norm()) for n, w in weights.items()) < 1e-5


def alone(options, steps):
    """One process with all data, on the plain path."""
    model = small()
    opt, found = fastals.ALS(model, fused=False, **options), []
    for step in range(steps):
        data = [batch(step, part, 2) for part in range(2)]
        opt.step([lambda d=d: model(**d).loss / 2 for d in data])
        found.append(decisions(opt.report))
    return found, whole(model)


def train_recorded(rank, uneven):
    with interpreter.faster():
        return train_beside(rank, uneven)


def train_beside(rank, uneven):
    """The captured step beside the eager one, on batches whose shapes may differ between the processes."""
    model, twin = (parallel("ddp", small()) for _ in range(2))
    options = {"fused": True, "eps": 1e-4, "schedule": "sweep"}
    opt, eager, log = fastals.ALS(model, **options), fastals.ALS(twin, **options), []
    step_of = recorded(opt, model, lambda data: model(**data).loss, log=log)
    modes = []
    for step in range(8 if uneven else 5):
        data = batch(step, rank, 3 if uneven and rank and step % 2 else 2)
        loss = step_of(data)
        assert_same(float(loss), float(eager.step(lambda data=data: twin(**data).loss)))
        assert_same(opt.report.units, eager.report.units)
        modes.append(step_of.mode)
    assert_same(whole(model), whole(twin))
    return modes, log.count("capture"), opt.report.as_dict() | {"collectives": 0, "reduced_bytes": 0}


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True], ids=["alike", "uneven"])
def test_recorded_steps_are_the_eager_ones_and_captured_by_all_at_once(uneven):
    (modes, captures, report), others = together(2, train_recorded, uneven, limit=120)
    assert_same([modes, captures, report], list(others))
    assert modes[-1].name == ("eager" if uneven and captures == 0 else "host")
    assert "several processes" in modes[-1].reason
