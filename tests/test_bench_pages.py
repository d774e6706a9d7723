"""``fastals bench report``: tables and pictures of stored results."""

import json
import re
from pathlib import Path

import charts
import pytest
import report
import tuning
from helpers.drawn import kept
from helpers.results import BENCH, NAN, kernel, light, ratio, rows, run, shortened, stored_light, timing

from fastals.cli.errors import UserError
from fastals.cli.main import main
from fastals.cli.plots import COLORS


@pytest.fixture
def figures(monkeypatch):
    """The axes of the figures that are drawn."""
    return kept(monkeypatch, charts, 1)


def test_a_page_holds_the_figures_of_a_first_light_beside_their_predictions(tmp_path):
    figures = light(measured=18.76), light(batch=32, failed="ValueError: no"), light(name="copy", batch=0, why_not="x")
    page = report.report([stored_light(tmp_path, *figures)], tmp_path / "page").read_text()
    assert "\n* commit abc1234, device a cpu, torch 2.13.0, dirty False\n" in page
    assert "| sweep, while | ms | 8 | 13.4 | 18.76 | 1.40 |" in page
    assert "| sweep, while | ms | 32 | 13.4 | ValueError: no | - |" in page
    assert "| copy | ms | - | 13.4 | x | - |" in page
    unforeseen = stored_light(tmp_path, light(predicted=None, measured=2.0))
    assert "| sweep, while | ms | 8 | - | 2 | - |" in report.report([unforeseen], tmp_path / "page").read_text()
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
    assert "| small | 8 x 128, float32 | 1.85x (1.69 - 2.31) | 1.47x | 1 | 1 / 2 |" in page
    assert "Peak memory in MiB:\n\n| case | als | adamw | als over adamw |" in page
    assert table["small"] == ["10", "8", "1.25x"]
    assert table["vit"] == ["4 images, float32", "1.20x (1.10 - 1.30)", "-", "1", "-"]
    assert table["prodigy"][:2] == ["-", "0.90x (0.80 - 1.00)"]
    assert table["bert"] == ["trial", "50", "50.0% (40.0% - 60.0%)"]
    assert "## Kernels\n\nThe roofs, measured on the same device: a copy moves 3012 GB/s, a bfloat16 matrix" in page
    assert "roofs" not in table
    assert table["look[other]"] == ["0.25 (0.2 - 0.3)", "tensors 400"]
    assert "| als | 1.000 | 0.500 | 3 | 9 | 1 |" in page
    assert table["als"] == ["8.0", "0", "1"]
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Step, against eager", "Graphed depth, against eager", "Instead, against adamw", "Depth",
        "Kernels", "Times", "News, all training samples, 3 steps", "Names of the methods", "Conditions",
    ]  # fmt: skip
    for title in titles:
        assert f"* [{title}](#{title.lower().replace(',', '').replace(' ', '-')})\n" in page
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
        "All tasks (a cpu)", "Step, against eager (a cpu)", "News, all training samples, 3 steps (a cpu)",
        "News, all training samples, 5 steps (a cpu)", "Step, against eager (b)", "Names of the methods", "Conditions",
    ]  # fmt: skip
    assert page.startswith("# Benchmarks on a cpu and b\n\nMeasurements of fastals on a cpu and b at commit abc1234,")
    assert len(set(tmp_path.glob("page/*.png"))) == 4


def test_two_commits_on_one_device_share_a_page(store, tmp_path):
    files = [
        store("a.json", [ratio("small", 2.0, 1.9, 2.1), kernel(0.5, 0.4, 0.6)]),
        store("b.json", [ratio("large", 3.0, 2.9, 3.1, commit="def5678")]),
        store("c.jsonl", [run("als", commit="def5678")]),
    ]  # fmt: skip
    page = report.report([Path(f) for f in files], tmp_path / "page").read_text()
    assert page.endswith(
        "## Conditions\n\n* device a cpu, torch 2.13.0, dirty False\n* commit abc1234\n* commit def5678\n"
    )
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles[:3] == ["Step, against eager", "Kernels", "News, all training samples, 3 steps"]
    assert {"small", "large"} <= rows(page).keys()


def test_roofs_alone_are_a_section(store, tmp_path):
    file = store("a.json", [timing("", test="roofs", copy_roof_gbs=3012.3, matmul_roof_tflops=701.5)])
    page = report.report([Path(file)], tmp_path / "page").read_text()
    assert "## Kernels\n\nThe roofs, measured on the same device: a copy moves 3012 GB/s, a bfloat16 matrix" in page
    assert "\n* [" not in page, "a table of contents for two sections"


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
    assert table["adamw 0.001"] == ["0.500 (0.400 - 0.600)", "0.500", "3", "9", "2"]
    charged = table["adamw 0.001, best of 3 rates, charged with all"]
    assert charged[:2] == table["adamw 0.001"][:2]
    assert charged[2:4] == ["9", "27"]


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
    assert table["prodigy"][0] == "diverged (1 of 1)"
    assert tuning.searches(runs)[1:] == [["als", "8.0", "2", "2"]]


def look(line):
    return line.get_color(), line.get_linestyle(), line.get_marker()


def test_twenty_methods_are_told_apart_without_colour_too(figures, tmp_path):
    charts.losses("many", [run(f"method {i}") for i in range(20)], "", tmp_path)
    for panel in figures[0]:
        assert len({look(line) for line in panel.lines}) == 20
        assert len({look(line)[1:] for line in panel.lines}) == 20
    charts.losses("more than there are styles", [run(f"method {i}") for i in range(30)], "", tmp_path)


def test_a_method_has_the_same_colour_in_every_picture(figures, tmp_path):
    charts.losses("one", [run(m) for m in ("als", "capped 0.003", "adamw 0.001")], "adamw 0.001", tmp_path)
    charts.losses("two", [run(m) for m in ("salsa", "adamw 0.001", "adamw 0.0003", "als")], "adamw 0.0003", tmp_path)
    one, two = ({line.get_label(): look(line) for line in panels[0].lines} for panels in figures)
    assert one["als"] == two["als"] == (COLORS[0], "-", "o")
    assert {two[m][0] for m in ("adamw 0.001", "adamw 0.0003")} == {one["adamw 0.001"][0]}
    assert one["adamw 0.001"][1] == two["adamw 0.0003"][1] == "-", "the best rate has the whole line"
    assert two["adamw 0.001"][1] == "--"


def test_the_seeds_of_every_method_have_a_band(figures, tmp_path):
    runs = [run(m, s, losses=[2.0, 1.0 + s, 1.0]) for m in ("als", "adamw 0.001", "adamw 0.0003") for s in (0, 1)]
    charts.losses("two seeds", [*runs, run("eager")], "adamw 0.001", tmp_path)
    for panel in figures[0]:
        bands = [band.get_paths()[0].vertices for band in panel.collections]
        assert len(bands) == 3  # eager has a single seed
    band = figures[0][0].collections[0].get_paths()[0].vertices
    at_one = band[band[:, 0] == 1, 1]
    assert (at_one.min(), at_one.max()) == pytest.approx((1.9, 2.0))


def test_runs_that_shared_their_device_have_no_panel_of_seconds(figures, tmp_path, store):
    runs = [run(m, seconds=[NAN] * 3) for m in ("als", "adamw 0.001")]
    page = report.report([Path(store("runs.jsonl", runs))], tmp_path / "page").read_text()
    assert [panel.get_xlabel() for panel in figures[0]] == ["steps", "forward passes"]
    assert "No panel of seconds: the runs shared the device." in page
    charts.losses("one is timed", [*runs, run("salsa")], "", tmp_path)
    assert len(figures[1]) == 3


def test_pictures_show_one_method_of_a_family_and_captions_name_the_others(figures, tmp_path, store):
    shown = ["als", "adamw 0.001", "adamw 0.0003", "capped 0.003", "salsa", "als sweep", "schedule-free 3e-4"]
    left = ["als before abc1234", "adamw 0.0001", "capped 0.2", "schedule-free", "prodigy", "als, equal work"]
    runs = [run(m, accuracy=0.4) for m in ("adamw 0.0003", *left)] + [run(m) for m in shown if m != "adamw 0.0003"]
    page = report.report([Path(store("runs.jsonl", runs))], tmp_path / "page").read_text()
    assert [line.get_label() for line in figures[0][0].lines] == shown
    assert f"In the tables and not drawn: {', '.join(f'`{m}`' for m in left)}.*" in page
    older = [r for r in runs if r["method"] in left]
    assert tuning.drawn(older) == ["als before abc1234", "adamw 0.0001", "capped 0.2", "schedule-free"]
    assert tuning.drawn([run("prodigy"), run("eager")]) == ["prodigy", "eager"]


def test_tasks_stand_side_by_side_with_the_best_of_each_family(store, tmp_path):
    runs = [run("salsa"), run("adamw 0.001", accuracy=0.4), run("adamw 0.0003", 0, accuracy=0.6)]
    runs += [run("als", accuracy=0.7, task="other"), run("als", 1, accuracy=0.8, task="other")]
    runs += [shortened("schedule-free", task="other"), run("adamw 0.001", perplexity=9.0, task="other")]
    page = report.report([Path(store("runs.jsonl", runs))], tmp_path / "page").read_text()
    assert "| task | als | adamw | salsa | schedule-free |" in page
    table = rows(page)
    assert table["[news, 3 steps](#news-all-training-samples-3-steps)"] == ["-", "0.600, 0.0003", "0.500", "-"]
    others = ["0.750 (0.700 - 0.800)", "9.000, 0.001", "-", "diverged"]
    assert table["[other, 3 steps](#other-all-training-samples-3-steps)"] == others
    assert page.index("## Other,") < page.index("## News,"), "tasks of the default method come first"


def test_stored_results_make_pages_of_narrow_tables_and_explained_pictures(tmp_path, monkeypatch):
    for kind in ("bars", "depth", "roof", "losses", "heat_map"):  # which other tests draw
        monkeypatch.setattr(charts, kind, lambda *_, kind=kind: Path(f"{kind}.png"))
    for folder in (BENCH / "results").iterdir():
        files = [f for f in folder.glob("*.json*") if f.name not in ("scaling.json", "exploration.jsonl", "demo.json")]
        page = report.report(files, tmp_path / folder.name).read_text()
        tables = [line for line in page.splitlines() if line.startswith("|")]
        assert max(line.count("|") - 1 for line in tables) <= 7
        lines = page.splitlines()
        images = [i for i, line in enumerate(lines) if line.startswith("![")]
        assert len(images) > 2
        for i in images:
            assert re.fullmatch(r"!\[[A-Z].* .*\.\]\(\w+\.png\)", lines[i])
            assert re.fullmatch(r"\*[A-Z].*\.\*", lines[i + 2])


def test_a_method_that_diverged_keeps_its_beginning_and_squeezes_nobody(figures, tmp_path):
    wild = [run("wild", 0, losses=[2.0, 5.0, 9.0]), shortened("wild", 1, losses=[2.0, 1e9, NAN])]
    charts.losses("diverged", [run("als"), *wild, shortened("gone", losses=[NAN])], "", tmp_path)
    lines = {line.get_label(): line.get_xydata() for line in figures[0][1].lines}
    assert list(lines) == ["als", "wild (diverged)", "gone (diverged)"]
    assert lines["als"][:, 0].tolist() == [0, 1, 2]
    assert lines["wild (diverged)"].shape == (2, 2)
    assert len(lines["gone (diverged)"]) == 0
    assert [panel.get_ylim() for panel in figures[0]] == [pytest.approx((0.9 * 1.855, 2.2))] * 3


def test_depths_of_two_models_are_told_apart(figures, tmp_path):
    shape = {"batch": 8, "length": 64, "dtype": "float32"}
    cases = [ratio(f"depth-{n}", 1.5, 1.4, 1.6, depth=n, by_forwards=1.7, **shape) for n in (12, 6)]
    cases += [ratio(f"wide-{n}", 2.5, 2.4, 2.6, depth=n, **shape | {"dtype": "bfloat16"}) for n in (6, 12)]
    charts.depth("Depth", cases, tmp_path)
    labels = [text.get_text() for text in figures[0].figure.legends[0].get_texts()]
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
    assert head == ["method", "forward passes", "training loss", "held-out accuracy", "seconds", "seeds"]
    assert [row[:3] for row in table] == [
        ["als, equal work", "10 in 2 steps", "1.000"], ["adamw 0.001", "9 in 3 steps", "1.000"],
        ["capped 0.2", "6 in 2 steps", "diverged (1 of 1)"],
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
    runs += [r | {"method": r["method"] + " before abc", "loss": r["loss"] + 2} for r in runs[1:4]]
    runs += [adamw(1e-3, 1.1, 0.9), adamw(3e-4, 1.2, 0.8), adamw(1e-2, 1.3, 0.1), adamw(1e-5, 1.4, 0.1)]
    head, *table = sensitivity.table(runs)
    assert head[:3] == ["method", "value", "times its default or best"]
    assert [row[:4] for row in table] == [
        ["als", "0.0667", "a third", "0.700"], ["als", "0.2", "1", "0.500"], ["als", "2", "10", "0.600"],
        ['als {"schedule": "joint"}', "0.2", "1", "1.000"],
        ["als before abc", "0.0667", "a third", "2.700"], ["als before abc", "0.2", "1", "2.500"],
        ["als before abc", "2", "10", "2.600"], ["adamw", "0.0003", "a third", "1.200"],
        ["adamw", "0.001", "1", "1.100"], ["adamw", "0.01", "10", "1.300"],
    ]  # fmt: skip
    assert {row[-1] for row in table} == {"1"}
    assert len(sensitivity.table([run("als", trust=0.2)])) == 1


def test_losses_far_from_zero_are_drawn_without_the_void_below(figures, tmp_path):
    charts.losses("far", [run("als", loss=1.8, losses=[2.0, 1.9, 1.8])], "", tmp_path)
    charts.losses("near", [run("als", losses=[2.0, *[0.1] * 19], seconds=range(20), forwards=range(20))], "", tmp_path)
    assert [panel.get_ylim() for panel in figures[0]] == [pytest.approx((0.9 * 1.971, 2.2))] * 3
    assert [panel.get_ylim() for panel in figures[1]] == [pytest.approx((0, 2.2))] * 3


def test_step_sizes_of_some_steps_span_all_steps_with_the_head_on_top(figures, tmp_path):
    sizes = {"embeddings": [0.1, 0.2, 0.3], "encoder.layer.0": [0.0, 1e-3, 1e-4], "head": [0.2, 0.2, 0.2]}
    charts.heat_map("some", run("als", losses=[1.0] * 9, step_sizes=sizes, factors=[1.0, 0.5, 0.0]), tmp_path)
    axes, below = figures[0]
    (image,) = axes.images
    assert image.get_extent() == [-0.5, 8.5, -0.5, 2.5]
    assert image.origin == "lower"
    assert image.get_array().mask.tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert [(tick.get_position()[1], tick.get_text()) for tick in axes.get_yticklabels()] == [
        (0, "embeddings"), (1, "layer 0"), (2, "head"),
    ]  # fmt: skip
    assert axes.get_ylim() == (-0.5, 2.5)
    (factors,) = below.lines
    assert factors.get_xdata() == pytest.approx([1, 4, 7])
    assert below.get_xlim() == axes.get_xlim()
    charts.heat_map("nothing moved", run("als sweep", step_sizes={"all": [0.0, 0.0, 0.0]}), tmp_path)
    assert len(figures[1].figure.axes) == 2  # and the scale
