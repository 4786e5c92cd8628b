"""Look at a pipeline: draw it, see what it keeps and why, measure what a call takes, check that it can be trusted."""

from .draw import Drawing, draw
from .memory import Measurement, measure
from .report import Report, calibrate, check
from .saved import print_saved, saved

__all__ = ["Drawing", "Measurement", "Report", "calibrate", "check", "draw", "measure", "print_saved", "saved"]
