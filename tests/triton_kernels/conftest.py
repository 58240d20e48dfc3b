import importlib.util

import pytest


class WithoutTriton(pytest.Module):
    def collect(self):
        pytest.skip("Triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if importlib.util.find_spec("triton") is None:
        return WithoutTriton.from_parent(parent, path=module_path)
    return None
