"""What pyproject.toml cannot say: a wheel holds the package as it is, without files that an earlier build left."""

import shutil

from setuptools import setup
from setuptools.command.build import build


class CleanBuild(build):
    """Removes ``build/lib`` first: setuptools packs everything in it, also modules that are gone from the source."""

    def run(self) -> None:
        """Build from nothing."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build": CleanBuild})
