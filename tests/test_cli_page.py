"""The page of finished runs: one file that needs no other, with the numbers, pictures and options of the runs."""

import base64
import json
from html.parser import HTMLParser

import pytest
from helpers.films import arguments, save_model, save_table

import fastals
from fastals.cli.main import main

NAME = '<b>&"one"'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """The texts, tags and links of a page; tags that do not close, or close another, fail."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.links, self.texts = [], [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def row(page, name):
    """The cells of a row of the options."""
    source = page.source.partition("What was run")[2].partition(f"<tr><th>{name}</th>")[2].partition("</tr>")[0]
    return source.removeprefix("<td>").removesuffix("</td>").split("</td><td>")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with two runs: all optimizers, and AdamW alone."""
    folder = tmp_path_factory.mktemp("films")
    save_model(folder / "model")
    save_table(folder / "films.csv")
    compared = ["--name", NAME, "--c", "0.2", "--compare", "--seed", "7"]
    plain = ["--name", "plain", "--optimizer", "adamw", "--adamw-lr", "1e30"]
    for more in (compared, plain):
        assert main(arguments(folder / "model", folder / "films.csv", folder, "--steps", "5", *more)) == 0
    return folder


def test_the_page_of_a_run_needs_no_other_file(films):
    page = Page(films / "runs" / NAME / "report.html")
    assert [link.partition(",")[0] for link in page.links] == ["data:image/png;base64"] * 2
    for link, name in zip(page.links, ("loss.png", "step_sizes.png"), strict=True):
        assert base64.b64decode(link.partition(",")[2]) == (films / "runs" / NAME / name).read_bytes()
    assert not {"script", "link", "iframe", "object", "b"} & set(page.tags)
    assert not any(word in page.source for word in ("url(", "@import", "javascript:"))
    assert "prefers-color-scheme: dark" in page.source
    assert 'name="viewport" content="width=device-width' in page.source


def test_the_page_has_names_numbers_options_and_versions(films):
    folder = films / "runs" / NAME
    page = Page(folder / "report.html")
    assert page.texts.count(NAME) == 2  # title and heading
    for name in (".", "eager", "adamw"):
        summary = json.loads((folder / name / "summary.json").read_text())
        cells = f"{summary['loss']:.4f}", f"{summary['accuracy']:.1%}", f"{summary['forwards']:.0f}"
        for cell in (*cells, *summary["versions"].values()):
            assert cell in page.texts
    assert row(page, "seed") == ["7", "7", "7"]
    assert row(page, "c") == ["0.2", "0.2", "-"]  # AdamW searches nothing
    assert row(page, "adamw-lr") == ["-", "-", "0.0001"]
    assert row(page, "steps") == ["5", "5", "5"]
    assert row(page, "device") == ["cpu", "cpu", "cpu"]
    assert row(page, "fastals") == [fastals.__version__] * 3
    assert row(page, "precision") == [""]  # a default


def test_a_run_without_search_has_no_step_sizes_and_may_have_diverged(films):
    page = Page(films / "runs" / "plain" / "report.html")
    assert len(page.links) == 1
    assert "nan" in page.texts


def test_a_report_of_several_runs(films, tmp_path, capsys):
    runs = [str(films / "runs" / name) for name in (NAME, "plain")]
    assert main(["report", *runs, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"report   {tmp_path / 'report.html'}\n")
    page = Page(tmp_path / "report.html")
    assert len(page.links) == 2
    assert page.texts.count(runs[0]) == 2  # in both tables
    assert row(page, "seed") == ["7", "0"]
    assert main(["report", runs[1], "--output", str(tmp_path)]) == 0
    assert len(Page(tmp_path / "report.html").links) == 1  # the step sizes there were are of other runs


def test_a_run_of_an_older_version_has_a_page(films, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.jsonl").write_text((films / "runs" / NAME / "metrics.jsonl").read_text())
    summary = json.loads((films / "runs" / NAME / "summary.json").read_text())
    later = "trials", "device", "versions", "optimizer"
    (old / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k not in later}))
    assert main(["report", str(old), "--output", str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    assert row(page, "steps") == ["5"]
    assert row(page, "model") == row(page, "torch") == [""]
