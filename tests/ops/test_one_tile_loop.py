"""The tile loop is written once per language; families are its instances (docs/architecture.md)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("folder", "product", "home"),
    [
        ("kernels", r"\btl\.dot\b", {"engine.py"}),
        ("csrc/cpu", r"\bmadd\b|_dpbf16ps", {"engine.inc"}),
        ("csrc/cuda", r"Score::step|fmaf\(w\.v\[|\bwmma\b|\bmma\.sync\b", {"engine.cuh"}),
    ],
)
def test_products_of_tiles_are_taken_in_one_file(folder, product, home):
    files = [path for path in (ROOT / folder).iterdir() if path.is_file()]
    assert {path.name for path in files if re.search(product, path.read_text())} == home
