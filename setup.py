"""The part of the build that pyproject.toml cannot say: kernels/ is `triton_thresh.kernels` of a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    def run(self):
        package = Path(self.build_lib, "triton_thresh")
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # what an older build left there would get into the wheel
        super().run()
        if not self.editable_mode:
            shutil.copytree("kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
            (package / "kernels.py").unlink()


setup(cmdclass={"build_py": BuildWithKernels})
