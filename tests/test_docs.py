"""Pages that are made from the source are up to date, and what pages point to exists."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from imbdiff import ops

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_ops_md_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_ops", ROOT / "docs" / "make_ops.py")
    make_ops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_ops)
    assert make_ops.PAGE.read_text() == make_ops.page(), "docs/ops.md is not what the docstrings say: make docs"


def test_performance_md_is_up_to_date():
    """The tables are made from the committed records."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.report", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name != "use"])
def test_docstrings_say_everything(name):
    text = " ".join(inspect.getdoc(getattr(ops, name)).split())
    said = "Args:", "Returns:", "Raises:", "Deterministic", "memory", "Equivalent torch code:", "Source:", "Used by"
    for part in said:
        assert part in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target
