"""Build tritopt/engine/walk.c where that is possible; all else is said in pyproject.toml.

The extension needs Python's headers and a C compiler, and nothing of torch. Without it tritopt is whole, and its wheel
pure: Triton then builds the same file when a program first needs it. `TRITOPT_WALK=python` leaves it out.
"""

import hashlib
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "tritopt/engine/walk.c"


class BuildIfPossible(build_ext):
    """Builds the extension, or leaves a distribution without extensions, whose wheel fits every Python and platform."""

    def run(self) -> None:
        """Build; a failure is one line of the log, since the extension is optional."""
        super().run()
        if not all(map(os.path.exists, self.get_outputs())):
            self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True


def extensions() -> list[Extension]:
    """List the extension where kernels may run, which is on Linux, with the hash by which it is known as up to date."""
    if sys.platform != "linux" or os.environ.get("TRITOPT_WALK") == "python":
        return []
    digest = hashlib.sha256((Path(__file__).parent / SOURCE).read_bytes()).hexdigest()
    macros = [("TRITOPT_WALK_SOURCE", f'"{digest}"')]
    return [Extension("tritopt.engine._walk", [SOURCE], define_macros=macros, optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildIfPossible})
