"""Writes the tables and the chart of docs/performance.md from bench/results: `make performance`.

The prose of the page is written by hand; what stands between `<!-- OP -->` and `<!-- /OP -->` is made here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from .chart import draw
from .floors import RESULTS
from .harness import Record

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SOURCES = {
    "two_branch": "bench_two_branch.py",
    "negative_distance": "bench_contrast.py",
    "cosine_contrastive": "bench_cosine.py",
    "product_of_gaussians": "bench_product.py",
    "gaussian_divergence": "bench_gaussian.py",
    "gaussian_overlap": "bench_gaussian.py",
    "knn_radius": "bench_neighbours.py",
    "ball_count": "bench_neighbours.py",
    "posterior_draw": "bench_posterior.py",
    "posterior_mean": "bench_posterior.py",
}
"""The file that measures an operation, where it is not `bench_OP.py`."""


def load(results: Path) -> dict[str, list[Record]]:
    """Device: its records."""
    found: dict[str, list[Record]] = {}
    for file in sorted(results.glob("*/*.json")):
        found.setdefault(file.parent.name, []).append(Record(**json.loads(file.read_text())))
    return found


def filled(page: str, devices: dict[str, list[Record]]) -> str:
    """The page with each pair of markers filled."""

    def fill(match: re.Match[str]) -> str:
        what = match["what"]
        text = charts(devices) if what == "charts" else tables(what, devices)
        return f"<!-- {what} -->\n\n{text}\n\n<!-- /{what} -->"

    return re.sub(r"<!-- (?P<what>\w+) -->.*?<!-- /(?P=what) -->", fill, page, flags=re.S)


def chart_file(device: str) -> str:
    return f"performance-{device}.png"


def charts(devices: dict[str, list[Record]]) -> str:
    if not devices:
        return "Not measured yet."
    return "\n\n".join(f"![Share of the floor reached on {device}]({chart_file(device)})" for device in devices)


def tables(op: str, devices: dict[str, list[Record]]) -> str:
    mine = {device: [r for r in records if r.op == op] for device, records in devices.items()}
    mine = {device: records for device, records in mine.items() if records}
    parts = [table(device, records) for device, records in mine.items()]
    parts += [] if any(device.startswith("cpu") for device in mine) else ["Not measured on a CPU."]
    parts += [] if any(not device.startswith("cpu") for device in mine) else ["Not measured on a GPU."]
    file = SOURCES.get(op, f"bench_{op}.py")
    return "\n\n".join([*parts, f"Made by `make bench`; this table alone by `make bench BENCH=bench/{file}`."])


def table(device: str, records: list[Record]) -> str:
    rivals = list(dict.fromkeys(rival for r in records for times in r.us.values() for rival in times))[1:]
    head = ["shape", "mode", "MB", "GFLOP", "µs", "of copy", "of gemm", *(f"× {rival}" for rival in rivals)]
    rows = [row(record, mode, rivals) for record in records for mode in record.us]
    memory = [memory_row(record, ["imbdiff", *rivals]) for record in records]
    return "\n\n".join(
        [
            f"**{device}**: {conditions(records)}",
            markdown(head, rows, left=2),
            f"Peak memory beyond inputs and results, {records[0].main}, MB:",
            markdown(["shape", "imbdiff", *rivals], memory, left=1),
            *sorted(
                {f"Without {rival} at {r.shape} {r.dtype}: {why}." for r in records for rival, why in r.absent.items()}
            ),
        ]
    )


def conditions(records: list[Record]) -> str:
    """What the records have in common; records taken under different conditions are not one table."""
    kinds = {(r.facts["torch"], r.facts["capability"], r.facts["threads"], r.facts["allocator"]) for r in records}
    said = [f"torch {t}, {c}, {n} threads, allocator {a}" for t, c, n, a in sorted(kinds)]
    gemm = max(r.sgemm_gflop_s for r in records)
    return f"{'; or '.join(said)}; float32 matrix product {gemm:.0f} GFLOP/s."


def row(record: Record, mode: str, rivals: list[str]) -> list[str]:
    times, gflop = record.us[mode], record.flops[mode] / 1e9
    return [
        f"{record.shape} {record.dtype}",
        mode,
        f"{record.bytes_moved[mode] / 1e6:.1f}",
        f"{gflop:,.0f}" if gflop >= 10 else f"{gflop:.2g}",
        f"{times['imbdiff'][1]:,.0f}",
        percent(record.of_copy(mode)),
        percent(record.of_gemm(mode)),
        *(f"{record.ratio(mode, rival):.2f}" if rival in times else "–" for rival in rivals),
    ]


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def memory_row(record: Record, rivals: list[str]) -> list[str]:
    taken = [record.extra_bytes.get(rival) for rival in rivals]
    return [f"{record.shape} {record.dtype}", *("–" if b is None else f"{b / 1e6:.1f}" for b in taken)]


def markdown(head: list[str], rows: list[list[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where the page is stale")
    check = parser.parse_args().check
    devices = load(RESULTS)
    page = PAGE.read_text()
    new = filled(page, devices)
    missing = [device for device in devices if not (PAGE.parent / chart_file(device)).exists()]
    if check:
        if new != page or missing:
            print("docs/performance.md is not what bench/results says: make performance", file=sys.stderr)
        return int(new != page or bool(missing))
    PAGE.write_text(new)
    for device, records in devices.items():
        draw(device, records, PAGE.parent / chart_file(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
