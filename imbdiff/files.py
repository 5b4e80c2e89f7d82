"""Files that are whole or absent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256(*files: Path) -> str:
    """SHA-256 over the bytes of the files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Ask the system to put a file's or a folder's content on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(file: Path, text: str) -> None:
    """Replace `file` by `text` in one step: a reader sees the old content or the new, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
