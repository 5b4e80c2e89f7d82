"""Reads the data in a pickle without running it.

CIFAR's Python archives are pickles, and unpickling runs whatever the file says. This interpreter of the opcodes knows
lists, dicts, tuples, numbers and text, and knows numpy arrays by name only: nothing that a file names is ever imported.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from imbdiff.errors import InputError

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_MARK = object()
_NEW: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
}


class _Dtype:
    """Stand-in for numpy.dtype(code, ...): plain integers only."""

    def __init__(self, code: str, *_: Any) -> None:
        if not (len(code) == 2 and code[0] in "iu" and code[1] in "1248"):
            raise ValueError(f"numpy dtype {code!r}, expected integers")
        self.code, self.order = code, "|"

    def set_state(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stand-in for an array between its creation (empty) and its state (shape, dtype, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0)

    def set_state(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        # The text strings of Python 2 are bytes, which the opcode reader hands over as latin-1.
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        flat = np.frombuffer(raw, np.dtype(dtype.order + dtype.code))
        self.value = flat.reshape(shape, order="F" if fortran else "C")


_KNOWN: dict[str, Callable[..., Any] | None] = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": None,  # an argument of _reconstruct, never called
    "_codecs.encode": lambda text, _: text.encode("latin-1"),  # how Python 3 writes bytes into protocol 2
}


def read_pickled_dict(data: bytes, where: str) -> dict[str, Any]:
    """The dict in a pickle, arrays as numpy arrays; raises InputError for damaged files and for code."""
    try:
        result = _interpret(data, where)
        items = {k.decode() if isinstance(k, bytes) else k: v for k, v in result.items()}
    except InputError:
        raise
    except Exception as error:  # a damaged file can go wrong anywhere in the stack machine
        raise InputError(f"{where}: damaged or no pickled dict ({error}): download the archive again") from error
    return {k: v.value if isinstance(v, _Array) else v for k, v in items.items()}


def _interpret(data: bytes, where: str) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(arg)
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name in ("LIST", "APPENDS", "APPEND"):
            items = [stack.pop()] if name == "APPEND" else _pop_to_mark(stack)
            stack.append([]) if name == "LIST" else None
            stack[-1].extend(items)
        elif name in ("DICT", "SETITEMS", "SETITEM"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _pop_to_mark(stack)
            stack.append({}) if name == "DICT" else None
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            parts = [stack.pop(), stack.pop()][::-1] if name == "STACK_GLOBAL" else arg.split(" ", 1)
            full = ".".join(parts)
            if full not in _KNOWN or name == "INST":
                raise InputError(
                    f"{where}: refused: the archive contains code ({full}), not data; nothing was executed"
                )
            stack.append(_KNOWN[full])
        elif name == "REDUCE":
            arguments, make = stack.pop(), stack.pop()
            if not any(make is known for known in _KNOWN.values()):
                raise ValueError("a call of what is not a name")
            stack.append(make(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].set_state(state)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise InputError(f"{where}: refused: pickle opcode {name} has no place in data; nothing was executed")
    raise ValueError("no end")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]
