"""``fastals bench``: opens the tools in ``bench/`` of a clone, which a wheel does not hold."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import fastals
from fastals.cli.errors import UserError


def bench_report(arguments: argparse.Namespace) -> int:
    """Turn stored results into a page with pictures."""
    page = load_tool("report").report([Path(f) for f in arguments.files], Path(arguments.out))
    print(f"the page is {page}")
    return 0


def bench_compare(arguments: argparse.Namespace) -> int:
    """List what changed beyond the spread; 1 if anything got slower."""
    lines, slower = load_tool("compare").compare(Path(arguments.before), Path(arguments.after))
    print("\n".join(lines))
    return int(slower)


def load_tool(name: str) -> Any:
    """Import ``bench/<name>.py`` of the clone that fastals runs from, else of the clone that the current folder is in.

    Raises:
        UserError: there is no clone.
    """
    here = Path.cwd()
    folders = (Path(fastals.__file__).parents[1], here, *here.parents)
    clone = next((folder for folder in folders if _is_clone(folder)), None)
    if clone is None:
        raise UserError(
            "fastals bench needs the folder bench/ of the repository, which an installed package does not hold: "
            "run it in a clone"
        )
    if str(clone / "bench") not in sys.path:
        sys.path.insert(0, str(clone / "bench"))  # the files in bench/ import each other
    return importlib.import_module(name)


def _is_clone(folder: Path) -> bool:
    return (folder / "bench" / "report.py").is_file() and (folder / "fastals" / "cli" / "bench.py").is_file()
