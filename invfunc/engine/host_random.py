"""Python's and NumPy's global generators: their states as bytes, since every call of a stage asks for them."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

_WORDS = 624  # of a Mersenne Twister
_SIZE = 4 * (_WORDS + 1)

# ---- Python's --------------------------------------------------------------------------------------------------------

_python: Any = getattr(random, "_inst", None)
_HEADER = object().__sizeof__()


def _read_python() -> bytes:
    return ctypes.string_at(id(_python) + _HEADER, _SIZE)


def _pack_python() -> bytes:
    *words, index = _python.getstate()[1]
    return struct.pack(f"=i{_WORDS}I", index, *words)


def _python_reader() -> Callable[[], bytes]:
    """Read the generator's memory where it lies as expected: thirty times faster than asking for its state."""
    if _python is None:
        return bytes
    known = sys.implementation.name == "cpython" and _python.__sizeof__() >= _HEADER + _SIZE
    return _read_python if known and _read_python() == _pack_python() else _pack_python


python_state = _python_reader()


# The place of the next number and the first word, live: one of the two is another after every draw.
_python_marks = tuple([ctypes.c_uint32.from_address(id(_python) + _HEADER + 4 * i) for i in (0, 1)])


def python_mark() -> Any:
    """Two numbers of the state, of which every draw changes one."""
    if python_state is not _read_python:
        return python_state()
    place, word = _python_marks
    return place.value, word.value


def put_python_state(state: bytes) -> None:
    """Set Python's global generator to a state."""
    if state:
        index, *words = struct.unpack(f"=i{_WORDS}I", state)
        _python.setstate((3, (*words, index), None))


# ---- NumPy's ---------------------------------------------------------------------------------------------------------

_place: list[Any] = [None, 0, None]  # NumPy's global RandomState, where its generator's state lies, and marks in it


def numpy_state() -> bytes:
    """The state of NumPy's global generator; nothing where nobody has imported NumPy, or it has another one."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return b""
    current = numpy.random.mtrand._rand
    if current is not _place[0]:
        generator = _numpy_generator()
        address = 0 if generator is None else generator.ctypes.state_address
        marks = [ctypes.c_uint32.from_address(address + 4 * i) for i in (_WORDS, 0)] if address else None
        _place[:] = current, address, marks
    return ctypes.string_at(_place[1], _SIZE) if _place[1] else b""


def numpy_mark() -> Any:
    """Two numbers of the state, of which every draw changes one."""
    marks = _place[2]
    return marks and (marks[0].value, marks[1].value)


def put_numpy_state(state: bytes) -> None:
    """Set NumPy's global generator to a state."""
    if state and (generator := _numpy_generator()) is not None:
        *words, position = struct.unpack(f"={_WORDS}Ii", state)
        numpy = sys.modules["numpy"]
        key = numpy.array(words, dtype=numpy.uint32)
        generator.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}


def _numpy_generator() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    generator = getattr(getattr(numpy.random.mtrand, "_rand", None), "_bit_generator", None)
    return generator if type(generator).__name__ == "MT19937" else None
