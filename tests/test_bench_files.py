"""``fastals bench compare``, wrong files, the stamp of a result, and the script for a GPU."""

import json
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import records
import torch
from helpers.results import BENCH, kernel, outside, ratio, run, timing
from stamp import STAMP as STAMP_FIELDS
from stamp import place, slug, stamp

import fastals
from fastals.cli.main import main


def gpu_script(*arguments, **variables):
    return subprocess.run(
        ["bash", BENCH / "gpu.sh", *arguments], capture_output=True, text=True, check=False,
        env=outside() | {"PYTHON": sys.executable} | variables,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what the script does without a GPU")
def test_without_a_gpu_the_script_says_so_and_runs_nothing(tmp_path):
    done = gpu_script("a", OUT=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "sees no CUDA device, so nothing was run" in done.stdout
    assert not list(tmp_path.iterdir())
    assert gpu_script("c").returncode == 64
    mistyped = gpu_script("a", "--dry-run", "smok")
    assert (mistyped.returncode, "part a has no stage smok" in mistyped.stderr) == (64, True)


@pytest.mark.slow
def test_a_dry_run_does_all_but_what_needs_a_gpu_and_packs_what_it_finds(tmp_path):
    done = gpu_script("b", "--dry-run", "kernels-tests", "kernels", OUT=str(tmp_path), FASTALS_COMMIT="abc1234")
    assert not done.returncode, done.stdout + done.stderr
    assert "kernels-tests would run within 160 s" in done.stdout
    assert re.search(r"^kernels-tests +\d+ s  exit   0 .* tests collected", done.stdout, re.MULTILINE)
    (path,) = tmp_path.glob("results-b-*.tar.gz")
    with tarfile.open(path) as packed:
        assert {Path(n).name for n in packed.getnames()} >= {"kernels-tests.log", "kernels-tests.xml", "kernels.log"}


@pytest.mark.parametrize(
    ("old", "new", "code", "word"),
    [
        (ratio("a", 2.0, 1.9, 2.1), ratio("a", 1.5, 1.4, 1.6), 1, "slower"),
        (ratio("a", 1.5, 1.4, 1.6), ratio("a", 2.0, 1.9, 2.1), 0, "faster"),
        (ratio("a", 2.0, 1.4, 2.1), ratio("a", 1.5, 1.4, 1.6), 0, "nothing changed"),
        (ratio("a", 2.0, 1.9, 2.1), ratio("a", 1.5, 1.4, 2.2), 0, "nothing changed"),
        (ratio("a", 2.0, 1.8, 2.1), ratio("a", 1.7, 1.6, 1.85), 0, "nothing changed"),  # the ranges touch
        (ratio("a", 2.0, 1.99, 2.01), ratio("a", 1.91, 1.9, 1.92), 0, "nothing changed"),  # by less than 5 %
        (ratio("a", 1.9, 1.89, 1.91), ratio("a", 2.0, 1.99, 2.01), 0, "faster"),
        (
            kernel(0.9, 0.88, 0.92),
            kernel(0.8, 0.78, 0.82),
            1,
            "slower: bench/bench_step.py::test_bandwidth[bert], trial:",
        ),
        (
            kernel(0.8, 0.78, 0.82),
            kernel(0.9, 0.88, 0.92),
            0,
            "faster: bench/bench_step.py::test_bandwidth[bert], trial:",
        ),
    ],
)
def test_compare_counts_disjoint_ranges_more_than_five_percent_apart(store, capsys, old, new, code, word):
    assert main(["bench", "compare", store("old.json", [old]), store("new.json", [new])]) == code
    assert capsys.readouterr().out.startswith(word)


def test_compare_goes_by_the_ratio_and_not_by_the_time(store):
    old, new = ratio("a", 2.0, 1.9, 2.1), ratio("a", 2.0, 1.9, 2.1)
    new["stats"] = {"median": 9.0, "q1": 8.9, "q3": 9.1}
    assert main(["bench", "compare", store("old.json", [old]), store("new.json", [new])]) == 0


def test_compare_names_the_cases_that_are_missing(store, capsys):
    old = store("old.json", [ratio("a", 2.0, 1.9, 2.1), ratio("b", 2.0, 1.9, 2.1)])
    assert main(["bench", "compare", old, store("new.json", [ratio("a", 2.0, 1.9, 2.1)])]) == 2
    assert "does not have bench/bench_step.py::test_step[b]" in capsys.readouterr().err


def test_compare_judges_no_plain_times(store, capsys):
    measure = ratio("a", 2.0, 1.9, 2.1)
    old = store("old.json", [measure, timing("b", 1.0, (0.9, 1.1), test="look")])
    assert main(["bench", "compare", old, store("new.json", [measure, timing("c", 9.0, (8.9, 9.1), test="look")])]) == 0
    assert capsys.readouterr().out == "nothing changed beyond the spread\n"
    times = store("times.json", [timing("b")])
    for files in ((old, times), (times, old), (times, times), (store("none.json", []), old)):
        assert main(["bench", "compare", *files]) == 2
        assert "nothing can be judged in" in capsys.readouterr().err


def test_compare_names_the_measure_that_is_missing(store, capsys):
    old, new = kernel(0.9, 0.88, 0.92), kernel(0.9, 0.88, 0.92)
    del new["extra_info"]["kernels"]["trial"]
    assert main(["bench", "compare", store("old.json", [old]), store("new.json", [new])]) == 2
    assert "does not have bench/bench_step.py::test_bandwidth[bert], trial\n" in capsys.readouterr().err
    other = store("other.json", [ratio("a", 2.0, 1.9, 2.1, against="adamw")])
    assert main(["bench", "compare", store("eager.json", [ratio("a", 2.0, 1.9, 2.1)]), other]) == 2
    assert "does not have bench/bench_step.py::test_step[a], against eager" in capsys.readouterr().err


def test_compare_prints_the_conditions_that_differ(store, capsys):
    old = store("old.json", [ratio("a", 2.0, 1.9, 2.1, threads=1)])
    changed = {"threads": 2, "torch": "2.14.0", "triton": "3.7", "commit": "def5678", "dirty": True}
    new = store("new.json", [ratio("a", 2.0, 1.9, 2.1, **changed)])
    assert main(["bench", "compare", old, new]) == 0
    conditions = ["threads: 1 -> 2", "torch: 2.13.0 -> 2.14.0", "triton: - -> 3.7", "dirty: False -> True"]
    conditions.append("nothing changed beyond the spread")
    assert capsys.readouterr().out.splitlines() == conditions
    assert main(["bench", "compare", new, new]) == 0
    assert capsys.readouterr().out.splitlines() == ["dirty: True -> True", "nothing changed beyond the spread"]


BAD_CASES = [
    {"spread": None}, {"spread": [1.9]}, {"spread": [1.9, "a"]}, {"spread": "ab"}, {"spread": [2.1, 2.2]},
    {"against": None}, {"speedup": "2"}, {"trials_per_unit": 1.5}, {"trials_per_unit": "12"}, {"by_forwards": "a"},
    {"depth": "a"}, {"peak_mib": 3}, {"length": None}, {"dtype": None}, {"device": None}, {"kernels": [1]},
    *({"kernels": {"trial": {"gbs": 1.0, "of_roof": 0.5, "spread": [0.4, 0.6]} | k}}
      for k in ({"gbs": None}, {"of_roof": "a"}, {"spread": [0.4]})),
    {"copy_roof_gbs": 3012.3},
]  # fmt: skip
BAD_RUNS = [
    {"losses": [], "seconds": [], "forwards": []}, {"seconds": [1.0]}, {"seconds": 3.0}, {"forwards": [1, 2, "a"]},
    {"step_sizes": {"a": [0.1, 0.2], "b": [0.1]}}, {"step_sizes": {}}, {"step_sizes": [[0.1]]}, {"method": 1},
    {"loss": "a"}, {"accuracy": None}, {"perplexity": "a"}, {"trust": "a"}, {"options": None},
    {"options": "a"}, {"task": ["a"]}, {"trials": 8.0},
]  # fmt: skip


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("wrong", BAD_CASES, ids=str)
def test_a_timing_that_lacks_something_is_one_line(store, tmp_path, monkeypatch, capsys, command, wrong):
    monkeypatch.chdir(tmp_path)
    case = ratio("a", 2.0, 1.9, 2.1, **{"batch": 8, "length": 64, "dtype": "float32"} | wrong)
    case["extra_info"] = {k: v for k, v in case["extra_info"].items() if v is not None}
    file = store("a.json", [case])
    assert main(["bench", command, *[file] * (2 if command == "compare" else 1)]) == 2
    assert "a.json is no pytest-benchmark file" in (error := capsys.readouterr().err.strip())
    assert "\n" not in error


@pytest.mark.parametrize("wrong", BAD_RUNS, ids=str)
def test_a_run_that_lacks_something_is_one_line(store, tmp_path, capsys, wrong):
    record = {k: v for k, v in (run("als") | wrong).items() if v is not None}
    assert main(["bench", "report", store("a.jsonl", [record]), "--out", str(tmp_path / "page")]) == 2
    assert "no file of convergence runs" in (error := capsys.readouterr().err.strip())
    assert "\n" not in error


def test_blank_lines_between_runs_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(run('als'))}\n \n{json.dumps(run('eager'))}\n\n")
    assert [r["method"] for r in records.read(path).runs] == ["als", "eager"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.json", None, "cannot be read: No such file"),
        ("broken.json", "{", "is no pytest-benchmark file"),
        ("other.json", '{"a": 1}', "is no pytest-benchmark file"),
        ("list.json", "[1]", "is no pytest-benchmark file"),
        ("old.jsonl", '{"task": "news", "loss": 1.0}', "no file of convergence runs"),
        ("empty.jsonl", "", "there is no result in"),
    ],
)
def test_a_wrong_file_is_one_line_and_leaves_nothing(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert main(["bench", "report", str(path), "--out", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert not (tmp_path / "page").exists()


def test_the_stamp_is_dirty_from_a_change_of_code_and_not_from_a_result(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    code = tmp_path / "fastals" / "__init__.py"
    code.parent.mkdir()
    code.write_text("1")
    monkeypatch.setattr(fastals, "__file__", str(code))
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "new.json").write_text("{}")
    clean = stamp()
    assert (clean["dirty"], len(clean["commit"])) == (False, 7)
    assert clean["torch"] in (torch.__version__, torch.__version__.partition("+")[0])  # packages for CUDA omit it
    assert place() == f"{slug(clean['device'])}/{clean['commit']}"
    monkeypatch.setenv("FASTALS_COMMIT", "told")
    code.write_text("2")
    assert (stamp()["dirty"], stamp()["commit"]) == (True, clean["commit"])
    assert place().endswith(f"/{clean['commit']}-dirty")


def test_the_stamp_of_an_installed_package_claims_no_commit_but_one_that_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastals, "__file__", str(tmp_path / "fastals" / "__init__.py"))
    monkeypatch.delenv("FASTALS_COMMIT", raising=False)
    assert (stamp()["commit"], stamp()["dirty"]) == ("unknown", "unknown")
    monkeypatch.setenv("FASTALS_COMMIT", "abc1234")
    assert (stamp()["commit"], stamp()["dirty"]) == ("abc1234", "unknown")
    runpy.run_path(stamp.__code__.co_filename, run_name="__main__")  # what python bench/stamp.py does
    assert capsys.readouterr().out == f"{slug(stamp()['device'])}/abc1234\n"


@pytest.mark.parametrize(("text", "code", "driver"), [("570.1\n570.2", 0, "570.1"), ("failed to initialise", 9, "")])
def test_the_driver_is_that_of_the_first_gpu_and_no_error_text(tmp_path, monkeypatch, text, code, driver):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s\\n' '{text}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert stamp()["driver"] == driver


def test_the_stamp_has_the_cuda_version_and_that_of_every_package(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("stamp.version", {"peft": "0.21.2", "cuda-bindings": "13.1"}.get)
    made = stamp()
    assert (made["cuda"], made["peft"], made["cuda-bindings"]) == ("13.0", "0.21.2", "13.1")
    assert made.keys() <= set(STAMP_FIELDS)
