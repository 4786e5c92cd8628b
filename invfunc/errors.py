"""Every error the package raises, and the one way its message is built.

A message reads ``path: subject, expected ..., got ...; cure``: where in the pipeline, what is wrong with it, and what
to do about it. The path is added from the inside out, by every combinator that an error passes on its way up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class InvertibleError(RuntimeError):
    """An error of the package, with the path of the op that raised it.

    Args:
        subject: What is wrong, beginning with the thing that is wrong.
        expected: What should have come.
        got: What came instead.
        cure: What the reader can do about it.

    Example:
        >>> raise WireError("g returned (8, 4)", expected="(8, 8) like its partner component", cure="change g")
        Traceback (most recent call last):
        invfunc.errors.WireError: g returned (8, 4), expected (8, 8) like its partner component; change g
    """

    def __init__(self, subject: str, *, expected: str = "", got: str = "", cure: str = "") -> None:
        # BaseException.__new__ has kept the arguments; Dynamo can not trace its __init__, and would hide the message
        self.subject, self.expected, self.got, self.cure = subject, expected, got, cure
        self.path: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Build the message."""
        terms = [f"expected {self.expected}"] * bool(self.expected) + [f"got {self.got}"] * bool(self.got)
        claim = ", ".join([self.subject, *terms])
        return ": ".join([*self.path, "; ".join(filter(None, [claim, self.cure]))])

    def __reduce__(self):
        """Keep the terms and the path when the error crosses a process."""
        return (type(self), (self.subject,), self.__dict__)


class WireError(InvertibleError, ValueError):
    """The value on a wire has the wrong number of components, shape, dtype or type."""


class NotInvertibleError(InvertibleError):
    """The inverse was asked of something that has none."""


class NotDifferentiableError(InvertibleError):
    """A gradient, or a log-determinant, was asked of something that has no rule for it."""


class ReplayError(InvertibleError):
    """A function did not, or could not, do in backward what it did in forward."""

    about: Any = None  # what tells where the error belongs: a tensor that some stage finds, or what is kept beside them


class DomainError(InvertibleError, ValueError):
    """A value lies outside the set on which an op is defined or invertible."""


class DonatedError(InvertibleError):
    """A tensor was donated that can not be freed, or was read while it is empty."""


class DriftError(InvertibleError):
    """What backward rebuilds has drifted from what it was, and ``checkpoint(..., drift="raise")`` was asked for."""


class DriftWarning(UserWarning):
    """What backward rebuilds has drifted, or is about to; see ``checkpoint(..., drift=..., stream=...)``."""


class OptionError(InvertibleError, ValueError):
    """An argument of a constructor or transformer is not one of those it takes."""


class TorchNameError(InvertibleError):
    """A feature needs a private name of torch that the installed version does not have."""


def check_option(subject: str, value: Any, fits: Callable[[Any], Any], expected: str, cure: str = "") -> None:
    """Raise unless an option fits; one that can not even be asked, as None where a number belongs, does not.

    Example:
        >>> check_option("dequantize: levels", None, lambda levels: levels >= 2, "2 or more")
        Traceback (most recent call last):
        invfunc.errors.OptionError: dequantize: levels is None, expected 2 or more
    """
    try:
        is_fit = bool(fits(value))
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # of a tensor of several numbers, the last
        is_fit = False
    if not is_fit:
        raise OptionError(f"{subject} is {value!r}", expected=expected, cure=cure)


def place_error(error: Exception, place: str) -> None:
    """Prefix the path of our own errors; leave a note on the user's."""
    if not place:
        return
    if isinstance(error, InvertibleError):
        error.path = (place, *error.path)
    else:  # as `add_note` does, which Python 3.10 lacks
        error.__notes__ = [*getattr(error, "__notes__", ()), f"in {place}"]  # pyright: ignore[reportAttributeAccessIssue]
