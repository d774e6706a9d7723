"""The blocks of Python in README.md and docs/, by page and section."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
INCLUDED = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)  # pymdownx.snippets


class Section(NamedTuple):
    """A section of a page that has blocks."""

    page: str
    heading: str
    blocks: list[str]


def blocks(text: str) -> list[str]:
    """The blocks of a text; files that it includes are read."""
    return [INCLUDED.sub(lambda name: (ROOT / name[1]).read_text(), block) for block in BLOCK.findall(text)]


def sections(page: Path) -> Iterator[Section]:
    """The sections of the second level, and what comes before the first."""
    for text in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
        if found := blocks(text):
            yield Section(page.name, text.splitlines()[0].strip("# "), found)


def block(containing: str) -> str:
    """The first block that contains this, README's before others."""
    return next(b for page in PAGES for b in blocks(page.read_text()) if containing in b)
