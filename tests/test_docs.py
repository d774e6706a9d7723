"""What the documentation says of the tests is so."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PROMISES = TESTS.parent / "docs" / "promises.md"


def test_every_promise_names_tests_that_exist():
    rows = [line for line in PROMISES.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row.rsplit(" | ", 1)[1])
        assert named, row
        for file, function in named:
            text = (TESTS / file).read_text()
            assert f"\ndef {function or 'test_'}" in text, (file, function)
