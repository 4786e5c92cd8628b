"""Plans against what they promise: ``python benchmarks/planning.py [solve] [profile] [plans] [errors]``.

Times are the least of several runs that take turns, on one thread; on a busy machine they wander by some percent.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the chains are those of the tests
from planning_chains import LIMITS, ROUNDING, SHARES, demo, homogeneous, mixed, new_errors, peak_of, weights_of

import invfunc as inv
from invfunc.planning.schedule import predict, store_all
from invfunc.planning.search import least
from invfunc.planning.value import Plan, fixed_schedules, gradients, mean_square

REPEATS = 7


def chains():
    """The chains that are planned, with an input."""
    torch.manual_seed(0)
    yield "mixed, 24 ops", mixed(64), torch.randn(8192, 64)
    yield "demo, 24 couplings", demo(24), torch.randn(512, 1, 8, 8)


def clock(runs):
    """The least seconds of each, taking turns."""
    best = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for i, run in enumerate(runs):
            begin = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - begin)
    return best


def stepping(op, x, weights):
    return lambda: gradients(op, x, mean_square, weights)


def solve():
    print("\nsolve: seconds for one budget; for the curve")
    for count in (24, 50, 100):
        costs = homogeneous(count, lossy=8, tape=8000)
        budget = predict(costs, store_all(count)).peak_bytes // 4
        plan = inv.plan(costs, budget=budget)
        one, curve = clock(
            [lambda: inv.plan(costs, budget=budget), lambda: vars(plan).pop("curve", None) or plan.curve]
        )
        print(f"  {count:3} ops  {one:.2f}  {curve:.2f}")


def profile():
    print("\nprofile: in plain steps, and of it the seconds for bytes, which do not depend on the batch")
    for name, f, x in chains():
        weights = weights_of(f, x)
        (plain,) = clock([stepping(f, x, weights)])
        inv.profile(f, x)
        begin = time.process_time()
        inv.profile(f, x)
        taken = time.process_time() - begin
        begin = time.process_time()
        inv.profile(f, x, repeats=0)
        print(f"  {name:20} {taken / plain:.1f} steps of {plain:.2f} s; bytes {time.process_time() - begin:.1f} s")


def plans():
    print("\nplans: of plain training; predicted over measured time; measured over predicted peak; peak over budget")
    for name, f, x in chains():
        x.requires_grad_()
        costs, weights = inv.profile(f, x), weights_of(f, x)
        top, bound = (predict(costs, s).peak_bytes for s in (store_all(len(costs.ops)), least(costs)))
        shares = [share for share in (0.75, 0.5, 0.35, 0.25, 0.15) if share * top >= bound]
        budgets = {f"{share:.0%}": int(share * top) for share in shares} | {"least": bound}
        made = {at: inv.plan(costs, budget=budget) for at, budget in budgets.items()}
        fixed = {at: Plan(schedule, costs) for at, schedule in fixed_schedules(costs).items()}
        every = made | fixed
        plain, *times = clock(
            [stepping(op, x, weights) for op in (f, *(inv.checkpoint(f, plan=p) for p in every.values()))]
        )
        print(f" {name}: plain {plain:.3f} s, {top / 2**20:.1f} MiB; predicted {costs.seconds / plain - 1:+.0%}")
        for (at, plan), seconds in zip(every.items(), times, strict=True):
            peak = peak_of(inv.checkpoint(f, plan=plan), x, weights)
            binds = f"{peak / budgets[at]:.3f}" if at in budgets else ""
            print(
                f"  {at:18} time {seconds / plain:.2f}x, predicted {plan.time:.2f}x ({plan.time * plain / seconds - 1:+4.0%})"
                f"  peak {peak / top:.2f}x ({peak / plan.peak_bytes:.3f})  {binds}"
            )
        beaten(made, fixed)


def beaten(made, fixed):
    """Whether a fixed strategy is better in both."""
    for at, plan in made.items():
        for name, other in fixed.items():
            if other.time < plan.time / 1.03 and other.peak_bytes < plan.peak_bytes / 1.03:
                print(f"  {at}: {name} is better in both")


def errors():
    """The suite: every chain, limit and share of memory; a batch that the plan has not seen."""
    print("\nerrors: the gradient error on a new batch, over the limit")
    print("  memory over the least, limit:", *(f"{share:g}x {limit:g}" for share in SHARES for limit in LIMITS))
    kept = tried = 0
    for name, make in ROUNDING.items():
        found = [error / limit for limit, error in new_errors(make)]
        kept, tried = kept + sum(ratio <= 10 for ratio in found), tried + len(found)
        print(f"  {name:36}", *(f"{ratio:7.2g}" for ratio in found), flush=True)
    print(f"  at most 10: {kept} of {tried}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for section in sys.argv[1:] or ("solve", "profile", "plans", "errors"):
        {"solve": solve, "profile": profile, "plans": plans, "errors": errors}[section]()
