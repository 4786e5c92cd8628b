"""Bit-exact inverses."""

from .transform import exact

__all__ = ["exact"]
