"""Run a program in both worlds, step by step, and compare what comes."""

from __future__ import annotations

import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, func, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import invfunc as inv
from invfunc.errors import InvertibleError

from .functions import seed_all
from .mutations import apply, zero_grad
from .programs import SINGLE, Mutation, Program, Stage, Step
from .stages import SIZE, World

TOLERANCE = 1e-9

# ---- what a step records ---------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What came of a step, by name."""

    found: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Tensors are copied, since later steps write into them; containers of tensors are taken apart."""
        if isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                self.add(f"{name}[{i}]", part)
        elif isinstance(value, dict):
            for key, part in value.items():
                self.add(f"{name}.{key}", part)
        else:
            self.found[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def state(self, when: str) -> None:
        """The state of the generator."""
        self.found[f"random numbers after {when}"] = torch.get_rng_state()

    def gradients(self, world: World) -> None:
        """Those that tensors hold."""
        for name, tensor in world.tensors():
            self.add(f"grad of {name}", tensor.grad if tensor.is_leaf else None)


def difference(found: Record, expected: Record) -> str:
    """The first thing that differs; nothing if all is the same."""
    names = [*expected.found, *(name for name in found.found if name not in expected.found)]
    for name in names:
        if name not in found.found or name not in expected.found:
            return f"{name} is only {'lowered' if name in found.found else 'plain'}"
        reason = differs(found.found[name], expected.found[name])
        if reason:
            return f"{name}: {reason}"
    return ""


def differs(found: Any, expected: Any) -> str:
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return (
            "" if found is expected or (not isinstance(found, Tensor) and found == expected) else kinds(found, expected)
        )
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{tuple(found.shape)} {found.dtype}, plain {tuple(expected.shape)} {expected.dtype}"
    if not found.is_floating_point():
        return "" if torch.equal(found, expected) else "differs"
    if torch.equal(found, expected):
        return ""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    close = torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
    return "" if close else f"off by {(found - expected).abs().max().item():.1e}"


def kinds(found: Any, expected: Any) -> str:
    shown = ["a tensor" if isinstance(value, Tensor) else repr(value) for value in (found, expected)]
    return f"{shown[0]}, plain {shown[1]}"


# ---- the parts of a step ---------------------------------------------------------------------------------------------


class Boom(Exception):
    """Raised on purpose."""


def data(step: Step) -> Tensor:
    """The input, in its layout."""
    n, size = step.batch, 2 * SIZE
    if step.layout == "transposed":
        return torch.randn(size, n).t()
    if step.layout == "sliced":
        return torch.randn(2 * n, 2 * size)[::2, ::2]
    if step.layout == "expanded":
        return torch.randn(1, size).expand(n, size)
    return torch.randn(n, size)


@dataclass
class Entry:
    """An input: what is given, and the leaf that its gradient comes to."""

    x: Tensor
    leaf: Tensor | None


def entry(step: Step) -> Entry:
    x = data(step)
    if step.entry == "data":
        return Entry(x, None)
    leaf = x.requires_grad_()
    return Entry(leaf.sin(), leaf) if step.entry == "inner" else Entry(leaf, leaf)


def same(t: Tensor) -> Tensor:
    return t


def copied(t: Tensor) -> Tensor:
    return t.clone()


def saved_on_cpu() -> AbstractContextManager[Any]:
    """`save_on_cpu` as it is on a device: on the CPU it keeps the tensor itself, and nobody sees that it is written."""
    return saved_tensors_hooks(lambda t: (t.device, copied(t.cpu())), lambda packed: packed[1].to(packed[0]))


AROUND: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: nullcontext,
    "save_on_cpu": saved_on_cpu,
    "hooks": lambda: saved_tensors_hooks(copied, same),
    "torch_checkpoint": nullcontext,
    "mode_recompute": lambda: inv.mode("recompute"),
    "mode_invert": lambda: inv.mode("invert"),
    "mode_store": lambda: inv.mode("store"),
}


def call(world: World, step: Step, x: Tensor) -> Tensor:
    """Forward, with what is around it."""
    with AROUND[step.around]():
        if step.around == "torch_checkpoint":
            return torch_checkpoint(world, x, use_reentrant=False)
        return world(x)


def weighed(y: Tensor) -> Tensor:
    return y.sin().sum()


def auxiliary(world: World) -> list[Tensor]:
    """The losses that modules hold, which are taken from them."""
    owners = [m for m in world.trunk.modules() if isinstance(getattr(m, "aux", None), Tensor)]
    return [vars(m).pop("aux") for m in owners if "aux" in vars(m)]


def total(world: World, y: Tensor) -> Tensor:
    return weighed(y) + sum(auxiliary(world), torch.zeros(()))


def change(world: World, mutations: tuple[Mutation, ...], **values: Tensor) -> None:
    for mutation in mutations:
        apply(world, mutation, values)


def forward(world: World, step: Step, record: Record, name: str = "") -> tuple[Entry, Tensor, Tensor]:
    """``(input, output, loss)``, recorded."""
    given = entry(step)
    y = call(world, step, given.x)
    record.add(f"output{name}", y)
    record.add(f"output{name} requires grad", y.requires_grad)
    record.state(f"forward{name}")
    return given, y, total(world, y)


def finish(world: World, record: Record, *given: Entry) -> None:
    """What there is after backward."""
    for i, one in enumerate(given):
        record.add(f"grad of input {i}", None if one.leaf is None else one.leaf.grad)
    record.gradients(world)


def backward(world: World, step: Step, record: Record) -> None:
    given, y, loss = forward(world, step, record)
    change(world, step.midway, x=given.x, y=y)
    if loss.requires_grad:
        loss.backward()
    finish(world, record, given)


def output_in_place(world: World, step: Step, record: Record) -> None:
    """The output is written into before it is used."""
    given = entry(step)
    y = call(world, step, given.x)
    change(world, step.midway, x=given.x)
    y.mul_(2)
    total(world, y).backward()
    finish(world, record, given)


def retained(world: World, step: Step, record: Record) -> None:
    """Twice through one graph."""
    given, y, loss = forward(world, step, record)
    change(world, step.midway, x=given.x, y=y)
    loss.backward(retain_graph=True)
    finish(world, record, given)
    weighed(2 * y).backward()
    record.add("grad of input, again", None if given.leaf is None else given.leaf.grad)
    for i, leaf in enumerate(world.leaves()):
        record.add(f"grad of leaf {i}, again", leaf.grad)


def asked(world: World, given: Entry) -> list[Tensor]:
    return [*([] if given.leaf is None else [given.leaf]), *world.leaves()]


def gradients(world: World, step: Step, record: Record) -> None:
    """By `torch.autograd.grad`."""
    given, y, loss = forward(world, step, record)
    inputs = asked(world, given)
    change(world, step.midway, x=given.x, y=y)
    record.add("grads", torch.autograd.grad(loss, inputs, allow_unused=True))


def subset(world: World, step: Step, record: Record) -> None:
    """Of some of the inputs alone."""
    given, y, loss = forward(world, step, record)
    inputs = asked(world, given)
    some = [t for i, t in enumerate(inputs) if (step.seed >> i % 8) & 1] or inputs[-1:]
    change(world, step.midway, x=given.x, y=y)
    record.add("grads", torch.autograd.grad(loss, some, allow_unused=True))


def create_graph(world: World, step: Step, record: Record) -> None:
    """The gradient of a gradient."""
    given, y, loss = forward(world, step, record)
    inputs = asked(world, given)
    change(world, step.midway, x=given.x, y=y)
    grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    record.add("grads", grads)
    again = [g.square().sum() for g in grads if g is not None and g.requires_grad]
    if again:
        sum(again, torch.zeros(())).backward()
    finish(world, record, given)


def two(reverse: bool) -> Callable[[World, Step, Record], None]:
    """Two forwards, then both backwards; the first mutation comes between the forwards."""

    def run(world: World, step: Step, record: Record) -> None:
        first = forward(world, step, record, " 1")
        change(world, step.midway[:1], x=first[0].x, y=first[1])
        second = forward(world, step, record, " 2")
        change(world, step.midway[1:], x=second[0].x, y=second[1])
        for _, _, loss in (second, first) if reverse else (first, second):
            loss.backward()
        finish(world, record, first[0], second[0])

    return run


def in_thread(world: World, step: Step, record: Record) -> None:
    """Backward in another thread."""
    given, y, loss = forward(world, step, record)
    change(world, step.midway, x=given.x, y=y)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            loss.backward()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    finish(world, record, given)


def without_grad(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[World, Step, Record], None]:
    """The value alone."""

    def run(world: World, step: Step, record: Record) -> None:
        with context():
            y = call(world, step, data(step))
            record.add("output", y.clone())

    return run


def boom(*args: Any) -> None:
    raise Boom


def raise_forward(world: World, step: Step, record: Record) -> None:
    """A forward that fails half way, then a good step."""
    owners = [m for m in world.trunk.functions.modules() if m is not world.trunk.functions]
    if owners:
        handle = owners[step.seed % len(owners)].register_forward_pre_hook(boom)
        try:
            call(world, step, entry(step).x)
        except Boom:
            record.add("raised", True)
        finally:
            handle.remove()
        auxiliary(world)
        record.state("the error")
    backward(world, step, record)


def raise_backward(world: World, step: Step, record: Record) -> None:
    """A backward that fails half way, then a good step."""
    _, _, loss = forward(world, step, record, " that fails")
    leaves = world.leaves()
    if leaves and loss.requires_grad:
        handle = leaves[step.seed % len(leaves)].register_hook(boom)
        try:
            loss.backward()
        except Boom:
            record.add("raised", True)
        finally:
            handle.remove()
        zero_grad(world, 0)
        record.state("the error")
    backward(world, step, record)


@contextmanager
def no_gc() -> Iterator[None]:
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def leak(world: World, step: Step, record: Record) -> None:
    """What is alive after the graph is dropped, without the garbage collector's help."""
    alive: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            alive.append(weakref.ref(out))

    handles = [m.register_forward_hook(watch) for m in world.trunk.functions]
    with no_gc():
        _run_and_drop(world, step, record, alive)
        for handle in handles:
            handle.remove()
        auxiliary(world)  # what a function that ran again has left
        record.add("alive", any(ref() is not None for ref in alive))


def _run_and_drop(world: World, step: Step, record: Record, alive: list[Any]) -> None:
    given, y, loss = forward(world, step, record)
    alive += [weakref.ref(y), weakref.ref(loss)]
    change(world, step.midway, x=given.x, y=y)
    if step.seed % 3:
        loss.backward()
        finish(world, record, given)


# ---- under torch.func and functional_call ----------------------------------------------------------------------------


def called_with(world: World, names: list[str], values: Any, x: Tensor) -> Tensor:
    """The world, with other tensors in the places of its modules' parameters."""
    if not names:
        return world(x)
    places = dict(world.trunk.named_parameters())
    by_place = {id(places[name]): value for name, value in zip(names, values, strict=True)}
    owner: nn.Module = world.face if owns_all(world.face, by_place) else Holder(world)
    own = {name: by_place[id(p)] for name, p in owner.named_parameters() if id(p) in by_place}
    args = (x, torch.arange(len(x)) % 3) if world.side and owner is world.face else (x,)
    y = func.functional_call(owner, own, args)
    return y[0] if isinstance(y, tuple) else y


def owns_all(face: Any, parameters: dict[int, Any]) -> bool:
    """Whether a face is a module with these parameters, each module once: torch does not put back what is there twice."""
    if not isinstance(face, nn.Module):
        return False
    modules = list(face.named_modules(remove_duplicate=False))
    return parameters.keys() <= {id(p) for p in face.parameters()} and len(modules) == len(set(face.modules()))


class Holder(nn.Module):
    """A function and the modules that it uses."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.trunk, self.world = world.trunk, [world]

    def forward(self, x: Tensor) -> Tensor:
        return self.world[0](x)


def trained(world: World) -> tuple[list[str], tuple[Tensor, ...]]:
    """The parameters that modules own, by name."""
    found = [(name, p) for name, p in world.trunk.named_parameters() if not nn.parameter.is_lazy(p)]
    return [name for name, _ in found], tuple(p.detach() for _, p in found)


def functional(world: World, step: Step, record: Record) -> None:
    """With tensors that are functions of others in the places of the parameters."""
    names, values = trained(world)
    leaves = [v.clone().requires_grad_() for v in values]
    given = entry(step)
    y = called_with(world, names, [0.9 * leaf for leaf in leaves], given.x)
    record.add("output", y)
    loss = total(world, y)
    change(world, step.midway, x=given.x, y=y)
    loss.backward()
    record.add("grads", [leaf.grad for leaf in leaves])
    finish(world, record, given)


def func_grad_parameters(world: World, step: Step, record: Record) -> None:
    names, values = trained(world)
    grads = func.grad(lambda values, x: weighed(called_with(world, names, values, x)), (0, 1))(values, data(step))
    record.add("func.grad", grads)


def under_func(transform: Callable[[Any, Tensor], Any]) -> Callable[[World, Step, Record], None]:
    """A transform of the function of the input."""

    def run(world: World, step: Step, record: Record) -> None:
        record.add("transform", transform(world, data(step)))

    return run


def scalar(world: World) -> Callable[[Tensor], Tensor]:
    return lambda x: weighed(world(x))


def batched(fn: Callable[[Tensor], Any], x: Tensor) -> Any:
    return func.vmap(fn, randomness="different")(torch.stack([x, x.cos()]))


STEPS: dict[str, Callable[[World, Step, Record], None]] = {
    "backward": backward,
    "grad": gradients,
    "subset": subset,
    "retained": retained,
    "output_in_place": output_in_place,
    "two": two(reverse=False),
    "two_reversed": two(reverse=True),
    "create_graph": create_graph,
    "thread": in_thread,
    "functional_call": functional,
    "raise_forward": raise_forward,
    "raise_backward": raise_backward,
    "leak": leak,
    "no_grad": without_grad(torch.no_grad),
    "inference": without_grad(torch.inference_mode),
    "func_grad": under_func(lambda f, x: func.grad(scalar(f))(x)),
    "func_grad_parameters": func_grad_parameters,
    "func_vmap": under_func(batched),
    "func_vmap_grad": under_func(lambda f, x: batched(func.grad(scalar(f)), x)),
    "func_jvp": under_func(lambda f, x: func.jvp(f, (x,), (x.cos(),))),
    "func_jacrev": under_func(lambda f, x: func.jacrev(f)(x[:2])),
    "func_hessian": under_func(lambda f, x: func.hessian(scalar(f))(x[:2])),
}


# ---- a program -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    Args:
        kind: ``agrees``, ``refused``, ``lenient`` (plain raises, lowered does not) or ``wrong``.
        reason: What differs, or which error.
        step: At which step.
        raised: Whether it agrees since both raise, which ends a program.
    """

    kind: str
    reason: str = ""
    step: int = 0
    raised: bool = False


def attempt(run: Callable[[Record], None], seed: int) -> tuple[Record, Exception | None]:
    """What a world did, up to an error."""
    seed_all(seed)
    record = Record()
    try:
        run(record)
    except Exception as error:
        return record, error.with_traceback(None)
    return record, None


def perform(world: World, step: Step, record: Record) -> None:
    """A step with what comes before it."""
    change(world, step.before)
    auxiliary(world)
    zero_grad(world, 0)
    seed_all(step.seed)
    STEPS[step.kind](world, step, record)
    auxiliary(world)
    record.state("backward")
    record.add("buffer", dict(world.buffers()))


def is_refusal(error: Exception) -> bool:
    """An error of the package or of torch, not one that comes of a fault in the code."""
    if isinstance(error, (RecursionError, AssertionError)):
        return False
    if "non-leaf Tensor to parameter" in str(error):  # of a module that is made anew
        return True
    return isinstance(error, (InvertibleError, RuntimeError, NotImplementedError))


def named(error: Exception) -> str:
    """Its type and the first words of its message, without the path, names and shapes."""
    message = getattr(error, "subject", str(error)).strip().split("\n")[0]
    message = re.sub(r"\[.*?\]|\([\d, ]*\)", "...", message)
    return f"{type(error).__name__}: {' '.join(message.split()[:12])}"


def judged(lowered: tuple[Record, Exception | None], plain: tuple[Record, Exception | None], step: int) -> Verdict:
    (found, error), (expected, plain_error) = lowered, plain
    if plain_error is not None:
        return Verdict("agrees" if error is not None else "lenient", named(plain_error), step, raised=True)
    if error is not None:
        return Verdict("refused" if is_refusal(error) else "wrong", named(error), step)
    reason = difference(found, expected)
    return Verdict("wrong", reason, step) if reason else Verdict("agrees")


@contextmanager
def settled() -> Iterator[None]:
    """One thread's random numbers, double precision, no warnings; all as before afterwards."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def run(program: Program) -> Verdict:
    """Both worlds of a program, in step, until they end, differ or raise."""
    with settled():
        worlds: list[World] = []

        def build(lowered: bool) -> Callable[[Record], None]:
            return lambda record: worlds.append(World(program, lowered))

        plain, lowered = attempt(build(False), 0), attempt(build(True), 0)
        verdict = judged(lowered, plain, -1)
        for i, step in enumerate(program.steps):
            if verdict.kind != "agrees" or verdict.raised:
                return verdict
            plain, lowered = (attempt(lambda r, w=w: perform(w, step, r), step.seed) for w in worlds)
            verdict = judged(lowered, plain, i)
            if verdict.kind == "lenient" or (verdict.kind == "wrong" and step.around == "torch_checkpoint"):
                verdict = unharmed(program, i, lowered[0]) or Verdict("lenient", verdict.reason, i, raised=True)
        return verdict


WRITES = {"input_in_place", "add_in_place", "buffer_in_place"}


def unharmed(program: Program, i: int, found: Record) -> Verdict | None:
    """Lowered may take a write that plain refuses, if its gradients are those without the write.

    Below torch's checkpoint plain does not see a write, and goes on with it: there it tells no value.
    """
    step = program.steps[i]
    if step.kind.startswith("two"):  # the second forward sees the write
        return None
    around = None if step.around == "torch_checkpoint" else step.around
    calm = replace(step, midway=tuple(m for m in step.midway if m.kind not in WRITES), around=around)
    if calm == step:
        return None
    world = World(program, lowered=False)
    for before in program.steps[:i]:
        attempt(lambda r, before=before: perform(world, before, r), before.seed)
    expected, error = attempt(lambda r: perform(world, calm, r), step.seed)
    kept = [Record({k: v for k, v in r.found.items() if k.startswith(("grad", "output"))}) for r in (found, expected)]
    reason = "" if error else difference(*kept)
    return Verdict("wrong", f"{reason}, and plain raises", i) if reason else None


# ---- the least program -----------------------------------------------------------------------------------------------


def smaller(program: Program) -> Iterator[Program]:
    """Programs with a little less, the largest cuts first."""
    for name in "steps", "stages":
        for fewer in _without_one(getattr(program, name)):
            yield replace(program, **{name: fewer})
    for i, step in enumerate(program.steps):
        for change in _smaller_steps(step):
            yield replace(program, steps=(*program.steps[:i], change, *program.steps[i + 1 :]))
    for i, stage in enumerate(program.stages):
        for change in _smaller_stages(stage):
            yield replace(program, stages=(*program.stages[:i], change, *program.stages[i + 1 :]))
    for options in ({"segments": 1}, {"side": False}, {"interleaved": False}):
        yield replace(program, **options)
    if program.face not in ("value", "function", "module"):
        yield replace(program, face="value")


def _without_one(items: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if len(items) > 1:
        yield from (items[:i] + items[i + 1 :] for i in range(len(items)))


def _smaller_stages(stage: Stage) -> Iterator[Stage]:
    for i, part in enumerate(stage.inner):
        if stage.kind in ("group", "inverted"):
            yield part
        if stage.kind in ("group", "inverted", "line", "halves"):
            yield replace(stage, inner=(*stage.inner[:i], *stage.inner[i + 1 :]))
        for less in _smaller_stages(part):
            yield replace(stage, inner=(*stage.inner[:i], less, *stage.inner[i + 1 :]))
    yield replace(stage, g=None)
    yield replace(stage, mark=None)
    yield replace(stage, wrap=None)
    yield replace(stage, law="additive")
    yield replace(stage, f=replace(stage.f, kind="tanh"))
    if stage.kind not in ("couple", "swap", "line", *SINGLE):
        yield replace(stage, kind="couple", inner=())
    if stage.g:
        yield replace(stage, g=replace(stage.g, kind="tanh"))


def _smaller_steps(step: Step) -> Iterator[Step]:
    for name in "before", "midway":
        mutations = getattr(step, name)
        yield from (replace(step, **{name: mutations[:i] + mutations[i + 1 :]}) for i in range(len(mutations)))
    for options in (
        {"kind": "backward"},
        {"around": None},
        {"layout": "plain"},
        {"batch": 3},
        {"entry": "leaf"},
    ):
        yield replace(step, **options)


def fits(program: Program) -> Program:
    """With no more segments than stages."""
    return replace(program, segments=min(program.segments, len(program.stages)))


def sort_of(verdict: Verdict) -> tuple[str, str]:
    """What is wrong, without numbers; gradients are of one sort, however they are asked for."""
    word = re.sub(r"\W.*", "", verdict.reason)
    return verdict.kind, "grad" if word == "grads" else word


def least(program: Program, verdict: Callable[[Program], Verdict] = run) -> Program:
    """A program that ends in the same way, of which nothing can be dropped.

    First the later steps are dropped, then one thing at a time.
    """
    first = verdict(program)
    program = replace(program, steps=program.steps[: max(first.step, 0) + 1])
    while True:
        tried = (fits(candidate) for candidate in smaller(program))
        found = next((c for c in tried if c != program and sort_of(verdict(c)) == sort_of(first)), None)
        if found is None:
            return program
        program = found
