"""docs/adding-an-op.md, followed to the letter: a copy of the source gets its edits, is built and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .build import ROOT

PAGE = (ROOT / "docs" / "adding-an-op.md").read_text()
WHERE = (
    r"(?:New file `(?P<new>[^`]+)`|At the end of `(?P<end>[^`]+)`|In `(?P<file>[^`]+)`, after `(?P<after>[^`]+)`):\n\n"
)
EDITS = list(re.finditer(rf"^{WHERE}```\w+\n(?P<text>.*?)^```$", PAGE, flags=re.M | re.S))
ROOMS = ("imbdiff", "csrc", "kernels", "tests", "bench")
CXX = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.xdist_group("build"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler {CXX} (set CXX)"),
]


def apply(edit: re.Match[str], root: Path) -> None:
    text = edit["text"]
    if edit["new"]:
        assert not (root / edit["new"]).exists()
        (root / edit["new"]).write_text(text)
    elif edit["end"]:
        with (root / edit["end"]).open("a") as file:
            file.write(f"\n\n{text}")
    else:
        path = root / edit["file"]
        lines = path.read_text().splitlines(keepends=True)
        (at,) = [i for i, line in enumerate(lines) if line.rstrip("\n") == edit["after"]]
        path.write_text("".join([*lines[: at + 1], text, *lines[at + 1 :]]))


def schema_hash(root: Path) -> str:
    facts: dict[str, str] = {}
    exec((root / "imbdiff" / "ops" / "_schema.py").read_text(), facts)
    return str(int(facts["SCHEMA_HASH"], 16))


def reuse_objects(root: Path) -> None:
    """The other families' objects of this checkout, where they are up to date: a new schema does not change them."""
    objects, sources = ROOT / "build" / "imbdiff._C", [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    built = [path for path in objects.glob("*.o") if path.stem != "library"]
    if not built or min(o.stat().st_mtime for o in built) < max(source.stat().st_mtime for source in sources):
        return
    folder = root / "build" / "imbdiff._C"
    folder.mkdir(parents=True)
    for path in built:
        command = path.with_suffix(".log").read_text().replace(schema_hash(ROOT), schema_hash(root))
        (folder / path.name).with_suffix(".log").write_text(command)
        shutil.copyfile(path, folder / path.name)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    for room in ROOMS:
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / file, root)
    for edit in EDITS:
        apply(edit, root)
    reuse_objects(root)
    done = run(root, "setup.py", "-q", "build_ext", "--inplace", IMBDIFF_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert "huber.cpp" in done.stdout
    return root


def run(root: Path, *command: str, **switches: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), **switches}
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_every_block_of_code_says_where_it_goes() -> None:
    blocks = re.findall(r"^```(?:python|cpp|text)\n", PAGE, flags=re.M)
    assert len(EDITS) == len(blocks) > 8
    table = PAGE.partition("## 1.")[0]
    named = {Path(edit["new"] or edit["end"] or edit["file"]).name for edit in EDITS} - {"__init__.py"}
    assert all(f"{name}`" in table for name in named)


def test_the_new_family_passes_its_tests(copy: Path) -> None:
    done = run(copy, "-m", "pytest", "tests/ops", "-k", "huber", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    passed = re.findall(r"^PASSED (\S+)", done.stdout, flags=re.M)
    for backend in ("reference", "cpu"):
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            assert (
                f"tests/ops/test_every_op.py::test_values_and_gradients[huber-B5-D72-slice-{backend}-{dtype}]" in passed
            )
        assert f"tests/ops/test_every_op.py::test_opcheck[huber-B3-D7-dense-{backend}-float32]" in passed
    assert "tests/ops/test_every_op.py::test_deterministic_over_repeats_and_threads[huber]" in passed
    assert sum("tests/ops/test_huber.py" in name for name in passed) == 9
    assert not re.search(r"^(SKIPPED|FAILED|ERROR).*huber_loss", done.stdout, flags=re.M)


def test_its_benchmark_compares_like_with_like(copy: Path) -> None:
    """What a benchmark checks before it measures; torch.compile is left to the benchmark."""
    program = """
from bench.bench_huber import case
from bench.harness import check_agreement

made = case(8, 100, "float32")
for mode, rivals in made.modes.items():
    check_agreement(made, mode, {name: rivals[name] for name in ("imbdiff", "eager")})
"""
    done = run(copy, "-c", program)
    assert done.returncode == 0, done.stderr
