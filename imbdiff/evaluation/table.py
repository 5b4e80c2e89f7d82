"""Tables that read well as markdown and in a terminal, and the one that puts reports side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imbdiff.errors import InputError

if TYPE_CHECKING:
    from imbdiff.evaluation.report import Report

MISSING = "–"
# Numbers compare only if these agree; whatever else a protocol holds may be the very thing that is compared.
LIKE_FOR_LIKE = (
    "reference",
    "reference_sha256",
    "label_law",
    "extractor_sha256",
    "k",
    "sampler",
    "steps",
    "split_sha256",
)


def cell(column: str, value: Any) -> str:
    """A value as the tables write it: shares with two decimals, distances with three digits."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return MISSING
    if column not in ("fid", "kid"):
        return f"{value:.2f}"
    # Decimals so that three digits are left, but no exponent: 0.00042, 0.050, 5.93, 118.
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(5, max(0, 2 - magnitude))}f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with padded columns: names to the left, numbers to the right. The first row is the header."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]  # a class called a|b must not open a column
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (w + 1) + ':' for w in widths[1:])}|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def compare_table(
    reports: Mapping[str, Report],
    columns: Sequence[str] = ("coverage", "label_accuracy", "fid", "kid", "memorisation"),
    groups: Sequence[str] = ("head", "medium", "tail"),
) -> str:
    """One line for each report; under every metric its value in each of the groups, as "0.93 / 0.88 / 0.41"."""
    if not reports:
        raise InputError("expected at least one report to compare, got none")
    for name, report in reports.items():
        if absent := [group for group in groups if group not in report.rows]:
            raise InputError(f"report {name} has no row {', '.join(absent)}; it has {', '.join(report.rows) or 'none'}")
    # Each number of a cell is padded on its own, so that head, medium and tail line up down the page.
    body: list[list[str]] = [[name] for name in reports]
    for column in columns:
        parts = [[cell(column, r.rows[g].get(column)) for g in groups] for r in reports.values()]
        widths = [max(map(len, values)) for values in zip(*parts, strict=True)]
        for row, values in zip(body, parts, strict=True):
            row.append(" / ".join(v.rjust(w) for v, w in zip(values, widths, strict=True)))
    head = ["", *(column.replace("_", " ") for column in columns)]
    lines = [f"Each cell: {' / '.join(groups)}.", "", align([head, *body])]
    return "\n".join([*lines, *_differences(reports, groups), ""])


def _differences(reports: Mapping[str, Report], groups: Sequence[str]) -> list[str]:
    """A warning under the table if the reports were not measured alike."""
    found: dict[str, dict[str, Any]] = {
        key: {n: r.protocol.get(key) for n, r in reports.items()} for key in LIKE_FOR_LIKE
    }
    for side in ("n_fake", "n_real"):
        found[side] = {n: [r.rows[g].get(side) for g in groups] for n, r in reports.items()}
    lines = []
    for key, values in found.items():
        # A yardstick has no sampler: what is absent differs from nothing.
        if len({str(v) for v in values.values() if v is not None}) > 1:
            lines.append(f"- {key}: " + ", ".join(f"{n} {str(v)[:16]}" for n, v in values.items()))
    return ["", "Not like for like; these differ:", "", *lines] if lines else []
