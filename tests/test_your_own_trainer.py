"""Every script of docs/your-own-trainer.md runs as printed and is short."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/your-own-trainer.md").read_text()
SCRIPTS = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE, flags=re.M | re.S)


def test_the_page_has_three_scripts():
    assert len(SCRIPTS) == PAGE.count("```python") == 3


@pytest.mark.parametrize(("title", "script"), SCRIPTS, ids=[title for title, _ in SCRIPTS])
def test_script(title, script, tmp_path):
    assert len(script.splitlines()) < 40
    for package in re.findall(r"^from (diffusers|lightning_fabric) import", script, flags=re.M):
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"-?\d+\.\d+[,;] ", done.stdout)
