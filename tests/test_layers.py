"""Imports point one way: a module uses those of lower floors only."""

import ast
from pathlib import Path

import fastals

ROOT = Path(fastals.__file__).parent
FLOORS = (  # from the top; modules of one folder may use each other
    ("cli",),
    ("integrations",),
    ("__init__",),
    ("eager",),
    ("optimizer",),
    ("graphs",),
    ("engine",),
    ("host", "device"),
    ("groups",),
    ("settings", "verify"),
    ("schedule", "repeatable", "given", "relay"),
    ("losses", "search", "passes"),
    ("evaluation", "blocks", "callers"),
    ("learned", "microbatches"),
    ("buffers", "cache", "replicas"),
    ("distributed",),
    ("signals",),
    ("compare",),
    ("calls",),
    ("reports",),
    ("standstill",),
    ("surroundings", "stamps", "partition", "presets", "report", "rng", "interrupt", "intercept", "anatomy", "errors"),
    ("files",),
    ("compiler", "shards"),
    ("kernels",),
)
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}


def imports(path):
    """First part of every module of fastals that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastals."))
            yield from ("__init__" for alias in node.names if alias.name == "fastals")
        elif isinstance(node, ast.ImportFrom) and node.module == "fastals":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastals."):
            yield node.module.split(".")[1]


def modules():
    """Every file of the package with the name of its module or folder."""
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        yield path, parts[0].removesuffix(".py")
    for path in (ROOT.parent / "kernels").glob("*.py"):
        yield path, "kernels"


def test_every_module_has_a_floor():
    assert {name for _, name in modules()} == set(FLOOR)


def test_imports_point_down():
    for path, name in modules():
        for used in imports(path):
            assert used == name or FLOOR[used] > FLOOR[name], f"{path} imports fastals.{used}"
