"""The benchmarks' own instruments: extra memory of known operations, the watch, the check of rivals, tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """`bench` is not part of the installation. Only here: `kernels` must not become importable in other tests."""
    monkeypatch.syspath_prepend(ROOT)


def record(**changes):
    from bench.harness import Record

    facts = {"torch": "2.13.0", "capability": "AVX2", "threads": 2, "allocator": "default"}
    times = {"imbdiff": [9.0, 10.0, 11.0], "eager": [90.0, 100.0, 110.0]}
    values = {
        "bytes_moved": {"forward+backward": 1_000_000},
        "flops": {"forward+backward": 500_000},
        "us": {"forward+backward": times},
        "extra_bytes": {"imbdiff": 0, "eager": 2_500_000},
        "copy_gb_s": {"forward+backward": 200.0},
        "gemm_gflop_s": 100.0,
        "sgemm_gflop_s": 100.0,
        "absent": {"keops": "no compiler"},
        "facts": facts,
    }
    return Record("two_branch", "8x16", "float32", **(values | changes))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(
    ("call", "megabytes"),
    [("a.sum()", 0), ("a + 1", 0), ("(a + 1).sum()", 64), ("((a + 1) * (a + 2)).sum()", 192), ("(a + 1) * 2", 64)],
)
def test_extra_memory_of_known_operations(call, megabytes):
    """a holds 64 MB. Results are not counted: `a + 1` is one."""
    from bench.memory import RETURN_AT_ONCE

    program = f"import torch; from bench.memory import of; a = torch.ones(16_000_000); print(of(lambda: {call}))"
    environment = {**os.environ, **RETURN_AT_ONCE}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) / 1e6 == pytest.approx(megabytes, abs=0.6)


class Machine:
    """A clock that waiting and rounds move, and a matrix product that is as fast as a list says."""

    def __init__(self, monkeypatch, speeds, recorded=0.0):
        from bench import floors

        self.now, self.speeds = 0.0, iter(speeds)
        monkeypatch.setattr(floors, "gemm", lambda **_: next(self.speeds))
        monkeypatch.setattr(floors, "best_recorded", lambda: recorded)
        monkeypatch.setattr(floors.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(floors.time, "sleep", self.wait)

    def wait(self, seconds):
        self.now += seconds

    def take(self):
        """A round; its result is when it began."""
        self.wait(1)
        return self.now - 1


@pytest.mark.parametrize(("elsewhere", "reasons"), [(0.0, []), (0.5, ["other processes used 0.50 cores"])])
def test_the_watch_sees_other_processes(monkeypatch, elsewhere, reasons):
    from bench import floors

    machine = Machine(monkeypatch, [100])
    busy, own = iter([100.0, 118.0 + 10 * elsewhere]), iter([1.0, 19.0])
    monkeypatch.setattr(floors, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(floors, "own_seconds", lambda: next(own))
    watch = floors.Watch(0)
    machine.wait(10)
    assert watch.finish() == reasons


def test_the_watch_keeps_rounds_of_a_steady_machine(monkeypatch):
    from bench import floors

    #                         best  slow      a round that slows down, waited for, and good ones
    machine = Machine(monkeypatch, [100, 80, 85, 95, 70, 60, *[91] * 17])
    watch = floors.Watch(60)
    assert watch.rounds(machine.take, 6) == [2.5, 3.5, 4.5, 5.5, 6.5, 7.5]  # 0.5 s twice, the round at 1, 0.5 s
    assert watch.counts == (6, 7)
    assert not watch.reasons
    assert len(floors.Watch(0).rounds(machine.take, 2)) == 2  # nothing has to be waited for


def test_a_watch_that_loses_its_patience_says_so(monkeypatch):
    from bench import floors

    machine = Machine(monkeypatch, [70, *[71] * 100], recorded=100)
    watch = floors.Watch(2)
    assert len(watch.rounds(machine.take, 15)) == 5
    assert watch.reasons == ["a matrix product reached 90 GFLOP/s in 0 of 5 rounds only"]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")
def test_another_process_is_seen():
    from bench import floors

    def others():
        return floors.busy_seconds() - floors.own_seconds()

    spinning = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"])
    before = others()
    # Waiting for it adds its time to that of our children; until then it is another process.
    while Path(f"/proc/{spinning.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    assert others() - before > 0.7
    spinning.wait()


def test_a_rival_that_computes_something_else_is_refused():
    from bench.harness import Case, check_agreement

    rivals = {
        "imbdiff": lambda: torch.ones(3),
        "wrong": lambda: torch.ones(3) * 1.1,
        "nan": lambda: torch.ones(3) / 0 * 0,
    }
    for wrong in ("wrong", "nan"):
        mine = {"imbdiff": rivals["imbdiff"], wrong: rivals[wrong]}
        with pytest.raises(AssertionError, match=f"two_branch 8x16 float32 forward: {wrong} differs"):
            check_agreement(Case("two_branch", "8x16", "float32", {}, {}, {}), "forward", mine)


def test_every_rival_gets_the_same_gradients():
    from bench.harness import backward

    x = torch.randn(3, 4, requires_grad=True)
    plain = backward(lambda x: (x.sum(1), x.square().mean(1)), [x], x)
    low = backward(lambda x: (x.sum(1).bfloat16(), x.square().mean(1)), [x], x)
    torch.testing.assert_close(plain(), plain())
    torch.testing.assert_close(plain(), low(), atol=0.02, rtol=0)


def test_tables_and_chart(tmp_path):
    from bench import chart, report

    devices = {"cpu-avx2-2-threads": [record()]}
    page = report.filled(
        "Why.\n<!-- two_branch -->\nold\n<!-- /two_branch -->\n<!-- charts --><!-- /charts -->", devices
    )
    assert page.startswith("Why.\n<!-- two_branch -->")
    assert "| 8x16 float32 | forward+backward | 1.0 | 0.0005 | 10 | 50% | 50% | 10.00 |" in page
    assert "| 8x16 float32 | 0.0 | 2.5 |" in page
    assert "Without keops at 8x16 float32: no compiler." in page
    assert "torch 2.13.0, AVX2, 2 threads" in page
    assert "`make bench BENCH=bench/bench_two_branch.py`" in page
    assert "old" not in page
    assert "Not measured on a GPU." in page
    assert "Not measured on a CPU." not in page
    assert report.filled(page, devices) == page
    assert "Not measured on a CPU.\n\nNot measured on a GPU." in report.filled(page, {})
    chart.draw("cpu-avx2-2-threads", devices["cpu-avx2-2-threads"], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_records_come_back_as_they_were_written(tmp_path, monkeypatch):
    from bench import floors, report

    monkeypatch.setattr(floors, "RESULTS", tmp_path)
    record().save()
    assert report.load(tmp_path) == {floors.device_name(): [record()]}
    assert floors.best_recorded() == 100.0
