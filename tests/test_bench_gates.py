"""Exactness tests run before the cases that claim them, and the page says what they came to."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import charts
import pytest
import records
import report
from helpers.results import BENCH, ROOT, kernel, outside, ratio, rows, timing


@pytest.fixture
def conftest():
    """The fixtures and hooks of the benchmarks, as a module of its own."""
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_case_that_has_failed_or_was_interrupted_stores_no_number(conftest):
    cases = [SimpleNamespace(fullname=name) for name in ("passes", "fails", "interrupted")]
    benchmarks = SimpleNamespace(benchmarks=cases)
    for name, passed in (("passes", True), ("fails", False)):
        conftest.pytest_runtest_logreport(SimpleNamespace(nodeid=name, when="call", passed=passed))
    session = SimpleNamespace(config=SimpleNamespace(_benchmarksession=benchmarks))
    next(conftest.pytest_sessionfinish(session))
    assert benchmarks.benchmarks == cases[:1]


GATE_TESTS = """
import pytest

pytestmark = pytest.mark.proves(claim="all")

@pytest.mark.proves(claim="right")
@pytest.mark.parametrize("n", ["a.b", "c"])
def test_right(n):
    pass

@pytest.mark.proves(claim="right-or-not")
def test_right_or_not():
    assert False

@pytest.mark.proves(claim="skipped")
@pytest.mark.skip
def test_skipped():
    pass
"""
GATED_CASES = """
from itertools import count
from types import SimpleNamespace

import pytest
from rivals import SearchRival

exact = pytest.mark.exact

@exact("right")
def test_passed(benchmark):
    benchmark(int)

@exact("right")
@exact("right-or-not")
@exact("skipped")
@exact("all")
def test_failed(benchmark):
    benchmark(int)

@exact("right")
@exact("skipped")
def test_skipped(benchmark):
    benchmark(int)

class Counted(SearchRival):
    first_steps = 2

    def __init__(self):
        self.forwards, self.optimizer = 0, SimpleNamespace()

    def step(self, batch):
        self.forwards += 1
        units = [SimpleNamespace(trials=self.forwards)]
        self.optimizer.report = SimpleNamespace(trials=self.forwards, units=units, joint_trials=0)

def test_ungated(in_turn):
    in_turn(Counted(), Counted(), SimpleNamespace(batches=lambda device: count(), conditions=dict), "itself")
"""


def pytest_in(folder, *arguments):
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=outside())


@pytest.fixture
def gated(tmp_path):
    """A folder with benchmark cases and the tests of the claims that they name."""
    for path, text in (("tests/test_a.py", GATE_TESTS), ("bench/bench_a.py", GATED_CASES)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    for folder in ("bench", "tests"):
        shutil.copy(ROOT / folder / "conftest.py", tmp_path / folder)
    settings = [
        "addopts = --import-mode=importlib",
        "python_files = test_*.py bench_*.py",
        f"pythonpath = {BENCH} {ROOT / 'tests'}",
    ]
    (tmp_path / "pytest.ini").write_text("\n".join(["[pytest]", *settings]))
    return tmp_path


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("gates", ["run", "file", "not-run"])
def test_a_case_is_timed_whatever_its_exactness_tests_come_to(gated, gates):
    if gates == "file":
        assert pytest_in(gated, "tests", "--junit-xml=a.xml").returncode == pytest.ExitCode.TESTS_FAILED
    else:  # marks suffice to run the tests, and processes start sooner without it
        (gated / "tests" / "conftest.py").unlink()
    option = "--gates=a.xml,nowhere.xml" if gates == "file" else f"--gates={gates}"
    done = pytest_in(gated, "bench", option, "--benchmark-max-time=0.01", "--benchmark-json=out.json")
    assert done.returncode == 0, done.stdout
    infos = {charts.full_name(c): c["extra_info"] for c in records.read(gated / "out.json").cases}
    outcomes = dict.fromkeys(("passed", "failed", "skipped", "ungated"), "not run")
    if gates != "not-run":
        outcomes |= {"passed": "passed", "failed": "failed all, right-or-not"}
    assert {name: info["gates"] for name, info in infos.items()} == outcomes
    line = "\ngates failed: all, right-or-not\n"
    assert (line in done.stdout) == (gates != "not-run")
    assert "\ngates not run: " in done.stdout
    assert infos["ungated"]["trials_per_unit"] == [5.0, 5.0]  # of the steps 3 to 7


PROVING = 'import pytest\n\npytestmark = pytest.mark.proves(claim="it")\n'


@pytest.mark.slow
def test_a_claim_that_no_test_proves_is_an_error(gated):
    (gated / "bench" / "bench_a.py").write_text(
        GATED_CASES + '\n@exact("nothing")\ndef test_b(benchmark):\n    benchmark(int)\n'
    )
    done = pytest_in(gated, "bench", "-k", "test_b", "--benchmark-max-time=0.01")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "no test proves 'nothing'" in done.stdout


def claims_in(folder, pattern, *marks):
    """The claims that marks in Python files of a folder name."""
    calls = (
        n for path in folder.glob(pattern) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
    )
    return {
        value.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func).removeprefix("pytest.mark.") in marks
        for value in (*call.args, *(keyword.value for keyword in call.keywords))
    }


def test_every_claim_of_a_case_is_proved_by_a_test_and_no_other_is():
    named = claims_in(BENCH, "bench_*.py", "exact", "exact_on_gpu")
    assert len(named) >= 8
    assert named == claims_in(ROOT / "tests", "test_*.py", "proves")


def test_exactness_tests_that_take_too_long_have_failed(conftest, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_slow.py").write_text(PROVING + "import time\n\ndef test_slow():\n    time.sleep(60)")
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    monkeypatch.setattr(conftest, "GATE_SECONDS", 0.5)
    conftest.GATES["it"] = conftest.verdict("it", "run")
    assert conftest.failures(conftest.GATES) == ["it timed out"]


def test_exactness_tests_that_crash_have_failed(conftest, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_crash.py").write_text(PROVING + "import os\n\ndef test_crash():\n    os.abort()")
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    assert conftest.verdict("it", "run") == "failed"


@pytest.mark.slow
def test_outcomes_are_those_of_the_tests_that_prove_a_claim(conftest, gated):
    wrong = '@pytest.mark.proves(claim="{}")\ndef test_{}():\n    {}\n\n'
    files = {
        "a": GATE_TESTS + "\nclass TestA:\n    @pytest.mark.proves(claim='in-a-class')\n"
        "    def test_wrong(self):\n        assert False\n",
        "cut": "import pytest\n\n" + wrong.format("wrong-then-cut", "wrong", "assert False")
        + wrong.format("right-then-cut", "right", "pass") + wrong.format("cut", "cut", "raise KeyboardInterrupt"),
        "broken": PROVING + "import nowhere\n",
    }  # fmt: skip
    for name, text in files.items():
        (gated / "tests" / f"test_{name}.py").write_text(text)
        pytest_in(gated, f"tests/test_{name}.py", f"--junit-xml={gated}/{name}.xml")
    (gated / "no.xml").write_text("<testsuites>")
    outcomes = {
        "all": "failed",
        "right": "passed",
        "right-or-not": "failed",
        "skipped": "not run",
        "in-a-class": "failed",
        "wrong-then-cut": "failed",
        "right-then-cut": "not run",
        "cut": "not run",
        "nothing": "not run",
    }
    read = ",".join(f"{gated}/{name}.xml" for name in ("no", "a", "cut"))
    assert {claim: conftest.verdict(claim, read) for claim in outcomes} == outcomes
    assert conftest.verdict("it", read) == "not run"
    read += f",{gated}/broken.xml"
    assert conftest.verdict("it", read) == "failed", "its tests may be those that could not be collected"
    assert conftest.verdict("right", read) == "passed"
    assert conftest.verdict("right", "not-run") == "not run"


def test_the_page_marks_the_cases_whose_exactness_tests_have_not_passed(store, tmp_path):
    failed = "failed fused-kernels"
    file = store("step.json", [
        ratio("small", 1.85, 1.69, 2.31), ratio("large", 1.5, 1.4, 1.6, gates=failed),
        ratio("old", 1.5, 1.4, 1.6, test="aged", gates=["tests/test_fused.py"]),
        ratio("told", 1.5, 1.4, 1.6, test="aged", gates="said to have passed"),
        timing("bert", test="bandwidth", kernels=kernel(0.5, 0.4, 0.6)["extra_info"]["kernels"], gates=failed),
        timing("a", test="look", gates="not run"), timing("b", test="look"),
        timing("", test="roofs", copy_roof_gbs=3012.3, matmul_roof_tflops=701.5, gates=failed),
    ])  # fmt: skip
    page = report.report([Path(file)], tmp_path / "page").read_text()
    assert "\n\nExactness tests: passed for 4 of 8 cases; the others are marked below.\n\n" in page
    table = rows(page)
    assert page.count("| case | exactness tests |") == 3
    assert table["small"][:3] == ["passed", "-", "1.85x (1.69 - 2.31)"]
    assert table["large"][:3] == [failed, "-", "1.50x (1.40 - 1.60)"]
    assert table["old"][:2] == table["told"][:2] == ["-", "1.50x (1.40 - 1.60)"]
    assert table["bert"][:3] == [failed, "trial", "50"]
    assert (table["look[a]"][0], table["look[b]"][0]) == ("not run", "passed")
    assert f"701.5 TFLOP/s. Exactness tests: {failed}." in page
