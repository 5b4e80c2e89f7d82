"""`pytest bench/` prints each comparison; `--record` keeps those that were not disturbed under bench/results/."""

import pytest

from .harness import compare


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write bench/results/<device>/<name>.json")


def pytest_collection_modifyitems(items):
    for item in items:  # torch.compile warns of this and that
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def rivals(benchmark, request, capsys):
    """rivals(name, {"imbdiff": f, ...}, bytes_moved=...) -> Record; pytest-benchmark's own table shows ours."""

    def run(name, functions, **kwargs):
        record = compare(name, functions, **kwargs)
        benchmark.extra_info.update(record.__dict__)
        benchmark.pedantic(functions["imbdiff"], rounds=5, warmup_rounds=1)
        with capsys.disabled():
            others = "  ".join(f"{r} {record.ratio(r):.2f}x" for r in functions if r != "imbdiff")
            print(
                f"\n{name}: {record.rivals['imbdiff'][1]:.0f} us, faster than  {others}  "
                f"(copy of its bytes {record.copy_us:.0f} us, gemm {record.gemm_gflop_s:.0f} GFLOP/s)"
                + ("  DISTURBED" if record.disturbed else "")
            )
        if request.config.getoption("--record"):
            if record.disturbed:
                pytest.fail("the machine was disturbed; nothing recorded, run it again alone")
            record.save()
        return record

    return run
