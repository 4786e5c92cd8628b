"""What the drift meter costs, and how well it estimates: ``python benchmarks/drift.py``.

A step with the meter and one without take turns, on one thread, whose own time is taken: a busy machine counts less.
What counts is the median, and the median difference of neighbours.
"""

import statistics
import time

import torch
from torch import nn

import invfunc as inv
from invfunc.core.compare import relative_error
from invfunc.engine import meter as drift

REPEATS = 40


def branch(width):
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def chain(width, depth):
    blocks = [inv.couple(branch(width // 2), branch(width // 2)) for _ in range(depth)]
    return inv.chain(inv.split(2), *blocks, inv.concat(2))


def seconds(op, x):
    begin = time.thread_time()
    op(x).sum().backward()
    return time.thread_time() - begin


def cost(width, depth, batch, cuts=0):
    """The median time with the meter over that without, and the microseconds for each trunk."""
    op, x = chain(width, depth), torch.randn(batch, width)
    with_meter, without = (inv.checkpoint(op, drift=d, segments=cuts + 1) for d in ("warn", "off"))
    times = []
    for i in range(REPEATS + 5):
        order = (with_meter, without) if i % 2 else (without, with_meter)
        found = {f: seconds(f, x) for f in order}
        times.append((found[with_meter], found[without]))
    a, b = zip(*times[5:], strict=True)
    extra = statistics.median(x - y for x, y in zip(a, b, strict=True)) / (cuts + 1)
    return statistics.median(a) / statistics.median(b), 1e6 * extra


def estimate(width, depth, batch):
    """The estimated drift over the true one."""
    op, x, found = chain(width, depth), torch.randn(batch, width), []
    judged = drift.relative_error_of_numbers
    drift.relative_error_of_numbers = lambda *numbers: found.append(judged(*numbers)) or 0.0
    inv.checkpoint(op)(x).sum().backward()
    drift.relative_error_of_numbers = judged
    with torch.no_grad():
        return found[0] / relative_error(op.inverse(op(x)), x)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("width  depth  batch     cuts  with / without  microseconds a trunk  estimated / true drift")
    for width, depth, batch, cuts in [
        (64, 8, 64, 0),
        (512, 4, 64, 0),
        (512, 16, 64, 7),
    ]:
        ratio, extra = cost(width, depth, batch, cuts)
        print(
            f"{width:5}  {depth:5}  {batch:5}  {cuts:7}  {ratio:14.3f}  {extra:20.0f}  {estimate(width, depth, batch):22.2f}"
        )


if __name__ == "__main__":
    main()
