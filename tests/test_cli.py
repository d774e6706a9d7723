"""The command line on tiny models and files: what it writes, how it resumes, and what it says of wrong input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.commands import stopped
from helpers.films import arguments, lines, save_model, save_table, weights
from transformers import BertForSequenceClassification

from fastals.cli.data import load_texts
from fastals.cli.main import main


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a two-block BERT and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture
def table(tmp_path):
    """A csv file with two separable classes."""
    path = tmp_path / "films.csv"
    save_table(path)
    return path


def start(command):
    """The command line in a process of its own: two runs are equal bit by bit only with the same threads."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "fastals.cli.main", *command], env=environment)


def test_a_run_writes_metrics_summary_pictures_and_model(model, table, tmp_path, capsys):
    assert main(arguments(model, table, tmp_path, "--steps", "6")) == 0
    folder = tmp_path / "runs" / "one"
    steps = lines(folder)
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert [u["name"] for u in steps[0]["units"]] == [
        "embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "head",
    ]
    assert all(s["loss_after"] <= s["loss_before"] for s in steps)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6
    assert 0 <= summary["accuracy"] <= 1
    assert summary["loss"] == steps[-1]["loss_before"]
    assert 3 < summary["forwards"] / 6 < 20
    for picture in ("loss.png", "step_sizes.png"):
        assert (folder / picture).stat().st_size > 5000
    BertForSequenceClassification.from_pretrained(folder / "model")
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert out.splitlines()[-3:] == [
        f"model    {folder / 'model'}", f"metrics  {folder / 'metrics.jsonl'}", f"report   {folder / 'report.html'}",
    ]  # fmt: skip


def test_compare_runs_the_same_batches_with_every_optimizer(model, table, tmp_path):
    assert main(arguments(model, table, tmp_path, "--steps", "4", "--compare")) == 0
    folder = tmp_path / "runs" / "one"
    als, eager, adamw = lines(folder), lines(folder / "eager"), lines(folder / "adamw")
    assert als[0]["loss_before"] == eager[0]["loss_before"] == adamw[0]["loss_before"]
    for fast, slow in zip(als, eager, strict=True):
        assert [u["trials"] for u in fast["units"]] == [u["trials"] for u in slow["units"]]
    assert adamw[-1]["units"] == []


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_an_interrupted_run_resumes_with_the_same_trajectory(model, table, tmp_path, stop):
    straight = start(arguments(model, table, tmp_path / "straight", "--steps", "40", "--checkpoint-every", "5"))
    assert straight.wait(120) == 0
    folder = tmp_path / "broken" / "runs" / "one"
    process = start(arguments(model, table, tmp_path / "broken", "--steps", "40", "--checkpoint-every", "5"))
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() or len(lines(folder)) < 7:
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait(60) == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert not (folder / "summary.json").exists()
    assert start(["finetune", "--resume", str(folder)]).wait(120) == 0
    whole = tmp_path / "straight" / "runs" / "one"
    assert lines(folder) == lines(whole)
    resumed, uninterrupted = weights(folder), weights(whole)
    assert all(torch.equal(resumed[k], uninterrupted[k]) for k in resumed)


def test_report_draws_finished_runs_together(model, table, tmp_path, capsys):
    for name in ("a", "b"):
        assert main([*arguments(model, table, tmp_path, "--steps", "2"), "--name", name]) == 0
    capsys.readouterr()
    runs = [str(tmp_path / "runs" / name) for name in ("a", "b")]
    assert main(["report", *runs, "--output", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "report_loss.png").stat().st_size > 5000
    assert "accuracy" in capsys.readouterr().out


def test_merging_units_shows_in_the_metrics(model, table, tmp_path):
    assert main(arguments(model, table, tmp_path, "--steps", "8", "--merge-below", "1")) == 0
    counts = [len(s["units"]) for s in lines(tmp_path / "runs" / "one")]
    assert counts[0] == 4
    assert counts[-1] == 2


def test_a_run_whose_losses_are_not_finite_comes_to_its_end(model, table, tmp_path, capsys):
    more = ["--steps", "5", "--optimizer", "adamw", "--adamw-lr", "1e30"]
    assert main(arguments(model, table, tmp_path, *more)) == 0
    assert lines(tmp_path / "runs" / "one")[-1]["loss_before"] is None
    assert "nan" in capsys.readouterr().out


def test_a_run_that_has_diverged_goes_on(model, table, tmp_path):
    more = ["--steps", "4", "--optimizer", "adamw", "--adamw-lr", "1e30"]
    assert stopped(arguments(model, table, tmp_path, *more), 3)[0] == 130
    assert main(["finetune", "--resume", str(tmp_path / "runs" / "one")]) == 0


def test_one_run_of_a_comparison_goes_on_alone(model, table, tmp_path):
    assert main(arguments(model, table, tmp_path, "--steps", "2", "--compare")) == 0
    folder = tmp_path / "runs" / "one" / "adamw"
    (folder / "summary.json").unlink()
    assert main(["finetune", "--resume", str(folder)]) == 0
    assert (folder / "summary.json").exists()
    assert not (folder / "als").exists()


def test_presets_and_patterns_train(model, table, tmp_path):
    more = ["--steps", "3", "--units", "attention,intermediate"]
    assert main(arguments(model, table, tmp_path, *more, "--preset", "plasls")) == 0
    assert {u["name"] for u in lines(tmp_path / "runs" / "one")[0]["units"]} == {"attention", "intermediate", "rest"}


def test_a_part_of_an_epoch_is_a_step_at_least(model, table, tmp_path):
    assert main(arguments(model, table, tmp_path, "--epochs", "0.01")) == 0
    assert len((tmp_path / "runs" / "one" / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_existing_run_is_not_overwritten(model, table, tmp_path, capsys):
    assert main(arguments(model, table, tmp_path, "--steps", "2")) == 0
    before = (tmp_path / "runs" / "one" / "metrics.jsonl").read_bytes()
    assert main(arguments(model, table, tmp_path, "--steps", "2")) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "runs" / "one" / "metrics.jsonl").read_bytes() == before


def test_glue_tasks_bring_their_own_columns_and_validation_split(monkeypatch):
    import datasets

    rows = {"premise": ["a", "b", "c"], "hypothesis": ["x", "y", "z"], "label": [0, 1, 2]}
    asked = []

    def load(*name):
        asked.append(name)
        part = datasets.Dataset.from_dict(rows)
        return datasets.DatasetDict({"train": part, "validation_matched": part.select([0]), "test_matched": part})

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_texts("glue/mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert task.train == [(("a", "x"), 0), (("b", "y"), 1), (("c", "z"), 2)]
    assert task.held_out == [(("a", "x"), 0)]
