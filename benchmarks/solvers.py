"""Neural ODEs: ``python -m benchmarks.solvers``, a training step by each solver beside torchdiffeq's in the same run.

The field is a network on 64 numbers, from time 0 to 1. Errors are of the gradient in float32, relative: against plain
autograd of the same solver in float64, which is what rounding and an approximate backward cost; and against a solution
with four times the steps by Runge-Kutta, which is what the solver costs. Memory and evaluations are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial

import torch
from torch import Tensor, nn

import invfunc as inv
from invfunc import ops
from invfunc.core.compare import relative_error

from .engines import attempt
from .exact import keep_freed_memory
from .measures import beside, ratio
from .table import RESULTS, machine

WIDTH, BATCH, TURNS = 64, 64, 5
CPU = torch.device("cpu")
Solve = Callable[["FieldNet", Tensor, Tensor], Tensor]  # (field, x, times) -> solution


class FieldNet(nn.Module):
    """A field that depends on the time; it counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH + 1, 128), nn.Tanh(), nn.Linear(128, WIDTH))
        self.count = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        return self.layers(torch.cat([x, t.expand(len(x), 1)], 1))


def reversible(make: Callable[..., inv.Invertible], mode: str, field: FieldNet, x: Tensor, times: Tensor) -> Tensor:
    return inv.checkpoint(make(field, times), mode=mode)(x)


def heun(field: FieldNet, times: Tensor) -> inv.Invertible:
    return inv.chain(ops.enter_streams(), ops.reversible_heun(field, times), ops.leave_streams())


def alf(field: FieldNet, times: Tensor) -> inv.Invertible:
    enter = ops.enter_streams(partial(field, times[0]))
    return inv.chain(enter, ops.asynchronous_leapfrog(field, times), ops.leave_streams())


def coupled_rk4(field: FieldNet, times: Tensor) -> inv.Invertible:
    return inv.chain(ops.enter_streams(), ops.reversible_solver(field, times), ops.leave_streams())


def step_size(times: Tensor) -> dict[str, float]:
    """Of a solver that keeps no state on the way."""
    return {"step_size": (times[1] - times[0]).item()}


def odeint(method: str, field: FieldNet, x: Tensor, times: Tensor) -> Tensor:
    import torchdiffeq

    return torchdiffeq.odeint(field, x, times[[0, -1]], method=method, options=step_size(times))[-1]


def odeint_adjoint(method: str, field: FieldNet, x: Tensor, times: Tensor) -> Tensor:
    import torchdiffeq

    return torchdiffeq.odeint_adjoint(field, x, times[[0, -1]], method=method, options=step_size(times))[-1]


SOLVERS: dict[str, tuple[Solve, Solve]] = {  # and the one whose gradient by plain autograd is the exact one
    "torchdiffeq rk4, autograd": (partial(odeint, "rk4"), partial(odeint, "rk4")),
    "torchdiffeq rk4, adjoint": (partial(odeint_adjoint, "rk4"), partial(odeint, "rk4")),
    "torchdiffeq midpoint, adjoint": (partial(odeint_adjoint, "midpoint"), partial(odeint, "midpoint")),
    "reversible_solver rk4": (partial(reversible, coupled_rk4, "invert"), partial(reversible, coupled_rk4, "store")),
    "reversible_heun": (partial(reversible, heun, "invert"), partial(reversible, heun, "store")),
    "asynchronous_leapfrog": (partial(reversible, alf, "invert"), partial(reversible, alf, "store")),
}
PLAIN = "torchdiffeq rk4, autograd"


def step(solve: Solve, field: FieldNet, x: Tensor, times: Tensor) -> None:
    solve(field, x, times).square().mean().backward()


def gradients(solve: Solve, field: FieldNet, x: Tensor, times: Tensor) -> tuple[Tensor, ...]:
    found = solve(field, x, times).square().mean()
    return torch.autograd.grad(found, [x, *field.parameters()])


def problem(steps: int, dtype: torch.dtype = torch.float32) -> tuple[FieldNet, Tensor, Tensor]:
    torch.manual_seed(0)
    field, x = FieldNet(), torch.randn(BATCH, WIDTH)
    return deepcopy(field).to(dtype), x.to(dtype).requires_grad_(), torch.linspace(0, 1, steps + 1, dtype=dtype)


@cache
def fine_gradients(steps: int) -> tuple[Tensor, ...]:
    return gradients(partial(odeint, "rk4"), *problem(4 * steps, torch.float64))


def row(solve: Solve, exact: Solve, steps: int) -> list[float]:
    field, x, times = problem(steps)
    step(solve, field, x, times)  # its gradients are there from now on
    field.count = 0
    step(solve, field, x, times)
    evaluations = field.count
    peak = inv.measure(step, solve, field, x, times).peak_bytes / x.nbytes
    found = gradients(solve, field, x, times)
    exact_gradients = gradients(exact, *problem(steps, torch.float64))
    errors = [relative_error(found, expected) for expected in (exact_gradients, fine_gradients(steps))]
    return [evaluations, peak, *errors]


def rows(steps: int) -> Iterator[str]:
    runs = {name: partial(step, solve, *problem(steps)) for name, (solve, _) in SOLVERS.items()}
    plain = runs.pop(PLAIN)
    times = {
        name: ratio([b for _, b in taken], [a for a, _ in taken])
        for name, taken in beside(plain, runs, TURNS, CPU).items()
    }
    for name, (solve, exact) in SOLVERS.items():
        match attempt(lambda: row(solve, exact, steps)):
            case str(error):
                yield f"| {steps} | {name} | {error} |"
            case evaluations, peak, rounding, total:
                time = times.get(name, 1.0)
                yield f"| {steps} | {name} | {evaluations} | {peak:.1f} | {time:.2f} | {rounding:.1e} | {total:.1e} |"


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    head = ["| steps | solver | evaluations | peak | time | gradient error | against a fine solution |"]
    lines = [*head, "|--:|---|--:|--:|--:|--:|--:|"]
    for line in (line for steps in (8, 32, 128) for line in rows(steps)):
        print(line, flush=True)
        lines.append(line)
    about = (
        f"{machine('cpu')}\n\nA neural ODE of {WIDTH} numbers, batch {BATCH}. Evaluations of the field in a training "
        "step; peak in inputs; time over torchdiffeq's rk4 with plain autograd; the gradient's error in float32 "
        "against plain autograd of the same solver in float64, and against a solution of four times the steps."
    )
    (RESULTS / "solvers.md").write_text("\n".join([about, "", *lines, ""]))


if __name__ == "__main__":
    main()
