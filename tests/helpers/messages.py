"""The warnings and errors that a user can meet, as the sources have them and as the page of troubleshooting lists them.

A message is written here as its user sees it, with … for what varies.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from helpers.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
VARIES = "…"
LEAST = 3  # words that vary not, by which a message is known
#: Messages that nobody meets, or only as a part of another one.
INTERNAL = {
    "two columns of the kernels' tables": "a mistake in fastals, found at import",
    "no table of the kernels has a column": "a mistake in fastals, found at import",
    "the package cuda-bindings is not installed": "a reason of GraphMode, not raised to the user",
    "the driver knows CUDA": "a reason of GraphMode, not raised to the user",
    "the forward draws random numbers": "a reason of GraphMode, not raised to the user",
    "… … (…): …": "a file that the system does not read or write: '… cannot be written (…)'",
    "a CUDA call failed": "the reason in 'steps run eagerly, because the capture failed'",
    "… is no file of torch.save": "the reason of another error",
    "… is damaged: the checksum": "the reason of another error",
}


def listed() -> list[str]:
    """The messages of the page: code in headings of the third level, and in the first cells of tables."""
    found = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("### "):
            found += re.findall(r"`(.+?)`", line)
        elif line.startswith("| `"):
            found.append(line.split("`")[1])
    return found


@cache
def in_sources() -> list[str]:
    """The messages of all warnings and errors of the sources but for :data:`INTERNAL`."""
    paths = [*sorted(ROOT.glob("fastals/**/*.py")), *sorted(ROOT.glob("kernels/*.py"))]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    texts = {path: _texts(tree) for path, tree in trees.items()}
    shared = {name: text for own in texts.values() for name, text in own.items() if name.isupper()}
    found = {m for path, tree in trees.items() for m in _messages(path, tree, shared | texts[path])}
    return sorted(m for m in found if not m.startswith(tuple(INTERNAL)))


def begins(message: str, beginning: str) -> bool:
    """Whether a message begins so, with enough of its words that do not vary."""
    shown = beginning.rstrip(f"{VARIES} ")
    return message.startswith(shown) and _words(shown) >= min(LEAST, _words(message))


def _words(text: str) -> int:
    return len(re.findall(r"[^\W\d]+", text))


def _texts(tree: ast.Module) -> dict[str, ast.expr]:
    """The names that stand for texts; arguments of functions stand for many."""
    nodes = list(ast.walk(tree))
    assigned = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    texts = {n.targets[0].id: n.value for n in assigned if isinstance(n.value, ast.Constant | ast.JoinedStr)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return {name: text for name, text in texts.items() if name not in arguments}


def _messages(path: Path, tree: ast.Module, names: dict[str, ast.expr]) -> Iterator[str]:
    at_command_line = "cli" in path.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
            calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "super().__init__"]
        elif isinstance(node, ast.Call) and _is_said(ast.unparse(node.func), at_command_line):
            calls = [node]
        else:
            continue
        for call in calls:
            text = _text(call.args[0], names) if call.args else VARIES
            if text.strip(f"{VARIES} "):
                yield re.sub(f"{VARIES}+", VARIES, text)


def _is_said(function: str, at_command_line: bool) -> bool:
    """Whether the function makes a message; other errors than UserError do not leave the command line as they are."""
    name = function.split(".")[-1]
    return name == "warn" or (name == "UserError" if at_command_line else name.endswith("Error"))


def _text(node: ast.expr, names: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Name) and node.id in names:
        return _text(names[node.id], names)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    return VARIES
