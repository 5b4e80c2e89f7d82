"""How far from the machine's limit: bytes against the share of the floor, for each operation and rival."""

from __future__ import annotations

from pathlib import Path

from .harness import MAIN, Record

COLOURS = {"imbdiff": "#c2410c", "compile": "#1d4ed8", "expert": "#0f766e", "eager": "#64748b", "keops": "#a16207"}
MARKERS = "osD^vP*X"


def share_of_floor(record: Record, rival: str) -> float:
    """Time of the copy, or of the product where that is longer, over the rival's time."""
    return max(record.of_copy(record.main, rival), record.of_gemm(record.main, rival))


def draw(device: str, records: list[Record], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    types = sorted({r.dtype for r in records}, reverse=True)
    ops = sorted({r.op for r in records})
    seen = [rival for rival in COLOURS if any(rival in r.us[r.main] for r in records)]
    width = max(8.0, 1 + 5.5 * len(types))
    figure, panels = plt.subplots(1, len(types), figsize=(width, 5), sharey=True, squeeze=False, layout="constrained")
    shares = [share_of_floor(r, rival) for r in records for rival in seen if rival in r.us[r.main]]
    low, high = min(0.02, *shares) / 1.6, max(1.0, *shares) * 6
    for panel, dtype in zip(panels[0], types, strict=True):
        mine = sorted((r for r in records if r.dtype == dtype), key=lambda r: r.bytes_moved[r.main])
        panel.axhspan(1, high, color="#f1f5f9", zorder=0)
        panel.axhline(1, color="#334155", linewidth=1)
        for place, record in enumerate(mine):
            x = record.bytes_moved[record.main] / 1e6
            for side, rival in enumerate(seen):
                if rival in record.us[record.main]:
                    ours, marker = rival == "imbdiff", MARKERS[ops.index(record.op)]
                    panel.plot(
                        # Beside each other, so that equals do not hide each other.
                        x * 1.06 ** (side - len(seen) // 2), share_of_floor(record, rival), marker,
                        color=COLOURS[rival], markersize=10 if ours else 7, markeredgecolor="white", zorder=3,
                    )  # fmt: skip
            bound = "copy" if record.of_copy(record.main) >= record.of_gemm(record.main) else "matrix product"
            # Two heights, so that neighbours' texts do not meet.
            panel.text(
                x, high / (1.15 if place % 2 else 1.9), f"{record.shape.replace('x', ' × ')}\nfloor: {bound}",
                ha="center", va="top", fontsize=8, color="#334155",
            )  # fmt: skip
        sizes = [r.bytes_moved[r.main] / 1e6 for r in mine]
        panel.set(xscale="log", yscale="log", ylim=(low, high), xlim=(min(sizes) / 2.5, max(sizes) * 2.5))
        panel.set_title(dtype, fontsize=10)
        panel.set_xlabel("bytes read and written, MB")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(True, which="major", color="#e2e8f0", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"share of the floor, {MAIN}")
    keys = [Line2D([], [], color=COLOURS[rival], marker="o", linestyle="", label=rival) for rival in seen]
    keys += [Line2D([], [], color="#94a3b8", marker=MARKERS[i], linestyle="", label=op) for i, op in enumerate(ops)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    figure.suptitle(f"{device}: 100% is as fast as a copy or a matrix product", fontsize=11)
    figure.savefig(file, dpi=130)
    plt.close(figure)
