"""Every code block of the README runs as printed, top to bottom, in one empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)


def test_the_readme_has_blocks_of_known_kinds():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}
    targets = [line for _, text in BLOCKS for line in text.splitlines() if line.startswith("make ")]
    assert targets == ["make demo", "make test"]


def test_every_block_in_turn(tmp_path):
    """One test for all, because a block works on what the ones before it made."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, text in BLOCKS:
        if kind == "python":
            command = [sys.executable, "-c", text]
        elif text.startswith("make "):
            # The targets themselves are run by CI (make test) and, with fewer steps, by test_cli.py (the demo): here it
            # is enough that they exist, since `make test` cannot run itself.
            command = ["make", "-C", str(ROOT), "-n", *text.split()[1:]]
        else:
            command = ["bash", "-e", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
