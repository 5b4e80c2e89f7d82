"""A report: the numbers, the protocol they were measured under, and the three files that show them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imbdiff.errors import InputError
from imbdiff.evaluation.table import align, cell
from imbdiff.files import write_text

# Coverage and label accuracy lead: a copied tail fails the one, a wrong tail the other.
COLUMNS = ("coverage", "label_accuracy", "fid", "kid", "density", "precision", "recall", "memorisation")
ON_RECALL = """\
Recall alone rewards a wrong tail: it grows with the spread of the generated images, right or wrong. Noise of 60 grey
levels on copies of 8 training digits a class lifts it from 0.00 to 0.84, while label accuracy falls from 1.00 to 0.92
and FID grows from 6.1 to 20.5 (averages over classes, `pytest tests/evaluation/test_evaluate.py -k noise`). Read it
beside coverage and label accuracy.
"""
ON_COLUMNS = """\
Coverage, label accuracy, density, precision and recall: higher is better; FID and KID: lower. Memorisation: mean
distance to the nearest training image over that to the nearest unseen one; 1 means no closer to the training images, 0
copies. Groups share one N, and so do classes; FID, precision, recall, density and coverage compare at equal N only.
KID is one unbiased estimate, class by class, up to 1000 images, and the mean of 100 subsets of 1000 above.
"""


def _plain(value: Any) -> Any:
    """What JSON can hold; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@dataclass
class Report:
    """Rows "all", groups, "class <name>" (in this order, classes by rank), each a dict of values; and the protocol."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """Names of the group rows, head first."""
        return [name for name, row in self.rows.items() if row.get("kind") == "group"]

    def save(self, directory: str | Path) -> None:
        """Write report.json, report.md and ranks.png, each whole or not at all."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = _plain({"protocol": self.protocol, "rows": self.rows})
        write_text(folder / "report.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_text(folder / "report.md", self.markdown())
        from imbdiff.evaluation.plot import plot_ranks

        plot_ranks(self, folder / "ranks.png")

    @classmethod
    def load(cls, directory: str | Path) -> Report:
        """Read a saved report back from its report.json."""
        file = Path(directory) / "report.json"
        if not file.is_file():
            raise InputError(f"expected a report at {file}, found no file; run `imbdiff evaluate` first")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            rows, protocol = content["rows"], content["protocol"]
            if not isinstance(protocol, dict) or not all(isinstance(row, dict) for row in rows.values()):
                raise TypeError("rows and protocol must be objects")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is not a report of imbdiff ({error}); run `imbdiff evaluate` again") from error
        return cls(rows, protocol)

    def markdown(self) -> str:
        """The protocol as a list, then one table."""
        lines = ["# Evaluation", "", "## Protocol", ""]
        lines += [f"- {name}: {_plain(value)}" for name, value in self.protocol.items()]
        head = ["row", "N fake", "N real", *(c.replace("_", " ") for c in COLUMNS)]
        body = []
        for name, row in self.rows.items():
            cells = [cell(c, row.get(c)) + ("*" if c == "fid" and row.get("fid_note") else "") for c in COLUMNS]
            body.append([name, str(row.get("n_fake", "")), str(row.get("n_real", "")), *cells])
        lines += ["", "## Results", "", align([head, *body]), ""]
        if any(row.get("fid_note") for row in self.rows.values()):
            lines += [
                "\\* rank-deficient: N is not above the feature dimension, FID is far above its large-N value.",
                "",
            ]
        if (score := self.rows.get("all", {}).get("inception_score")) is not None:
            spread = self.rows["all"]["inception_score_std"]
            lines += [f"Inception score (10 splits, all classes): {score:.3f} ± {spread:.3f}.", ""]
        classes = {r["classes"][0]: n.removeprefix("class ") for n, r in self.rows.items() if r.get("kind") == "class"}
        lines += [f"- {name}: {note}" for name, row in self.rows.items() for note in _notes(row, classes)]
        return "\n".join([*lines, "", ON_COLUMNS, ON_RECALL])


def _notes(row: dict[str, Any], names: dict[int, str]) -> list[str]:
    """What a reader of the row must know and the table has no room for; for a class the row "all" has said it."""
    if row.get("kind") == "class":
        return []
    texts = {
        "classes_left_out": "computed without classes {}, which have no generated or no real images",
        "memorisation_left_out": "memorisation without classes {}, which have no training or no held-out images",
        "memorisation_biased_low": "memorisation is biased low in classes {}: fewer held-out than training images",
    }
    return [
        text.format(", ".join(names.get(c, str(c)) for c in row[key])) for key, text in texts.items() if row.get(key)
    ]
