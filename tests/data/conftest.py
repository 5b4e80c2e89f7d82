"""Writers of the file formats that the loaders read."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_python2_pickle(value: Any) -> bytes:
    """A protocol-2 pickle as Python 2 wrote it: text is a byte string, arrays go through numpy.core.multiarray."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}q\x01(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"]q\x02(" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin-1")
    assert isinstance(value, np.ndarray)
    fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    create = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01b\x87q\x06Rq\x07"
    shape = _python2(value.shape[0]) + _python2(value.shape[1]) + b"\x86q\x08"
    kind = b"cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87Rq\x0a(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = _python2(value.tobytes("F" if fortran else "C"))
    return create + b"(K\x01" + shape + kind + (b"\x88" if fortran else b"\x89") + raw + b"tq\x0bb"


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def python2_pickle() -> Callable[[Any], bytes]:
    return write_python2_pickle


@pytest.fixture(scope="session")
def tar() -> Callable[[Path, dict[str, bytes]], Path]:
    return write_tar
