"""No code comes out of data, and CI installs the pinned packages only."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("fastals", "kernels", "bench", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
SAFE = {
    "torch.load": ("weights_only", True),
    "AutoModelForSequenceClassification.from_pretrained": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
}


def unsafe(tree, safe):
    """What a module does that could run code out of a file: ``(line, what)``."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in RUNS_CODE)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec"):
            yield node.lineno, called
        for ending, (name, value) in safe.items():
            given = {k.arg: k.value for k in node.keywords}.get(name)
            right = isinstance(given, ast.Constant) and given.value is value
            if called.endswith(ending) and not right:
                yield node.lineno, f"{called} without {name}={value}"


def test_nothing_runs_code_out_of_a_file():
    for path in SOURCES:
        ours = SAFE if ROOT / "fastals" in path.parents else {"torch.load": SAFE["torch.load"]}
        assert not list(unsafe(ast.parse(path.read_text()), ours)), path


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "eval(text)", "exec(text)", "torch.load(path)",
     "torch.load(path, weights_only=False)", "transformers.AutoTokenizer.from_pretrained(path)"],
)  # fmt: skip
def test_what_would_run_code_is_found(line):
    assert list(unsafe(ast.parse(line), SAFE))


def pins(path):
    """The pinned version of each package in a list, and its lines."""
    entries = re.findall(r"^([\w.-]+)==(\S+)((?:.*\\\n)*.*)", path.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): (version, rest) for name, version, rest in entries}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-oldest.txt"])
def test_ci_checks_the_hashes_of_the_pinned_packages(name):
    pinned, locked = pins(ROOT / name), pins(ROOT / ".ci" / name)
    assert {p: v for p, (v, _) in pinned.items()} == {p: locked[p][0] for p in pinned}
    assert all("--hash=sha256:" in rest for _, rest in locked.values())
    assert all(p.startswith(("nvidia-", "cuda-")) for p in locked.keys() - pinned.keys())  # of torch built for CUDA
    assert f".ci/{name}" in (ROOT / ".ci" / "run").read_text()
