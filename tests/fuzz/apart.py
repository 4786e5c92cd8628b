"""Programs in a process of their own: one that kills it is wrong, and the next ones run all the same."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .programs import Fn, Program, Stage, Step, generate
from .run import Verdict, least, run

FIRST = Program((Stage("couple", Fn("mlp", 0)),), (Step(), Step("func_jvp")))
"""What it imports, it imports for all processes."""

CONTEXT = multiprocessing.get_context("fork")


def _work(items: Sequence[Any], fn: Callable[[Any], Any], pipe: Any) -> None:
    for item in items:
        pipe.send(fn(item))
    pipe.close()


def each(items: Sequence[Any], fn: Callable[[Any], Any], died: Callable[[Any, Any], Any]) -> Iterator[Any]:
    """``fn`` of each, in order; of one that killed the process, ``died`` of it and the exit code."""
    run(FIRST)
    done = 0
    while done < len(items):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_work, args=(items[done:], fn, sender), daemon=True)
        process.start()
        sender.close()
        try:
            while done < len(items):
                yield receiver.recv()
                done += 1
        except EOFError:
            process.join()
            yield died(items[done], process.exitcode)
            done += 1
        process.join()


def _dead(item: Any, code: Any) -> Verdict:
    return Verdict("wrong", f"the process died with {code}")


def _of_seed(seed: int) -> Verdict:
    return run(generate(seed))


def _least_of_seed(seed: int) -> Program:
    return least(generate(seed))


def verdicts(seeds: Sequence[int]) -> Iterator[Verdict]:
    """What came of the programs of these seeds."""
    return each(seeds, _of_seed, _dead)


def verdict_on(program: Program) -> Verdict:
    """The verdict on one program, in a process of its own."""
    return next(each([program], run, _dead))


def least_programs(seeds: Sequence[int]) -> Iterator[Program]:
    """The least wrong programs of seeds whose programs are wrong."""
    return each(seeds, _least_of_seed, lambda seed, code: least(generate(seed), verdict_on))
