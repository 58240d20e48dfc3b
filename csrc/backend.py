"""PEP 517 hooks: setuptools' own, plus a PyTorch to build against only where the environment has none.

A fixed `requires = ["torch"]` would make pip download a second PyTorch into the build environment, whatever
the user has. The kernels need headers, not a particular version: those of the installed PyTorch serve.
"""

import sys

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks that need no change)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from toolchain import BuildError, build_mode, target_torch


def _torch_requirement() -> list[str]:
    try:
        needed = build_mode() != "none" and target_torch() is None
    except BuildError as error:
        sys.exit(f"\nerror: {error}\n")
    return ["torch>=2.10"] if needed else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
