"""`pytest bench/` prints each comparison; `--record` keeps those that were not disturbed under bench/results/.

pytest-benchmark's own table and its `--benchmark-compare` follow imbdiff's time from commit to commit.
"""

from dataclasses import asdict

import pytest

from .harness import compare as take


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write bench/results/<device>/<name>.json")
    parser.addoption(
        "--patience", type=float, help="seconds that a benchmark may wait for a steady machine (0; with --record 60)"
    )


def pytest_collection_modifyitems(items):
    for item in items:  # torch.compile warns of this and that
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def compare(request, capsys, benchmark):
    """compare(case, *arguments) -> Record, printed."""

    def run(make, *args):
        recording, patience = request.config.getoption("--record"), request.config.getoption("--patience")
        if patience is None:
            patience = 60.0 if recording else 0.0
        with capsys.disabled():
            record = take(make, *args, patience=patience)
            print("\n" + shown(record))
        benchmark.extra_info.update(asdict(record))
        benchmark.pedantic(make(*args).modes[record.main]["imbdiff"], rounds=5, warmup_rounds=1)
        if recording:
            if record.disturbed:
                pytest.fail("nothing recorded, run it again alone: " + "; ".join(record.disturbed))
            record.save()
        return record

    return run


def shown(record):
    lines = [record.name]
    for mode, times in record.us.items():
        others = "  ".join(f"{rival} {record.ratio(mode, rival):.2f}x" for rival in times if rival != "imbdiff")
        lines.append(
            f"  {mode:16} {times['imbdiff'][1]:10.1f} us  {record.of_copy(mode):5.0%} of copy"
            f"  {record.of_gemm(mode):5.0%} of gemm   {others}  (rounds {'/'.join(map(str, record.rounds[mode]))})"
        )
    memory = "  ".join(f"{rival} {b / 1e6:.1f}" for rival, b in record.extra_bytes.items() if b is not None)
    lines.append(f"  extra memory, MB {memory}")
    lines += [f"  without {rival}: {reason}" for rival, reason in record.absent.items()]
    return "\n".join([*lines, *(f"  DISTURBED: {reason}" for reason in record.disturbed)])
