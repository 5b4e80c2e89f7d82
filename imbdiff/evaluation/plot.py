"""What each class got, against how frequent it is in training: one small picture for each metric."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imbdiff.errors import InputError

if TYPE_CHECKING:
    from imbdiff.evaluation.report import Report

SHADES = ("#dce9f5", "#fdf3d8", "#f9dcd6")
LINE = "#1f4e79"
TITLES = {
    "coverage": "coverage (higher is better)",
    "label_accuracy": "label accuracy (higher is better)",
    "fid": "FID (lower is better)",
    "kid": "KID (lower is better)",
    "memorisation": "memorisation (1: none, 0: copies)",
}


def plot_ranks(report: Report, file: Path) -> None:
    """Coverage, label accuracy, FID (KID where FID is rank-deficient) and memorisation against class rank, as PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"{file.name} is drawn by matplotlib, which is missing: pip install 'imbdiff[demo]' "
            f"(report.json and report.md are already in {file.parent})"
        ) from error

    classes = [(name.removeprefix("class "), row) for name, row in report.rows.items() if row["kind"] == "class"]
    distance = "kid" if any(row["fid_note"] for _, row in classes) else "fid"
    # A figure with a canvas of its own, not pyplot: no global state, no display.
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    for axes, metric in zip(panels.flat, ("coverage", "label_accuracy", distance, "memorisation"), strict=True):
        points = [(i, row[metric]) for i, (_, row) in enumerate(classes, 1) if row[metric] is not None]
        _draw(axes, metric, points, 5.0 if len(classes) <= 30 else 2.5)
        _shade(axes, report, {row["classes"][0]: i for i, (_, row) in enumerate(classes, 1)})
        _name_classes(axes, [name for name, _ in classes])
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _draw(axes: Any, metric: str, points: list[tuple[int, float]], size: float) -> None:
    axes.set_title(TITLES[metric], fontsize=11)
    axes.grid(axis="y", color="0.85", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color=LINE, lw=1.2, ms=size)
    else:
        axes.text(0.5, 0.4, "not measured", transform=axes.transAxes, ha="center", color="0.4")
    values = [v for _, v in points]
    if metric in ("coverage", "label_accuracy"):
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])  # room above is for names, no share is there
    if metric == "memorisation":
        axes.axhline(1, color="0.5", lw=0.8, ls="--")
    low = min([0.0, *values])
    high = max([1.0, *values]) if metric not in ("fid", "kid") or not values else max(values)
    # Room above the curve for the names of the groups.
    axes.set_ylim(low - 0.04 * (high - low), high + 0.2 * (high - low) + 1e-12)


def _shade(axes: Any, report: Report, position: dict[int, int]) -> None:
    """Colour the stretch of each group; its name stands at the top of its middle."""
    groups = [(name, row) for name, row in report.rows.items() if row["kind"] == "group" and row["classes"]]
    for i, (name, row) in enumerate(groups):
        places = sorted(position[c] for c in row["classes"])
        for place in places:
            axes.axvspan(place - 0.5, place + 0.5, color=SHADES[i % len(SHADES)], lw=0, zorder=0)
        middle = places[0] / 2 + places[-1] / 2
        axes.text(middle, 0.95, name, transform=axes.get_xaxis_transform(), ha="center", va="top", color="0.3")


def _name_classes(axes: Any, names: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, len(names) + 0.5)
    if len(names) > 20:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("class rank, 1 is the most frequent")
        return
    slanted = max(map(len, names)) * len(names) > 50
    axes.set_xticks(range(1, len(names) + 1), names, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    axes.set_xlabel("class, the most frequent first")
