"""Python's and NumPy's global generators: their states as bytes, since every call of a stage asks for them.

Both make normal numbers in pairs: the second of a pair waits beside the generator, and belongs to its state.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

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


def python_second() -> float | None:
    """The second normal number of a pair, if it waits."""
    return getattr(_python, "gauss_next", None)


class _State:
    """Python's generator where it can only be asked for its state."""

    @property
    def raw(self) -> bytes:
        return python_state()


# The place of the next number, and the first word, live: one of the two is another after every draw.
_python_mark: Any = (
    (ctypes.c_char * 8).from_address(id(_python) + _HEADER) if python_state is _read_python else _State()
)


def put_python_state(state: bytes, second: float | None) -> None:
    """Set Python's global generator to a state."""
    if state:
        index, *words = struct.unpack(f"=i{_WORDS}I", state)
        _python.setstate((3, (*words, index), second))


# ---- NumPy's ---------------------------------------------------------------------------------------------------------

_Second = tuple[int, float]  # whether the second of a pair waits, and what it is


class _Numpy(NamedTuple):
    """NumPy's global RandomState."""

    current: Any = None
    address: int = 0  # where its generator's state lies
    marks: Sequence[Any] = ()  # what lies there, as far as one of it is another after every draw
    second: Callable[[], _Second] = lambda: (0, 0.0)


_numpy = _Numpy()


def numpy_state() -> bytes:
    """The state of NumPy's global generator; nothing where nobody has imported NumPy, or it has another one."""
    global _numpy
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return b""
    current = numpy.random.mtrand._rand
    if current is not _numpy.current:
        generator = _numpy_generator()
        _numpy = _Numpy(current) if generator is None else _numpy_at(current, generator.ctypes.state_address)
    return ctypes.string_at(_numpy.address, _SIZE) if _numpy.address else b""


def numpy_second() -> _Second:
    """Whether the second normal number of a pair waits, and which it is."""
    return _numpy.second()


def put_numpy_state(state: bytes, second: _Second) -> None:
    """Set NumPy's global generator to a state."""
    if state and _numpy_generator() is not None:
        *words, position = struct.unpack(f"={_WORDS}Ii", state)
        numpy = sys.modules["numpy"]
        key, (waits, number) = numpy.array(words, dtype=numpy.uint32), second
        found = {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": position},
            "has_gauss": waits,
            "gauss": number,
        }
        numpy.random.mtrand._rand.set_state(found)


def _numpy_generator() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    generator = getattr(getattr(numpy.random.mtrand, "_rand", None), "_bit_generator", None)
    return generator if type(generator).__name__ == "MT19937" else None


def _numpy_at(current: Any, address: int) -> _Numpy:
    """Read a RandomState where it lies; its pair too, if that is found in one of our own, or else it is asked for."""
    kind = type(current)
    pair = _find_pair(kind(0)) if kind.__name__ == "RandomState" else -1
    words = [_word_at(address + 4 * i) for i in (_WORDS, 0)]  # the place of the next number, and the first word
    if pair < 0:
        return _Numpy(current, address, [*words, _Pair(current)], lambda: _asked(current))
    waits, number = ctypes.c_int.from_address(id(current) + pair - 8), ctypes.c_double.from_address(id(current) + pair)
    marks = [*words, _word_at(id(current) + pair - 8)]
    return _Numpy(current, address, marks, lambda: (waits.value, number.value))


def _word_at(address: int) -> Any:
    return (ctypes.c_char * 4).from_address(address)


class _Pair:
    """Whether the second of a pair waits, where a RandomState has to be asked for it."""

    def __init__(self, current: Any) -> None:
        self.current = current

    @property
    def raw(self) -> int:
        return _asked(self.current)[0]


def _asked(random: Any) -> _Second:
    state = random.get_state(legacy=False)
    return state["has_gauss"], state["gauss"]


def _find_pair(own: Any) -> int:
    """Where in a RandomState the second of a pair lies, behind whether it waits; below zero if that is unclear."""
    own.standard_normal()
    _, number = _asked(own)
    place = ctypes.string_at(id(own), type(own).__basicsize__).find(struct.pack("=d", number))
    if place < 8:
        return -1
    waits = ctypes.c_int.from_address(id(own) + place - 8)
    before = waits.value
    own.standard_normal()
    return place if (before, waits.value) == (1, 0) else -1


# ---- both ------------------------------------------------------------------------------------------------------------

_raw = attrgetter("raw")


def host_mark() -> list[Any]:
    """What is another one after every draw from either."""
    return [_python_mark.raw, python_second(), *map(_raw, _numpy.marks)]
