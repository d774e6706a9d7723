"""``fastals bench``: pages of stored results, and which changes count as slower."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from fastals import benchmarks, tuning
from fastals.cli import main
from fastals.stamp import stamp

STAMP = {"device": "a cpu", "torch": "2.13.0", "commit": "abc1234", "dirty": False}


def timing(name, seconds=1.0, quartiles=(0.9, 1.1), **info):
    stats = {"median": seconds, "q1": quartiles[0], "q3": quartiles[1]}
    return {"fullname": f"bench/bench_step.py::test_step[{name}]", "stats": stats, "extra_info": STAMP | info}


def ratio(name, median, low, high, **info):
    return timing(name, speedup=median, spread=[low, high], **info)


def run(method, seed=0, loss=1.0, **more):
    return {
        "task": "news", "regime": "full", "method": method, "seed": seed, "loss": loss, "accuracy": 0.5,
        "losses": [2.0, 1.5, loss], "seconds": [1.0, 2.0, 3.0], "forwards": [3, 6, 9],
    } | STAMP | more  # fmt: skip


@pytest.fixture
def store(tmp_path):
    def write(name, records):
        path = tmp_path / name
        lines = "".join(json.dumps(r) + "\n" for r in records)
        path.write_text(lines if name.endswith("l") else json.dumps({"benchmarks": records}))
        return str(path)

    return write


def rows(page):
    """Cells of all table rows by their first cell."""
    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def test_report_has_tables_and_pictures_of_all_kinds(store, tmp_path, capsys):
    timings = store("step.json", [
        ratio("small", 1.85, 1.69, 2.31, limit=1.47, trials_per_unit=1.0, peak_mib={"als": 10, "adamw": 8}),
        ratio("depth-6", 1.5, 1.4, 1.6, limit=1.7, depth=6), ratio("depth-12", 1.6, 1.5, 1.7, limit=1.8, depth=12),
        ratio("prodigy", 0.9, 0.8, 1.0, against="AdamW"),
        timing("kernel", copy_gbs=100.0, survey_gbs=80.0, trial_gbs=50.0),
        timing("other", 0.25, (0.2, 0.3), tensors=400),
    ])  # fmt: skip
    sizes = {"embeddings": [0.1, 0.2, 0.0], "head": [0.1, 0.1, 0.1]}
    runs = store("runs.jsonl", [run("als", trials=8.0, rises=0, step_sizes=sizes), run("adamw 0.1"), run("adamw 0.2")])
    out = tmp_path / "page"
    assert main(["bench", "report", timings, runs, "--out", str(out)]) == 0
    page = (out / "report.md").read_text()
    assert str(out / "report.md") in capsys.readouterr().out
    table = rows(page)
    assert table["a cpu"] == ["2.13.0", "abc1234", "False"]
    assert table["small"] == ["1.85x (1.69 - 2.31)", "1.47x", "1", "1.0", "als 10, adamw 8 (als over adamw 1.25x)"]
    assert table["prodigy"][0] == "0.90x (0.80 - 1.00)"
    assert table["kernel"] == ["trial", "50", "50%"]
    assert table["other"] == ["0.25 (0.2 - 0.3)", "tensors 400"]
    assert table["als"] == ["1.000", "0.500", "3", "9", "8.0", "0", "1"]
    pictures = {"speedup_eager", "speedup_adamw", "depth", "roof"}
    pictures |= {"loss_news-all-training-samples", "step_sizes_news-all-training-samples"}
    assert {p.stem for p in out.glob("*.png")} == pictures
    for name in pictures:
        assert f"({name}.png)" in page
        assert (out / f"{name}.png").stat().st_size > 5000


def test_report_without_kernels_or_depths_has_no_pictures_of_them(store, tmp_path):
    benchmarks.report([Path(store("step.json", [ratio("small", 1.85, 1.69, 2.31)]))], tmp_path / "page")
    assert {p.name for p in (tmp_path / "page").iterdir()} == {"report.md", "speedup_eager.png"}


def test_the_best_rate_stands_twice_and_is_charged_with_all_of_its_seed():
    runs = [run("als", trials=8.0, rises=0)]
    for seed in (0, 1):
        runs += [run("adamw 0.1", seed, 0.4 + 0.2 * seed), run("adamw 0.2", seed, 0.9), run("adamw 0.3", seed, 0.8)]
    found = {row[0]: row[1:] for row in tuning.rows(runs)}
    assert found["adamw 0.1"] == [
        "0.500 (0.400 - 0.600)",
        "0.500 (0.500 - 0.500)",
        "3 (3 - 3)",
        "9 (9 - 9)",
        "-",
        "-",
        "2",
    ]
    charged = found["adamw 0.1, best of 3 rates, charged with all"]
    assert charged[:2] == found["adamw 0.1"][:2]
    assert charged[2:4] == ["9 (9 - 9)", "27 (27 - 27)"]


def test_a_rate_that_lacks_a_seed_or_diverged_is_not_the_best():
    runs = [run("adamw 0.1", s, 0.5) for s in (0, 1)] + [run("adamw 0.3", s, float("nan")) for s in (0, 1)]
    assert tuning.best_rate([*runs, run("adamw 0.2", 0, 0.1)]) == "adamw 0.1"
    assert tuning.best_rate([run("adamw 0.1")]) == ""


@pytest.mark.parametrize(
    ("old", "new", "code", "word"),
    [
        (ratio("a", 2.0, 1.9, 2.1), ratio("a", 1.5, 1.4, 1.6), 1, "slower"),
        (ratio("a", 1.5, 1.4, 1.6), ratio("a", 2.0, 1.9, 2.1), 0, "faster"),
        (ratio("a", 2.0, 1.4, 2.1), ratio("a", 1.5, 1.4, 1.6), 0, "nothing changed"),
        (ratio("a", 2.0, 1.9, 2.1), ratio("a", 1.5, 1.4, 2.2), 0, "nothing changed"),
        (timing("a", 1.0, (0.9, 1.1)), timing("a", 1.5, (1.4, 1.6)), 1, "slower"),
        (timing("a", 1.5, (1.4, 1.6)), timing("a", 1.0, (0.9, 1.1)), 0, "faster"),
        (timing("a", 1.0, (0.9, 1.6)), timing("a", 1.5, (1.4, 1.6)), 0, "nothing changed"),
        (timing("a", 1.0, (0.9, 1.1)), ratio("a", 1.5, 1.4, 1.6), 0, "nothing changed"),
        (ratio("a", 2.0, 1.9, 2.1), ratio("a", 2.0, 1.9, 2.1, device="b"), 0, "the devices differ"),
    ],
)
def test_compare_counts_what_lies_beyond_the_spread(store, capsys, old, new, code, word):
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
    assert main(["bench", "compare", store("none.json", []), old]) == 2
    assert "there is no timing in" in capsys.readouterr().err


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


def test_the_stamp_is_dirty_from_a_change_of_code_and_not_from_a_result(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "new.json").write_text("{}")
    clean = stamp(tmp_path / "bench")
    assert (clean["dirty"], len(clean["commit"])) == (False, 7)
    assert clean["torch"] == torch.__version__
    (tmp_path / "code.py").write_text("2")
    assert stamp(tmp_path / "bench")["dirty"]
