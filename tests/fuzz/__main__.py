"""The command line: ``python -m tests.fuzz --count 1000``, or ``--seed 7`` to see and run one program."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from .apart import least_programs, verdict_on, verdicts
from .programs import Program, generate, text
from .run import Verdict, sort_of


def kind_of(program: Program, verdict: Verdict) -> str:
    """What a least program consists of, without its numbers: the same for the same cause, mostly."""
    functions = sorted({fn.kind for fn in program.functions()})
    steps = [
        " ".join([*(m.kind for m in s.before), s.kind, *(f"/{m.kind}" for m in s.midway), s.around or ""]).strip()
        for s in program.steps
    ]
    side = " with a side input" * program.side
    return f"{'+'.join(functions)}{side}: {'; '.join(steps)}: {sort_of(verdict)[1]}"


SAYS = {"refused": "refused", "lenient": "plain alone raises", "agrees": "both raise"}


def show(seed: int, verdict: Verdict, program: Program) -> None:
    print(f"\nseed {seed}: {verdict.kind} at step {verdict.step}: {verdict.reason}")
    print(text(program))


def one(seed: int) -> int:
    """Print and run one program, and its least one."""
    program = generate(seed)
    verdict = verdict_on(program)
    show(seed, verdict, program)
    if verdict.kind == "wrong":
        small = next(least_programs([seed]))
        print("\nthe least program:")
        show(seed, verdict_on(small), small)
    return verdict.kind == "wrong"


def many(seeds: Sequence[int], limit: int) -> int:
    """Run programs and print what came of them."""
    counts: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {kind: Counter() for kind in ("refused", "lenient", "agrees")}
    wrong: list[int] = []
    start = time.perf_counter()
    for seed, verdict in zip(seeds, verdicts(seeds), strict=True):
        counts[verdict.kind] += 1
        counts["both raise"] += verdict.raised
        if verdict.reason and verdict.kind in reasons:
            reasons[verdict.kind][verdict.reason] += 1
        if verdict.kind == "wrong":
            wrong.append(seed)
    seconds = time.perf_counter() - start
    programs = sum(counts[kind] for kind in ("agrees", "refused", "lenient", "wrong"))
    print(f"programs {programs} ({programs / seconds:.0f} a second), wrong {len(wrong)}, refused {counts['refused']}")
    print(f"both raise {counts['both raise']}, plain alone raises {counts['lenient']}")
    for kind, found in reasons.items():
        for reason, count in found.most_common():
            print(f"{SAYS[kind]} {count:5} {reason}")
    _report_wrong(wrong, limit)
    return len(wrong)


def _report_wrong(seeds: Sequence[int], limit: int) -> None:
    """The least programs, the first of each sort as it is found, and then which others are of that sort."""
    alike: dict[str, list[int]] = defaultdict(list)
    for seed, small in zip(seeds, least_programs(seeds[:limit]), strict=False):
        verdict = verdict_on(small)
        sort = kind_of(small, verdict)
        alike[sort].append(seed)
        if len(alike[sort]) == 1:
            show(seed, verdict, small)
    print()
    for sort, found in sorted(alike.items(), key=lambda item: -len(item[1])):
        print(f"wrong {len(found):5} {sort} (seeds {', '.join(map(str, found[:5]))})")
    if seeds[limit:]:
        print(f"wrong as well, not made smaller: {', '.join(map(str, seeds[limit:]))}")


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="print and run this program alone")
    parser.add_argument("--limit", type=int, default=50, help="of how many wrong programs the least is looked for")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    if args.seed is not None:
        return one(args.seed)
    return many(range(args.first, args.first + args.count), args.limit) > 0


if __name__ == "__main__":
    sys.exit(main())
