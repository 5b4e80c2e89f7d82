"""One thread each: the networks of the tests are small, and spinning threads of several processes stall each other."""

import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-extension", action="store_true", help="as if imbdiff had been installed without its compiled libraries"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-extension"):
        from imbdiff.ops import _backends

        _backends.PROBLEMS.update(dict.fromkeys(_backends.LIBRARIES, "hidden by --no-extension"))
