"""``fastals bench``: pages of stored results, and which changes count as slower."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import fastals
from fastals import benchmarks, tuning
from fastals.cli import main
from fastals.stamp import stamp

STAMP = {"device": "a cpu", "torch": "2.13.0", "commit": "abc1234", "dirty": False}


def timing(name, seconds=1.0, quartiles=(0.9, 1.1), test="step", **info):
    stats = {"median": seconds, "q1": quartiles[0], "q3": quartiles[1]}
    return {"fullname": f"bench/bench_step.py::test_{test}[{name}]", "stats": stats, "extra_info": STAMP | info}


def ratio(name, median, low, high, **info):
    return timing(name, **{"speedup": median, "spread": [low, high], "against": "eager"} | info)


def run(method, seed=0, loss=1.0, **more):
    return {
        "task": "news", "regime": "full", "method": method, "seed": seed, "steps": 3, "loss": loss, "accuracy": 0.5,
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
    kernel = {"trial": {"gbs": 50.0, "of_roof": 0.5, "spread": [0.4, 0.6]}}
    timings = store("step.json", [
        ratio("small", 1.85, 1.69, 2.31, by_forwards=1.47, trials_per_unit=[1.0, 2], peak_mib={"als": 10, "adamw": 8}),
        ratio("depth-6", 1.5, 1.4, 1.6, by_forwards=1.7, depth=6), ratio("depth-12", 1.6, 1.5, 1.7, depth=12),
        ratio("6", 8.0, 7.0, 9.0, test="graphed_depth", depth=6),
        ratio("prodigy", 0.9, 0.8, 1.0, test="instead", against="adamw"),
        timing("bert", test="bandwidth", copy_gbs=100.0, kernels=kernel),
        timing("other", 0.25, (0.2, 0.3), test="look", tensors=400),
    ])  # fmt: skip
    sizes = {"embeddings": [0.1, 0.2, 0.0], "head": [0.1, 0.1, 0.1]}
    runs = store("runs.jsonl", [run("als", trials=8.0, rises=0, step_sizes=sizes), run("adamw 0.1"), run("adamw 0.2")])
    out = tmp_path / "page"
    assert main(["bench", "report", timings, runs, "--out", str(out)]) == 0
    page = (out / "report.md").read_text()
    assert str(out / "report.md") in capsys.readouterr().out
    table = rows(page)
    assert table["a cpu"] == ["2.13.0", "abc1234", "False"]
    assert table["small"] == ["1.85x (1.69 - 2.31)", "1.47x", "1", "1.0 / 2", "als 10, adamw 8 (als over adamw 1.25x)"]
    assert table["prodigy"][0] == "0.90x (0.80 - 1.00)"
    assert table["bert"] == ["trial", "50", "50.0% (40.0% - 60.0%)"]
    assert table["look[other]"] == ["0.25 (0.2 - 0.3)", "tensors 400"]
    assert table["als"] == ["1.000", "0.500", "3", "9", "8.0", "0", "1"]
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Conditions", "Step, against eager", "Graphed depth, against eager", "Instead, against adamw", "Depth",
        "Kernels", "Times", "News, all training samples, 3 steps",
    ]  # fmt: skip
    pictures = {"speedup_step-against-eager", "speedup_graphed-depth-against-eager", "speedup_instead-against-adamw"}
    pictures |= {"depth", "kernels-under-the-roof"}
    pictures |= {"loss_news-all-training-samples-3-steps", "step_sizes_news-all-training-samples-3-steps"}
    assert {p.stem for p in out.glob("*.png")} == pictures
    for name in pictures:
        assert f"({name}.png)" in page
        assert (out / f"{name}.png").stat().st_size > 5000


def test_report_without_kernels_or_depths_has_no_pictures_of_them(store, tmp_path):
    benchmarks.report([Path(store("step.json", [ratio("small", 1.85, 1.69, 2.31)]))], tmp_path / "page")
    assert {p.name for p in (tmp_path / "page").iterdir()} == {"report.md", "speedup_step-against-eager.png"}


def test_devices_and_lengths_have_sections_of_their_own(store, tmp_path):
    files = [
        store("a.json", [ratio("small", 2.0, 1.9, 2.1)]), store("b.json", [ratio("small", 3.0, 2.9, 3.1, device="b")]),
        store("c.jsonl", [run("adamw 0.1"), run("adamw 0.1", steps=5)]),
    ]  # fmt: skip
    page = benchmarks.report([Path(f) for f in files], tmp_path / "page").read_text()
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Conditions", "Step, against eager (a cpu)", "News, all training samples, 3 steps (a cpu)",
        "News, all training samples, 5 steps (a cpu)", "Step, against eager (b)",
    ]  # fmt: skip
    assert len(set(tmp_path.glob("page/*.png"))) == 4


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_two_results_of_one_case_are_refused(store, tmp_path, capsys, name):
    record = ratio("small", 2.0, 1.9, 2.1) if name.endswith("n") else run("als")
    files = [store(name, [record]), store(f"other_{name}", [record])]
    assert main(["bench", "report", *files, "--out", str(tmp_path / "page")]) == 2
    assert "there are two results of" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_a_page_cannot_be_written_into_a_file(store, tmp_path, capsys):
    (tmp_path / "page").write_text("mine")
    file = store("step.json", [ratio("small", 1.85, 1.69, 2.31)])
    assert main(["bench", "report", file, "--out", str(tmp_path / "page")]) == 2
    assert "is no folder to write the page to" in capsys.readouterr().err
    assert (tmp_path / "page").read_text() == "mine"


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


def test_a_longer_run_is_no_rate_of_the_sweep():
    longer = run("adamw 0.1, 4x steps", losses=[0.1] * 12, seconds=[9.0] * 12, forwards=[36] * 12, loss=0.1)
    runs = [run("adamw 0.1", loss=0.4), run("adamw 0.2"), longer]
    assert tuning.best_rate(runs) == "adamw 0.1"
    assert tuning.sweep_cost(runs[0], runs, "seconds") == 6.0


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
    assert clean["torch"] == torch.__version__
    code.write_text("2")
    assert stamp()["dirty"] is True


def test_the_stamp_of_an_installed_package_claims_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(fastals, "__file__", str(tmp_path / "fastals" / "__init__.py"))
    assert (stamp()["commit"], stamp()["dirty"]) == ("unknown", "unknown")
