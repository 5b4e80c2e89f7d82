"""The library of a family's driver."""

import ctypes

import pytest

from .emulated import HERE, compile_driver


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    family = request.module.__name__.rpartition("test_emulated_")[2]
    library = tmp_path_factory.mktemp("emulated") / f"{family}.so"
    compile_driver(HERE / f"drive_{family}.cpp", "-O2", "-fPIC", "-shared", "-o", library).check_returncode()
    return ctypes.CDLL(str(library))
