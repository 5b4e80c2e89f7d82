"""Builds the compiled back ends: `imbdiff/_C.so` from csrc/cpu and `imbdiff/_C_cuda.so` from csrc/cuda.

    IMBDIFF_BUILD         auto (default): what the tools at hand allow, saying once what is left out and why;
                          cpu: _C; cuda: both (each refuses at once, with the reason, where it can't be built);
                          none: pure Python, every operation runs on its plain-torch reference
    TORCH_CUDA_ARCH_LIST  default "8.0+PTX;9.0", never guessed from the GPU of the machine that builds
    CXX, CUDA_HOME        compiler (g++) and CUDA toolkit (that of the nvcc on PATH)
    MAX_JOBS              compilations at a time (the number of cores)

No GPU is needed to build _C_cuda, nor a CUDA build of torch. The libraries use LibTorch's stable ABI (torch >= 2.10)
and hold no Python symbols, so one build serves every later torch and every Python; the CUDA runtime is inside. torch
must be there while building: pip install --no-build-isolation .
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TARGET = "0x020a000000000000ULL"  # the stable ABI of torch 2.10
ARCHITECTURES = "8.0+PTX;9.0"
LIBRARIES = {"cpu": "imbdiff._C", "cuda": "imbdiff._C_cuda"}
CXX_FLAGS = ["-O3", "-fPIC", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# All that the CUDA library takes from libtorch_cuda.so; the rest of torch's stable ABI is in libtorch_cpu.so.
STUB = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
PROBE = "#include <cuda_bf16.h>\n__global__ void kernel() {}\nvoid launch() { kernel<<<1, 1>>>(); }\n"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")


def nvcc_command(*arguments: str) -> list[str]:
    return [nvcc() or "nvcc", "-ccbin", compiler()[0], "-std=c++20", "-cudart", "static", *NVCC_FLAGS, *arguments]


def device_code() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST: machine code, and with +PTX what later GPUs compile themselves."""
    flags = []
    for name in re.split(r"[;,\s]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).strip("; ")):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not found:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be like {ARCHITECTURES}, got {name!r} in it")
        sm = found[1] + found[2]
        flags += ["-gencode", f"arch=compute_{sm},code=[sm_{sm}{f',compute_{sm}' if found[3] else ''}]"]
    return flags


def missing_cpu() -> str | None:
    """Why the CPU library can't be built here, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not there while building (pip install --no-build-isolation . uses the installed one)"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    if not shutil.which(compiler()[0]):
        return f"no C++ compiler: {compiler()[0]} not found (set CXX)"
    return None


def missing_cuda() -> str | None:
    """Why the CUDA library can't be built here, or None. nvcc may be there without headers or a compiler it accepts."""
    if not (tool := nvcc()):
        where = f"in CUDA_HOME={os.environ['CUDA_HOME']}" if os.environ.get("CUDA_HOME") else "on PATH (set CUDA_HOME)"
        return f"no CUDA compiler: nvcc not found {where}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(PROBE)
        command = nvcc_command(*device_code(), "-shared", f"{folder}/probe.cu", "-o", f"{folder}/probe.so")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{tool} can't compile an empty kernel: {' '.join((done.stderr or done.stdout).split())[:300]}"
    return None


def compile_command(source: str, home: Path) -> list[str]:
    """The command for one file of csrc, but for its output."""
    facts: dict[str, str] = {}
    exec((ROOT / "imbdiff" / "ops" / "_schema.py").read_text(), facts)
    defines = [f"-DTORCH_TARGET_VERSION={TARGET}", f"-DIMBDIFF_SCHEMA_HASH={int(facts['SCHEMA_HASH'], 16)}"]
    if "cuda" in Path(source).parts:
        defines += ["-DUSE_CUDA"]
    include = f"{home}/include"
    includes = ["-isystem", include, "-isystem", f"{include}/torch/csrc/api/include"]
    common = [*defines, *includes, "-c", source]
    if source.endswith(".cu"):
        return nvcc_command(*device_code(), *common)
    return [*compiler(), "-std=c++20", *CXX_FLAGS, *common]


def compile_one(source: str, folder: Path, home: Path) -> str:
    """The object of one file. Installing again (make demo, test and lint each do) compiles only what changed."""
    target, log = (folder / f"{Path(source).stem}{end}" for end in (".o", ".log"))
    command = compile_command(source, home)
    read = [Path(__file__), *(ROOT / source).parent.iterdir(), *(ROOT / "csrc" / "common").iterdir()]
    old = log.read_text().split("\n", 1)[0] if log.exists() and target.exists() else None
    if old != shlex.join(command) or target.stat().st_mtime < max(path.stat().st_mtime for path in read):
        log.unlink(missing_ok=True)
        said = run([*command, "-o", str(target)])
        log.write_text(f"{shlex.join(command)}\n{said}")
    return str(target)


def link(name: str, objects: list[str], library: Path, folder: Path, home: Path) -> None:
    search, needed = [f"-L{home}/lib"], ["-ltorch_cpu", "-lc10"]
    if name != LIBRARIES["cuda"]:
        run([*compiler(), "-shared", *objects, "-o", str(library), *search, *needed])
        return
    if not (home / "lib" / "libtorch_cuda.so").exists():  # a CPU build of torch has all headers but not this
        (folder / "stub.c").write_text(STUB)
        stub = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", str(folder / "libtorch_cuda.so")]
        run([*compiler(), "-x", "c", str(folder / "stub.c"), *stub])
        search.insert(0, f"-L{folder}")
    by_name = ["-Xlinker", "--no-as-needed,-ltorch_cuda"]  # the stub defines next to nothing, and is still asked for
    run(nvcc_command("-shared", *objects, "-o", str(library), *search, *by_name, *needed))


def run(command: list[str]) -> str:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the compiler failed (exit {done.returncode}): {shlex.join(command)}\n{done.stderr}")
    if "warning" in done.stderr:
        sys.stderr.write(done.stderr)
    return done.stdout + done.stderr


class BuildLibraries(build_ext):
    """Compiles and links by hand: no Python headers, no flags of the interpreter's own build."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        import torch

        home = Path(torch.__file__).parent
        base = Path(self.get_finalized_command("build").build_base).resolve()
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            jobs = {}
            for ext in self.extensions:
                (base / ext.name).mkdir(parents=True, exist_ok=True)
                jobs[ext.name] = [pool.submit(compile_one, s, base / ext.name, home) for s in ext.sources]
            for name, compiled in jobs.items():
                library = Path(self.get_ext_fullpath(name))
                library.parent.mkdir(parents=True, exist_ok=True)
                link(name, [job.result() for job in compiled], library, base / name, home)


def wanted() -> list[str]:
    """What IMBDIFF_BUILD asks for and the machine can build."""
    choices = {"auto": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cpu", "cuda"], "none": []}
    choice = os.environ.get("IMBDIFF_BUILD") or "auto"
    if choice not in choices:
        raise SystemExit(f"IMBDIFF_BUILD must be one of {', '.join(choices)}, got {choice!r}")
    if sys.argv[1:2] in (["egg_info"], ["dist_info"]):
        return []  # pip runs this file for the metadata first: nothing is built then, nothing has to be said
    for n, backend in enumerate(choices[choice]):
        reason = missing_cpu() if backend == "cpu" else missing_cuda()
        if reason and choice != "auto":
            raise SystemExit(f"IMBDIFF_BUILD={choice}, but {reason}")
        if reason:
            what = "compiled operations" if backend == "cpu" else "the CUDA kernels"
            print(f"imbdiff: installing without {what}: {reason}", file=sys.stderr)
            return choices[choice][:n]
    if choice == "auto":
        print("imbdiff: building the CUDA kernels too, 40 seconds of one core; IMBDIFF_BUILD=cpu leaves them out")
    return choices[choice]


def extension(backend: str) -> Extension:
    sources = [path for path in (ROOT / "csrc" / backend).iterdir() if path.suffix in (".cpp", ".cu")]
    # Kernels take longest and start first.
    ordered = sorted(sources, key=lambda path: (path.suffix != ".cu", -path.stat().st_size))
    return Extension(LIBRARIES[backend], [str(path.relative_to(ROOT)) for path in ordered], py_limited_api=True)


setup(
    ext_modules=[extension(backend) for backend in wanted()],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
