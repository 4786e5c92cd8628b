"""The exhaustive optimum: Dijkstra over everything that a chain's training step could do. No code of the solver's.

A state is (which values are in memory, which tapes are in memory, how many ops are still to be back-propagated, whether
forward has reached the end). Moves: run an op forward, with a tape or without; undo one by its inverse alone; go
backward by a tape; go backward by the fused inverse; drop a value or a tape. States alone take memory: no transients.
"""

import heapq
import math
from functools import cache


def optimum(ops, budget):
    """The least time of a step within a budget; infinite if there is none.

    ``ops`` are dicts: u, b, c (inf without inverse), v, a (bytes of the output), t (bytes of the tape), n (whether the
    tape holds the input too). The caller holds the input, and the output once forward has reached it.
    """
    count = len(ops)
    size = [0] + [op["a"] for op in ops]

    @cache
    def used(live, tapes):
        held = live
        total = 0
        for p in range(1, count + 1):
            if tapes >> p & 1:
                total += ops[p - 1]["t"]
                held |= ops[p - 1]["n"] << (p - 1)
        return total + sum(size[i] for i in range(1, count + 1) if held >> i & 1)

    start = (1, 0, count, False)
    best = {start: 0.0}
    queue = [(0.0, start)]
    while queue:
        time, state = heapq.heappop(queue)
        if time > best[state]:
            continue
        if state[2] == 0:
            return time
        for cost, after in moves(ops, *state):
            if time + cost < best.get(after, math.inf) and used(after[0], after[1]) <= budget:
                best[after] = time + cost
                heapq.heappush(queue, (time + cost, after))
    return math.inf


def moves(ops, live, tapes, left, turned):
    """Each move's cost and the state after it."""
    count = len(ops)
    kept = 1 | (turned << count)  # the caller's
    for p in range(1, left + 1):
        op, x, y = ops[p - 1], live >> (p - 1) & 1, live >> p & 1
        if x and not y:
            end = turned or p == count
            yield op["u"], (live | 1 << p, tapes, left, end)
        if x and not tapes >> p & 1:
            end = turned or p == count
            yield op["u"], (live | 1 << p, tapes | 1 << p, left, end)
        if y and not x and op["c"] < math.inf:
            yield op["v"], (live | 1 << (p - 1), tapes, left, turned)
        if tapes >> p & 1:
            yield 0.0, (live, tapes & ~(1 << p), left, turned)
    for i in range(1, count + 1):
        if live >> i & 1 and not kept >> i & 1:
            yield 0.0, (live & ~(1 << i), tapes, left, turned)
    if turned:
        op = ops[left - 1]
        if tapes >> left & 1:
            yield op["b"], (live, tapes & ~(1 << left), left - 1, True)
        if live >> left & 1 and op["c"] < math.inf:
            yield op["c"], (live | 1 << (left - 1), tapes, left - 1, True)
