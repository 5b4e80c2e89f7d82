"""What a run tells: metrics.jsonl for programs, a live bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from imbdiff.data import TrainingData
from imbdiff.files import write_text


def describe_split(data: TrainingData) -> str:
    """The training set in two lines: what was chosen, and the hash that settles which."""
    counts = sorted(data.counts.tolist(), reverse=True)
    shown = " ".join(map(str, counts)) if len(counts) <= 20 else f"{counts[0]} ... {counts[-1]}"
    groups = ", ".join(f"{name} {len(classes)}" for name, classes in data.groups.items())
    return (
        f"{data.pool.name}: {sum(counts)} images, {len(counts)} classes ({groups}): {shown}\n"
        f"split sha256 {data.split_hash}"
    )


def say(console: Console, text: str) -> None:
    """Print `text` as it is: no markup, no colours, no line breaks of the console's own."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Meter:
    """Means of loss terms since the last row, summed on the device; saved, so that resuming is exact."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in {**values, "steps": torch.ones(())}.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self) -> dict[str, float]:
        steps = float(self.sums.pop("steps", torch.ones(())))
        order = sorted(self.sums, key=lambda name: (name != "base", name))
        row = {name: float(self.sums[name]) / steps for name in order}
        self.sums = {}
        return row


class Metrics:
    """metrics.jsonl, append-only; on resume cut back to the step that training goes on from."""

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            write_text(file, "".join(kept))

    def write(self, row: Mapping[str, object]) -> None:
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")


class Reporter:
    """Progress of one run: bar with time left, images/s and the loss by term."""

    def __init__(self, name: str, step: int, total: int, batch_size: int, console: Console) -> None:
        self.name, self.total, self.batch_size, self.console = name, total, batch_size, console
        self.first, self.began = step, time.perf_counter()
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=total, completed=step, losses="")

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def images_per_second(self, step: int) -> float:
        return (step - self.first) * self.batch_size / max(time.perf_counter() - self.began, 1e-9)

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def row(self, step: int, losses: Mapping[str, float]) -> None:
        speed = self.images_per_second(step)
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self.bar.update(self.task, losses=f"{speed:,.0f} img/s  {text}")
        if not self.console.is_terminal:
            left = (self.total - step) * self.batch_size / max(speed, 1e-9)
            say(self.console, f"{self.name}  step {step}/{self.total}  {text}  {speed:,.0f} img/s  {left:.0f} s left")
