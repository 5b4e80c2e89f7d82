"""The three files of a report, and the table that puts reports side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imbdiff.errors import InputError
from imbdiff.evaluation.report import COLUMNS, ON_RECALL, Report
from imbdiff.evaluation.table import align, cell, compare_table


def row(kind: str, classes: list[int], value: float = 0.5, **other: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(COLUMNS, value)
    notes = {"classes_left_out": [], "memorisation_left_out": [], "memorisation_biased_low": [], "fid_note": None}
    return {"kind": kind, "classes": classes, **values, **notes, "n_fake": 9, "n_real": 8, "kid_std": None, **other}


def report(value: float = 0.5, **protocol: Any) -> Report:
    rows = {
        "all": row("all", [0, 1, 2], value, inception_score=2.5, inception_score_std=0.25, classes_left_out=[1]),
        "head": row("group", [2], value, kid=-0.00042),
        "medium": row("group", [0], value, memorisation=None, memorisation_left_out=[0]),
        "tail": row("group", [1], value, fid=float("nan"), coverage=float("inf")),
        "class c": row("class", [2], value, fid_note="rank-deficient"),
        "class a": row("class", [0], value),
        "class b|d": row("class", [1], value, memorisation=None),
    }
    return Report(rows, {"reference": "held-out", "k": 5, "steps": 50, **protocol})


def test_a_report_survives_saving(tmp_path: Path) -> None:
    before = report(path=Path("a/b"), ema=(0.1, float("nan")), nested={"on": True})
    before.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["ranks.png", "report.json", "report.md"]
    text = (folder / "report.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    after = Report.load(folder)
    assert after.protocol == {**before.protocol, "path": "a/b", "ema": [0.1, None], "nested": {"on": True}}
    assert after.rows["tail"] == {**before.rows["tail"], "fid": None, "coverage": None}
    assert list(after.rows) == list(before.rows)
    assert after.rows["head"] == before.rows["head"]
    after.save(folder)
    assert (folder / "report.json").read_text() == text


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report().save(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        report(0.7).save(tmp_path)
    from imbdiff.evaluation.plot import plot_ranks

    with pytest.raises(OSError, match="no space left"):
        plot_ranks(report(0.7), tmp_path / "ranks.png")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_the_page_says_what_must_be_known() -> None:
    text = report().markdown()
    lines = text.splitlines()
    assert "- reference: held-out" in lines
    header = next(line for line in lines if line.startswith("| row"))
    assert [c.strip() for c in header.strip("|").split("|")] == [
        *("row", "N fake", "N real", "coverage", "label accuracy", "fid", "kid"),
        *("density", "precision", "recall", "memorisation"),
    ]
    table = [line for line in lines if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in table[1:]] == [
        *("all", "head", "medium", "tail", "class c", "class a", "class b\\|d")
    ]
    assert len({len(line) for line in table}) == 1
    assert "0.500*" in next(line for line in table if "class c" in line)
    assert any("rank-deficient" in line for line in lines)
    assert "Inception score (10 splits, all classes): 2.500 ± 0.250." in lines
    assert "- all: computed without classes b|d, which have no generated or no real images" in lines
    assert "- medium: memorisation without classes a, which have no training or no held-out images" in lines
    assert ON_RECALL in text
    assert max(map(len, lines)) < 140
    plain = report()
    plain.rows["class c"]["fid_note"] = None
    assert "rank-deficient" not in plain.markdown()


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    whole = report()
    for value in whole.rows.values():
        value["memorisation"] = None
    whole.save(tmp_path)
    with Image.open(tmp_path / "ranks.png") as image:
        assert image.size == (1200, 768)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # drawn, not blank


def test_many_classes_with_long_names_fit(tmp_path: Path) -> None:
    for count, name in ((120, "x"), (12, "a long class name")):
        rows = {"all": row("all", list(range(count)))}
        rows |= {f"class {name} {i}": row("class", [i], i / count) for i in range(count)}
        Report(rows).save(tmp_path)  # a warning of the layout engine would be an error here


def test_without_matplotlib_the_numbers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'imbdiff\[demo\]' \(report.json and report.md are already in"):
        report().save(tmp_path)
    assert Report.load(tmp_path).rows["all"]["coverage"] == 0.5


def test_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a report at .*report\.json, found no file"):
        Report.load(tmp_path)
    for text in ("{", "[]", '{"rows": {}}', '{"rows": {"all": 3}, "protocol": {}}', '{"rows": {}, "protocol": 1}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(InputError, match="is not a report of imbdiff"):
            Report.load(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("coverage", 0.925, "0.93"),
        ("coverage", 1.0, "1.00"),
        ("fid", 118.4, "118"),
        ("fid", 5.931, "5.93"),
        ("kid", 0.00170, "0.00170"),
        ("kid", -0.0264, "-0.0264"),
        ("kid", 1e-9, "0.00000"),
        ("kid", 0.0, "0.00"),
        ("fid", None, "–"),
        ("fid", float("nan"), "–"),
    ],
)
def test_cells(column: str, value: float | None, text: str) -> None:
    assert cell(column, value) == text


def test_tables_are_aligned() -> None:
    assert align([["", "a b"], ["long name", "1"], ["x|y", "12345"]]).splitlines() == [
        "|           |   a b |",
        "|-----------|------:|",
        "| long name |     1 |",
        "| x\\|y      | 12345 |",
    ]


def test_reports_side_by_side() -> None:
    text = compare_table({"ddpm": report(0.25), "cbdm": report(12.75)}, columns=("fid", "coverage", "kid"))
    assert text.splitlines() == [
        "Each cell: head / medium / tail.",
        "",
        "|      |               fid |          coverage |                      kid |",
        "|------|------------------:|------------------:|-------------------------:|",
        "| ddpm | 0.250 / 0.250 / – |  0.25 /  0.25 / – | -0.00042 / 0.250 / 0.250 |",
        "| cbdm |  12.8 /  12.8 / – | 12.75 / 12.75 / – | -0.00042 /  12.8 /  12.8 |",
    ]


def test_reports_that_were_not_measured_alike_say_so() -> None:
    other = report(k=3, steps=100, note="mine")
    other.rows["tail"]["n_fake"] = 7
    lines = compare_table({"a": report(), "b": other}).splitlines()
    assert lines[-5:] == [
        "Not like for like; these differ:",
        "",
        "- k: a 5, b 3",
        "- steps: a 50, b 100",
        "- n_fake: a [9, 9, 9], b [9, 9, 7]",
    ]


def test_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="expected at least one report"):
        compare_table({})
    with pytest.raises(InputError, match="report a has no row many; it has all, head"):
        compare_table({"a": report()}, groups=("many",))
