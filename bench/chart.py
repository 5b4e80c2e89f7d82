"""How far from the machine's limit: a line for each operation and shape, a point for each rival."""

from __future__ import annotations

from pathlib import Path

from .harness import Record

COLOURS = {
    "imbdiff": "#c2410c",
    "compile": "#1d4ed8",
    "expert": "#0f766e",
    "chunked": "#7c3aed",
    "eager": "#64748b",
    "keops": "#a16207",
    "published": "#be185d",
}


def share_of_floor(record: Record, rival: str) -> float:
    """Time of the copy, or of the product where that is longer, over the rival's time."""
    return max(record.of_copy(record.main, rival), record.of_gemm(record.main, rival))


def label(record: Record) -> str:
    bound = "copy" if record.of_copy(record.main) >= record.of_gemm(record.main) else "matrix product"
    shape = record.shape.replace("x", " × ")
    return f"{record.op}  {shape}  {record.dtype}\n{record.main}, floor: {bound}"


def draw(device: str, records: list[Record], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    # A whole training step has no floor of its own: its bytes are those of the loss alone.
    lines = sorted((r for r in records if "reference" not in r.us[r.main]), key=lambda r: (r.op, r.dtype, r.shape))
    figure, panel = plt.subplots(figsize=(9, 1.6 + 0.55 * len(lines)), layout="constrained")
    for y, record in enumerate(reversed(lines)):
        panel.axhline(y, color="#e2e8f0", linewidth=0.8, zorder=0)
        for rival in [name for name in COLOURS if name in record.us[record.main]]:
            ours = rival == "imbdiff"
            style = {"s": 90 if ours else 45, "color": COLOURS[rival], "edgecolor": "white"}
            panel.scatter(share_of_floor(record, rival), y, zorder=3 if ours else 2, label=rival, **style)
    panel.axvline(1, color="#334155", linewidth=1)
    panel.set_yticks(range(len(lines)), [label(record) for record in reversed(lines)], fontsize=8)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("share of the floor: 1× is as fast as a copy of the bytes, or as the matrix product", fontsize=8)
    panel.set_title(device, fontsize=10, loc="left")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    named = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    keys = [name for name in COLOURS if name in named]
    figure.legend([named[k] for k in keys], keys, loc="outside upper right", ncols=len(keys), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
