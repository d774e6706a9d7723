"""What the site has beside the pages of this folder: files of the repository, formulas, and links within docstrings."""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "bench/GPU_QUEUE.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
ROLE = re.compile(r":\w+:<code>([\w.]+)</code>")  # :class:`fastals.ALS`


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages of the repository, and the report of every device with its pictures."""
    reports = sorted(ROOT.glob("bench/results/*/report.md"))
    pictures = [picture for report in reports for picture in report.parent.glob("*.png")]
    for path in [*map(ROOT.joinpath, PAGES), *reports, *pictures]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, _in_site(name), abs_src_path=str(path)))
    results = next(entry["Results"] for entry in config.nav or [] if "Results" in entry)
    results += [{_device(report): _in_site(report.relative_to(ROOT).as_posix())} for report in reports]
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links lead to the pages of the site, as they lead to the files of the repository."""
    here = Path(page.file.abs_src_path or "").relative_to(ROOT).parent.as_posix()
    start = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = _in_site(posixpath.normpath(posixpath.join(here, link[1])))
        return posixpath.relpath(target, start)

    return LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, which needs no script, and the roles of docstrings as links."""
    content = FORMULA.sub(_mathml, content)
    content = ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', content)
    return content.replace("::</p>", ":</p>")


def _in_site(name: str) -> str:
    """Where the site has a file of the repository."""
    if name.startswith("bench/results/"):
        return name.removeprefix("bench/").replace("/report.md", "/index.md")
    return name.removeprefix("docs/")


def _device(report: Path) -> str:
    """The device of a report, from its heading."""
    return report.read_text().partition("\n")[0].removeprefix("# Benchmarks on ")


def _mathml(formula: re.Match[str]) -> str:
    return convert(html.unescape(formula[2]), display="inline" if formula[1] == "span" else "block")
