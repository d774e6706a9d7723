"""``fastals bench``: the reports and comparisons of the folder ``bench/``, which a clone of the repository has."""

import importlib
import sys
from pathlib import Path
from typing import Any

import fastals
from fastals.cli.errors import UserError


def load_report() -> Any:
    """The module ``bench/report.py`` of the clone that fastals is installed from, or of the current folder.

    Raises:
        UserError: there is no such folder.
    """
    clones = (Path(fastals.__file__).parents[1], Path.cwd())
    folder = next((clone / "bench" for clone in clones if (clone / "bench" / "report.py").is_file()), None)
    if folder is None:
        raise UserError(
            "fastals bench needs the folder bench/ of the repository, which an installed package does not hold: "
            "run it in a clone"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # its files import each other
    return importlib.import_module("report")
