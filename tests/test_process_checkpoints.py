"""Checkpoints of several processes: resumed by as many, by others, and after all of them were killed."""

import os
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.parallel import KINDS, batch, decisions, parallel, sizes, tiny_llama, whole
from helpers.processes import together
from helpers.tiny import assert_same
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fastals

DATA = 4  # parts of a mini-batch, whatever the number of processes
OPTIONS = {"momentum": "after", "eps": 1e-4}


def build(kind):
    model = parallel(kind, tiny_llama()) if kind else tiny_llama()
    return model, fastals.ALS(model, **OPTIONS)


def steps(kind, model, opt, first, last):
    """Train on these steps; every process has its share of four parts."""
    parts, shared = KINDS[kind] if kind else (1, 1)
    part = int(os.environ.get("RANK", 0)) // shared if kind else 0
    mine = range(part * DATA // parts, (part + 1) * DATA // parts)
    found = []
    for step in range(first, last):
        data = [batch(step, i, sizes(DATA, uneven=True)[i]) for i in mine]
        opt.step([lambda d=d: model(**d).loss * parts / DATA for d in data])
        found.append(decisions(opt.report))
    return found


def save(model, opt, folder):
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model, opt, folder):
    weights, state = get_state_dict(model, opt)
    both = {"model": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=both["model"], optim_state_dict=both["optimizer"])


def start_and_go_on(rank, kind, folder):
    """Two steps, a checkpoint, and two more."""
    model, opt = build(kind)
    steps(kind, model, opt, 0, 2)
    save(model, opt, folder)
    return steps(kind, model, opt, 2, 4), whole(model)


def resume(rank, kind, folder):
    """The two steps after the checkpoint."""
    model, opt = build(kind)
    load(model, opt, folder)
    return steps(kind, model, opt, 2, 4), whole(model)


def alike(found, expected):
    (ours, weights), (theirs, others) = found, expected
    for (units, *joint), (their_units, *their_joint) in zip(ours, theirs, strict=True):
        assert [u[:3] for u in units] == [u[:3] for u in their_units]
        assert joint == pytest.approx(their_joint, rel=1e-4, nan_ok=True)
    assert max(float((weights[n] - others[n]).norm() / others[n].norm()) for n in others) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by one process
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_a_checkpoint_is_resumed_bitwise_by_as_many_processes_and_alike_by_others(kind, tmp_path):
    straight = together(2, start_and_go_on, kind, tmp_path)
    assert_same(together(2, resume, kind, tmp_path), straight)
    alike(resume(0, "", tmp_path), straight[0])
    for other in ("fsdp4", "hsdp", "ddp4"):
        alike(together(4, resume, other, tmp_path)[0], straight[0])


def go_on_until_killed(rank, kind, folder, killed_at):
    """A checkpoint after every step; all processes are killed amid a step."""
    model, opt = build(kind)
    done = len(os.listdir(folder))
    if done:
        load(model, opt, f"{folder}/{done}")
    for step in range(done, 4):
        calls = []

        def dying(loss, calls=calls, step=step):
            calls.append(1)
            if (step, len(calls)) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        plain, model.forward = model.forward, lambda *a, plain=model.forward, **k: dying(plain(*a, **k))
        steps(kind, model, opt, step, step + 1)
        model.forward = plain
        save(model, opt, f"{folder}/{step + 1}")
    return whole(model)


@pytest.mark.slow
def test_all_killed_amid_a_step_resume_from_the_last_checkpoint_bitwise(tmp_path):
    kind, (killed, straight) = "fsdp", (tmp_path / "killed", tmp_path / "straight")
    killed.mkdir()
    straight.mkdir()
    expected = together(2, go_on_until_killed, kind, straight, None)
    together(2, go_on_until_killed, kind, killed, (2, 5), dying={0, 1})
    assert sorted(os.listdir(killed)) == ["1", "2"]
    assert_same(together(2, go_on_until_killed, kind, killed, None), expected)


def full_state(rank, kind, path):
    """A state dict of plain tensors, as one process writes it, is loaded into shards."""
    _, opt = build(kind)
    loaded = torch.load(path, weights_only=True)
    opt.load_state_dict(loaded["optimizer"])
    opt.engine.make_state()
    return [
        float((v.full_tensor() - loaded["optimizer"]["state"][i][k]).abs().max())
        for i, p in enumerate(p for g in opt.param_groups for p in g["params"])
        for k, v in opt.state[p].items()
        if k != "step"
    ]


def test_a_plain_state_dict_is_loaded_into_shards(tmp_path):
    model, opt = build("")
    steps("", model, opt, 0, 2)
    torch.save({"optimizer": opt.state_dict()}, tmp_path / "state.pt")
    for differences in together(2, full_state, "fsdp", tmp_path / "state.pt"):
        assert differences
        assert not any(differences)
