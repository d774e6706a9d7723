"""What the command line says: its version, its help, and the progress of a run in a log and in a terminal."""

import io
import json
import re
import shlex
import sys
import warnings

import pytest
from helpers.films import arguments, save_model, save_table

import fastals
from fastals.cli import progress
from fastals.cli.main import main
from fastals.cli.options import parser

HELP = {"fastals": [], "finetune": ["finetune"], "report": ["report"]}
COUNTS = r"  loss \d\.\d{4}  (\d+\.\d forwards a step)  0:\d\d:\d\d left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def train(tmp_path):
    """Train a tiny model; returns the folder of the run."""
    save_model(tmp_path / "model")
    save_table(tmp_path / "films.csv")

    def run(*more):
        assert main(arguments(tmp_path / "model", tmp_path / "films.csv", tmp_path, *more)) == 0
        return tmp_path / "runs" / "one"

    return run


def said(line, capsys):
    with pytest.raises(SystemExit) as left:
        main(line)
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    assert said(["--version"], capsys) == f"fastals {fastals.__version__}\n"


@pytest.mark.parametrize("command", HELP)
def test_help_fits_a_terminal_and_has_no_empty_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = said([*HELP[command], "--help"], capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"SUPPRESS|default:\s*(None|False|\)|\[)", text)
    examples = re.findall(r"^ {4}(fastals .*)", text, re.MULTILINE)
    assert examples or command == "fastals"
    for example in examples:
        parser(print, print).parse_args(shlex.split(example)[1:])


def test_a_log_has_a_line_of_what_is_trained_one_of_the_first_step_and_one_every_tenth(train, capsys):
    folder = train("--steps", "20")
    out, error = capsys.readouterr()
    assert error == ""
    what, how, *lines = out.splitlines()
    assert re.fullmatch(
        r".*model \(5,\d{3} parameters\) on .*films.csv: 48 training and 12 held-out texts in 2 cl.*", what
    )
    assert how == "20 steps of 4 texts (1.67 epochs) by als on cpu in fp32"
    assert re.fullmatch(r"   als   1/20  loss \d\.\d{4}  \d+\.\d forwards a step", lines.pop(0))
    for step, line in zip(range(2, 20, 2), lines[:9], strict=True):
        assert re.fullmatch(f"   als  {step:2}/20{COUNTS}", line)
    summary = json.loads((folder / "summary.json").read_text())
    assert lines[9] == (
        f"   als  20/20  loss {summary['loss']:.4f}  held-out accuracy {summary['accuracy']:.1%}  "
        f"{summary['forwards'] / 20:.1f} forwards a step"
    )
    assert lines[10].startswith("┏")  # the table


def test_a_terminal_has_one_line_for_each_optimizer(train, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    train("--steps", "4", "--compare")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    shown = [line.rsplit("\r", 1)[-1].rstrip() for line in plain.replace("\r\n", "\n").split("\n")]
    for name, line in zip(("als", "eager", "adamw"), shown[2:5], strict=True):
        assert re.fullmatch(rf" +{name} ━+ 4/4 loss \S+  held-out accuracy \S+%  \S+ forwards a step", line)
    assert shown[5].startswith("┏")


def test_the_time_left_leaves_out_the_first_step(monkeypatch, capsys):
    with progress.Progress("als", 7) as shown:
        for step, now in ((5, 100.0), (6, 101.0), (7, 102.5)):  # of a run that goes on
            monkeypatch.setattr(progress.time, "monotonic", lambda now=now: now)
            shown.show(step, float(step), 2.0)
        shown.finish({"loss": 6.5, "accuracy": 0.5, "forwards": 14.0})
    assert capsys.readouterr().out.splitlines() == [
        "   als  5/7  loss 5.0000  2.0 forwards a step",
        "   als  6/7  loss 5.5000  2.0 forwards a step  0:00:01 left",
        "   als  7/7  loss 6.5000  held-out accuracy 50.0%  2.0 forwards a step",
    ]


def test_a_log_of_slow_steps_has_a_line_every_minute(monkeypatch, capsys):
    shown = progress.Progress("als", 1000)
    for step, now in ((1, 100.0), (2, 150.0), (3, 161.0), (4, 200.0), (5, 222.0)):
        monkeypatch.setattr(progress.time, "monotonic", lambda now=now: now)
        shown.show(step, 1.0, 2.0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/1000", "3/1000", "5/1000"]


def test_a_warning_is_a_line_of_text(monkeypatch):
    texts = []

    def warn(_):
        texts.append(warnings.formatwarning("fastals: what to do", UserWarning, "a.py", 1))
        return 0

    monkeypatch.setattr("fastals.cli.main.finetune", warn)
    assert main(["finetune"]) == 0
    assert texts == ["fastals: what to do\n"]
    assert "a.py" in warnings.formatwarning("fastals: what to do", UserWarning, "a.py", 1)
