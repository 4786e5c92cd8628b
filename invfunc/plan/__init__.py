"""Planning: the fastest way to train a chain within a memory budget. Store, recompute or invert, op by op."""

from .costs import Costs, OpCosts
from .profiling import profile
from .schedule import Invert, Recompute, Store
from .simulate import Simulation, simulate
from .value import Plan, plan

__all__ = ["Costs", "Invert", "OpCosts", "Plan", "Recompute", "Simulation", "Store", "plan", "profile", "simulate"]
