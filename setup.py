"""Builds the compiled back ends: `imbdiff/_C.so` from csrc/cpu.

IMBDIFF_BUILD=auto (default) builds what the machine can and says once what it can't; cpu fails where it can't; none
installs pure Python, and every operation runs on its plain-torch reference. The libraries use LibTorch's stable ABI
(torch >= 2.10) and hold no Python symbols, so one build serves every later torch and every Python. torch must be there
while building: pip install --no-build-isolation .
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
WANTED = os.environ.get("IMBDIFF_BUILD", "auto")
TARGET = "0x020a000000000000ULL"  # the stable ABI of torch 2.10


def schema_hash() -> int:
    facts: dict[str, str] = {}
    exec((ROOT / "imbdiff" / "ops" / "_schema.py").read_text(), facts)
    return int(facts["SCHEMA_HASH"], 16)


def missing() -> str | None:
    """Why the CPU library can't be built here, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not there while building (pip install --no-build-isolation . uses the installed one)"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    if not shutil.which(compiler()):
        return f"no C++ compiler: {compiler()} not found (set CXX)"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


class BuildLibraries(build_ext):
    """Compiles and links by hand: no Python headers, no flags of the interpreter's own build."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        home, build = Path(torch.__file__).parent, ROOT / "build" / ext.name
        build.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{home / 'include'}", f"-isystem{home / 'include/torch/csrc/api/include'}"]
        flags = ["-O3", "-std=c++20", "-fPIC", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
        defines = [f"-DTORCH_TARGET_VERSION={TARGET}", f"-DIMBDIFF_SCHEMA_HASH={schema_hash()}"]
        objects = [build / f"{Path(source).stem}.o" for source in ext.sources]

        newest = max(path.stat().st_mtime for path in [Path(__file__), *(ROOT / "csrc").rglob("*.*")])

        def compile_one(source: str, to: Path) -> None:
            command = [compiler(), *flags, *defines, *includes, "-c", str(ROOT / source), "-o", str(to)]
            # Installing again (make demo, test and lint each do) compiles only what changed, under the same command.
            said = to.with_suffix(".txt")
            if not (to.exists() and to.stat().st_mtime > newest and said.read_text() == " ".join(command)):
                run(command)
                said.write_text(" ".join(command))

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(compile_one, ext.sources, objects))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        run([compiler(), "-shared", *map(str, objects), "-o", str(library), *libraries])


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise RuntimeError(f"the compiler failed (exit {done.returncode}): {' '.join(command)}\n{done.stderr}")


def extensions() -> list[Extension]:
    if WANTED not in ("auto", "cpu", "none"):
        raise SystemExit(f"IMBDIFF_BUILD must be auto, cpu or none, got {WANTED!r}")
    reason = "IMBDIFF_BUILD=none" if WANTED == "none" else missing()
    if reason and WANTED == "cpu":
        raise SystemExit(f"IMBDIFF_BUILD=cpu, but {reason}")
    if reason:
        print(f"imbdiff: installing without compiled operations: {reason}", file=sys.stderr)
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    return [Extension("imbdiff._C", sources, py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
