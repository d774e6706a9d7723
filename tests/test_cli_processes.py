"""The command line in several processes: the steps of one, written once, resumed bit by bit, and errors of all."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.commands import in_two, stopped
from helpers.films import arguments, lines, load, save_model, save_table, weights

from fastals.cli.main import main

BOTH = 0, 1  # ranks
ALONE = {"als": ["--units", "2"], "adamw": ["--optimizer", "adamw"]}  # without dropout, so that one process does alike
WRONG = {
    "--batch-size 3 cannot be cut into 2 equal parts": ["--batch-size", "3"],
    "leave out --compare": ["--compare"],
    "the reference in one process": ["--optimizer", "eager"],
    "exists already": ["--name", "there"],
    "there is no file mine.csv": ["--dataset", "mine.csv"],  # the first process has one
    "has 2 blocks": ["--units", "7"],
    "leave out --model": ["--resume", "no/run"],
    "choose another --output": ["--output", "mine.csv"],
}


class Films:
    """A folder with two models, with and without dropout, a table of texts, and the runs."""

    def __init__(self, folder):
        self.folder, self.runs, self.table = folder, folder / "runs", folder / "films.csv"
        save_model(folder / "model")
        save_model(folder / "plain", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        save_table(self.table)

    def train(self, name, *more, model="model"):
        return arguments(self.folder / model, self.table, self.folder, "--steps", "8", "--name", name, *more)

    def resume(self, name):
        return ["finetune", "--resume", str(self.runs / name)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return Films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def heard(films):
    """What two processes say of many command lines, one after the other in the same processes."""
    assert stopped(films.train("of_one"), 2)[0] == 130
    (films.runs / "there").mkdir()
    (films.folder / "rank0").mkdir()
    save_table(films.folder / "rank0" / "mine.csv")
    shutil.copytree(films.runs / "of_one", films.folder / "rank0" / "cut")
    (films.folder / "rank0" / "cut" / "checkpoint.pt").write_bytes(b"PK")
    commands = {message: films.train("wrong", *more) for message, more in WRONG.items()}
    commands["cut"] = ["finetune", "--resume", "cut"]
    commands |= {name: films.train(name, *more, model="plain") for name, more in ALONE.items()}
    commands |= {name: films.train(name) for name in ("straight", "broken", "of_two")}
    commands |= {f"resume {name}": films.resume(name) for name in ("broken", "of_one")}
    stops = {i: 4 for i, name in enumerate(commands) if name in ("broken", "of_two")}
    return dict(zip(commands, in_two(films.folder, list(commands.values()), stops), strict=True))


def decisions(line):
    return line["joint_trials"], [(u["name"], u["trials"], u["outcome"]) for u in line["units"]]


def flat(state):
    return torch.cat([w.flatten() for w in state.values()])


@pytest.mark.parametrize("name", ALONE)
def test_two_processes_take_the_steps_of_one(heard, films, name):
    (code, out, _), second = heard[name]
    assert (code, second) == (0, (0, "", ""))
    assert out.count("report.html") == out.count("parameters) on") == out.count("held-out accuracy ") == 1
    assert main(films.train(f"{name}_alone", *ALONE[name], model="plain")) == 0
    two, alone = films.runs / name, films.runs / f"{name}_alone"
    assert {f.name for f in two.iterdir()} == {f.name for f in alone.iterdir()}
    assert len(lines(two)) == 8
    for line, expected in zip(lines(two), lines(alone), strict=True):
        assert line["loss_before"] == pytest.approx(expected["loss_before"], rel=1e-5)
        assert name == "adamw" or decisions(line) == decisions(expected)
    start, end = flat(load(films.folder / "plain")), flat(weights(alone))
    assert (flat(weights(two)) - end).norm() < 1e-4 * (end - start).norm()


def test_an_interrupted_run_resumes_with_the_same_trajectory(heard, films):
    """Ctrl-C reaches the second process alone."""
    broken, straight = films.runs / "broken", films.runs / "straight"
    assert [heard["broken"][rank][0] for rank in BOTH] == [130, 130]
    assert "torchrun --nproc-per-node 2 --no-python fastals finetune --resume" in heard["broken"][0][2]
    assert heard["broken"][1][1:] == ("", "")
    assert [heard["resume broken"][rank][0] for rank in BOTH] == [0, 0]
    assert lines(broken) == lines(straight)
    found, expected = weights(broken), weights(straight)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_run_goes_on_in_fewer_processes_and_in_more(heard, films):
    assert len(lines(films.runs / "of_two")) == 5
    assert main(films.resume("of_two")) == 0
    assert lines(films.runs / "of_two")[:5] == lines(films.runs / "straight")[:5]
    assert [heard["resume of_one"][rank][0] for rank in BOTH] == [0, 0]
    for name in ("of_one", "of_two"):
        assert [line["step"] for line in lines(films.runs / name)] == list(range(1, 9))


@pytest.mark.parametrize("message", WRONG)
def test_errors_are_those_of_all_and_told_once(heard, films, message):
    (code, out, error), second = heard[message]
    assert (code, out, second) == (2, "", (2, "", ""))
    assert message in error
    assert error.count("\n") == 1
    assert not (films.runs / "wrong").exists()
    assert not list((films.runs / "there").iterdir())


def test_a_damaged_checkpoint_is_refused_in_all_and_told_once(heard):
    (code, _, error), second = heard["cut"]
    assert (code, second) == (2, (2, "", ""))
    assert "cut/checkpoint.pt is damaged" in error
    assert error.count("\n") == 1


def test_processes_that_cannot_meet_are_told_of_torchrun(films, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(films.train("apart")) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_on_torchrun_saves_a_checkpoint(films):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastals.cli.main"]
    command = [sys.executable, "-m", *torchrun, *films.train("torchrun", "--steps", "5000")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, env=environment, cwd=films.folder, stderr=subprocess.PIPE, text=True)
    run, deadline = films.runs / "torchrun", time.monotonic() + 60
    try:
        while not (run / "metrics.jsonl").exists() or len(lines(run)) < 3:
            assert launcher.poll() is None, launcher.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(signal.SIGINT)
        _, error = launcher.communicate(timeout=40)
    finally:
        launcher.terminate()  # it ends its processes
        launcher.wait(40)
    assert error.count("interrupted; go on with") == 1
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["step"] == len(lines(run))
    (mine, _), (other, _) = saved["rng"]
    assert not torch.equal(mine, other)  # every process draws dropout masks of its own
