"""The figures in README and docs are those of the stored results."""

import inspect
import re
from ast import literal_eval

import figures
import pytest

import fastals
from fastals.settings import OTHER_DEFAULTS, RELAY_DEFAULTS

README = (figures.ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_the_figures_of_a_page_are_those_of_the_stored_results(page):
    text = page.read_text()
    assert text.count("<!-- figures: ") == text.count("<!-- end of figures -->") == len(figures.MARKED.findall(text))
    assert figures.fill(text) == text, "run python bench/figures.py"


def test_every_figure_stands_on_a_page():
    named = {name for page in figures.PAGES for _, name, _ in figures.MARKED.findall(page.read_text())}
    assert named == set(figures.FIGURES)


def test_another_result_makes_another_page(monkeypatch):
    before = figures.accuracies()
    stored = figures._stored()
    other = {key: [run | {"accuracy": run["accuracy"] / 2} for run in runs] for key, runs in stored.items()}
    monkeypatch.setattr(figures, "_stored", lambda: other)
    assert figures.accuracies() != before
    with pytest.raises(KeyError, match="nothing"):
        figures.fill("<!-- figures: nothing --> <!-- end of figures -->")


def test_a_page_is_filled_in_where_it_says_so():
    filled = figures.fill(
        "a <!-- figures: gap -->?<!-- end of figures --> b\n<!-- figures: demo -->\n<!-- end of figures -->\n"
    )
    assert re.match(r"a <!-- figures: gap -->\d\.\d<!-- end of figures --> b\n", filled)
    assert f"-->\n\n{figures.demo()}\n\n<!--" in filled
    assert figures.fill(filled) == filled


@pytest.mark.parametrize(("page", "heading"), [("README.md", "What you can choose"), ("docs/loops.md", "Options")])
def test_the_options_of_a_page_have_their_defaults(page, heading):
    section = (figures.ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`?(?: \(relay\), (\S+))? \|", section, re.MULTILINE)
    assert len(rows) >= 5
    parameters = inspect.signature(fastals.ALS).parameters
    for name, default, other in rows:
        assert literal_eval(default) == RELAY_DEFAULTS.get(name, parameters[name].default), name
        assert not other or literal_eval(other) == OTHER_DEFAULTS[name], name


def test_the_readme_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 130
