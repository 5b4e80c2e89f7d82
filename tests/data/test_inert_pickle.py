from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imbdiff.data.pickles import read_pickled_dict
from imbdiff.errors import InputError

DATA = np.arange(24, dtype=np.uint8).reshape(4, 6)
BATCH = {"batch_label": "training batch 1 of 5", "labels": [6, 9, 300, 4], "data": DATA, "filenames": ["a.png", "b"]}


class Code:
    """Runs `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def check(got: dict[str, Any]) -> None:
    assert list(got) == list(BATCH)
    assert {k: v for k, v in got.items() if k != "data"} == {k: v for k, v in BATCH.items() if k != "data"}
    assert got["data"].dtype == np.uint8
    assert np.array_equal(got["data"], DATA)


def test_python2_pickle(python2_pickle: Callable[[Any], bytes]) -> None:
    raw = python2_pickle(BATCH)
    check(read_pickled_dict(raw, "x"))
    # What the writer of these tests makes is a pickle that Python itself reads the same way.
    check(pickle.loads(raw, encoding="latin-1"))


def test_fortran_order(python2_pickle: Callable[[Any], bytes]) -> None:
    raw = python2_pickle({"data": np.asfortranarray(DATA)})
    assert b"\x88T" in raw
    assert np.array_equal(read_pickled_dict(raw, "x")["data"], DATA)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_python3_pickles(protocol: int) -> None:
    check(read_pickled_dict(pickle.dumps(BATCH, protocol), "x"))
    by_bytes = {k.encode(): v for k, v in BATCH.items()}
    check(read_pickled_dict(pickle.dumps(by_bytes, protocol), "x"))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_values(protocol: int) -> None:
    value = {
        "a": None,
        "b": True,
        "c": (),
        "d": (1,),
        "e": (1, 2, 3, -(2**40)),
        "f": [[], {}],
        "g": False,
        "é": {"x": [1]},
    }
    assert read_pickled_dict(pickle.dumps(value, protocol), "x") == value


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i4", "<i8", ">u2"])
def test_integer_arrays(dtype: str) -> None:
    array = np.array([[1, 2, 3], [4, 5, 250]], dtype)
    got = read_pickled_dict(pickle.dumps({"a": array}, 2), "x")["a"]
    assert np.array_equal(got, array)
    assert got.dtype == array.dtype


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"data": c}, lambda c: {"labels": [1, (c,)]}])
def test_code_is_refused_and_does_not_run(protocol: int, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    raw = pickle.dumps(wrap(Code(os.system, f"echo > {ran}")), protocol)
    with pytest.raises(
        InputError, match=rf"x: refused: the archive contains code \({os.name}.system\), not data; nothing"
    ):
        read_pickled_dict(raw, "x")
    assert not ran.exists()
    pickle.loads(raw)  # the bomb is live
    assert ran.exists()


def test_named_modules_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nname = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    raw = b"chostile_module\nname\n."
    with pytest.raises(InputError, match=r"code \(hostile_module.name\)"):
        read_pickled_dict(raw, "x")
    assert not (tmp_path / "ran").exists()
    pickle.loads(raw)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("target", [np.load, np.frombuffer, eval, getattr, pickle.loads, np.memmap])
def test_other_names_are_refused(target: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="contains code"):
        read_pickled_dict(pickle.dumps({"a": target}, 2), "x")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"(S'true'\nios\nsystem\n.", r"code \(os.system\)"),
        (b"(cos\nsystem\nS'true'\no.", r"code \(os.system\)"),
        (b"(S'a'\ninumpy\ndtype\n.", r"code \(numpy.dtype\)"),
        (b"Pname\n.", "opcode PERSID"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02cnumpy\nndarray\nK\x04\x85R.", "damaged"),
        (b"\x80\x02U\x01aU\x01b\x85R.", "a call of what is not a name"),
        (b"\x80\x02cnumpy\ndtype\nU\x02O8\x85R.", "numpy dtype 'O8', expected integers"),
        (b"\x80\x02cnumpy\ndtype\nU\x02f4\x85R.", "expected integers"),
        (b"\x80\x02}U\x01ab.", "damaged"),
        (b"\x80\x02K\x07.", "damaged"),
        (b"\x80\x02]q\x01.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"PK\x03\x04", "damaged|opcode"),
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02}]K\x01s.", "damaged"),
        (b".", "damaged"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "damaged"),
    ],
)
def test_hostile_and_damaged_pickles(raw: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_pickled_dict(raw, "x")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_ends_in_a_dict_or_an_input_error(python2_pickle: Callable[[Any], bytes], data: st.DataObject) -> None:
    raw = bytearray(python2_pickle(BATCH))
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    with contextlib.suppress(InputError):
        assert isinstance(read_pickled_dict(bytes(raw), "x"), dict)
