"""Everything but the native code is in pyproject.toml; csrc/native_build.py builds that."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import native_build  # noqa: E402


class BuildNative(build_ext):
    """Hands the work to ninja; setuptools learns where the libraries are."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        destination = ROOT / "oodkern" if in_place else Path(self.build_lib) / "oodkern"
        try:
            self.placed = [str(path) for path in native_build.build(destination)]
        except native_build.BuildError as error:
            sys.exit(f"\nerror: {error}\n")

    def get_outputs(self):
        return [] if self.inplace or self.editable_mode else getattr(self, "placed", [])

    def get_output_mapping(self):
        return {}


setup(
    ext_modules=[Extension("oodkern._build", sources=["csrc/build_info.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
