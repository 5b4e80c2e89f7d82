"""imbdiff compare RUN RUN ...: one table of runs that were evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from imbdiff.errors import InputError
from imbdiff.evaluation import Report, compare_table
from imbdiff.files import write_text
from imbdiff.train.log import say


@dataclass(frozen=True)
class CompareCommand:
    """Put evaluated runs side by side, for head, medium and tail, with the yardsticks of the first.

    Says under the table where two runs were not measured alike: another reference, extractor, sampler or number of
    images. Run `imbdiff evaluate` on each first.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories."""
    out: str = ""
    """File for the table, as markdown."""


def main(args: list[str]) -> int:
    command = tyro.cli(CompareCommand, prog="imbdiff compare", args=args)
    if not command.runs:
        raise InputError("compare takes run directories, each evaluated before; got none")
    table = comparison([Path(run) for run in command.runs])
    say(Console(), table)
    if command.out:
        write_text(Path(command.out), table)
    return 0


def comparison(runs: list[Path]) -> str:
    """The table of the runs and of the first run's yardsticks."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    reports = {name: Report.load(run / "report") for name, run in zip(names, runs, strict=True)}
    for name, folder in (("copies of training images", "copies"), ("fresh real images", "fresh")):
        if (runs[0] / "report" / folder).is_dir():
            reports[name] = Report.load(runs[0] / "report" / folder)
    return compare_table(reports, groups=next(iter(reports.values())).groups)
