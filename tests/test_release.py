"""What a release says of itself is so."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import fastals

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file):
    """The versions in a list of pinned packages, by name."""
    pinned = [line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pinned}


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_the_lower_bound_of_every_dependency_is_tested(extra):
    oldest, newest = pins("requirements-oldest.txt"), pins("requirements.txt")
    required = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, required):
        name = requirement.name.lower().replace("_", "-")
        for bound in requirement.specifier:
            lowest = Version(bound.version).release
            tested = oldest.get(name) or newest[name]
            assert tested.release[: len(lowest)] == lowest, (requirement, tested)


def test_the_version_is_the_same_everywhere():
    changes = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] == fastals.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == fastals.__version__
