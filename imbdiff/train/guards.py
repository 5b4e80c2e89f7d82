"""What may interrupt a run from outside, turned into an orderly end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from imbdiff.errors import InputError


@contextlib.contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """A full disk or a missing permission ends the run with what to do, not with a traceback."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"could not write to {run}: {error}. Earlier checkpoints there are untouched; mend the cause and run the "
            "same command to go on from the newest."
        ) from error


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that fills when Ctrl-C or the system asks to stop, so that the step at hand ends and is saved."""
    asked: list[str] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(s, lambda number, _: asked.append(signal.Signals(number).name)) for s in signals]
    try:
        yield asked
    finally:
        for s, handler in zip(signals, old, strict=True):
            signal.signal(s, handler)
