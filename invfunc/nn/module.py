"""Modules with an op: `Module`, the face that every module here wears, and `InvertibleModule`, to write one's own.

A module owns parameters; the mathematics is the op's and the lowering is `invfunc.checkpoint`'s. The op is built from
what the module holds at each call, so that ``.to()``, ``load_state_dict`` and ``functional_call`` are seen by it.
"""

# pyright: reportIncompatibleMethodOverride=false
# A module's forward takes what its op takes; those of `torch.nn` take each their own.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from .. import _torch
from ..checkpoint import Checkpointed, Wrapper, checkpoint, mark
from ..core.context import Context, bind
from ..core.copies import copy_object
from ..core.op import Inverse, Invertible, Residue, pair
from ..engine.devices import accelerators
from ..engine.donation import saved_by_its_maker, why_not_donate
from ..engine.interface import Run, State
from ..engine.lower import call_unit, runs_plainly, store, walk
from ..engine.random_numbers import RandomState
from ..engine.sharding import is_sharded
from ..engine.trunk import is_tail
from ..errors import NotInvertibleError, OptionError, WireError
from ..wires import Wire, describe, is_differentiable, leaves

Donate: TypeAlias = bool | tuple[int, ...] | str
"""What a module frees of its input: as `invfunc.checkpoint`, or ``"safe"``: whatever may be freed."""


M = TypeVar("M", bound="InvertibleModule")


# ---- the op of a module --------------------------------------------------------------------------------------------


class Live(Wrapper):
    """The op of a module, built from what the module holds at each use; the value of `Module.op`."""

    def __init__(self, module: Module, backwards: bool = False) -> None:
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "backwards", backwards)

    module: Module
    backwards: bool

    @property
    def held(self) -> tuple[Any, ...]:
        """What it is made of."""
        return self.module, self.backwards

    @property
    def op(self) -> Invertible:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The op as it is now."""
        return self.module.build_inverse() if self.backwards else self.module.build()

    def forward(self, x: Wire) -> Wire:
        return self.call(x) if self.marked else super().forward(x)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.inverted().forward(y) if residue is None else self.op.inverse_with_residue(residue, y)

    def call(self, x: Wire) -> Wire:
        """Call the module, with its hooks."""
        xs = x if isinstance(x, tuple) else (x,)
        return self.module.inverse(*xs) if self.backwards else self.module(*xs)

    @property
    def marked(self) -> bool:
        """Whether the module lowers itself, by its own flags, when it is called."""
        return is_called(self.module)

    @property
    def functions(self) -> tuple[Any, ...]:
        """What others call: the module itself where it is called, so that they are warned of a sharded one."""
        return (self.module,) if self.marked else self.op.functions

    def inverted(self) -> Invertible:
        return Live(self.module, not self.backwards)

    def mapped(self, change: Callable[[Invertible], Invertible]) -> Invertible:
        return Derived(self, change)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Live) and (self.module, self.backwards) == (other.module, other.backwards)

    def __hash__(self) -> int:
        return hash((id(self.module), self.backwards))

    def __repr__(self) -> str:
        return f"invert({type(self.module).__name__})" if self.backwards else type(self.module).__name__


class Derived(Wrapper):
    """What is made of a module's op, such as its log-determinant: anew at each use."""

    def __init__(self, live: Wrapper, change: Callable[[Invertible], Invertible]) -> None:
        object.__setattr__(self, "live", live)
        object.__setattr__(self, "change", change)

    live: Wrapper
    change: Callable[[Invertible], Invertible]

    @property
    def held(self) -> tuple[Any, ...]:
        """What it is made of."""
        return self.live, self.change

    @property
    def op(self) -> Invertible:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The op as it is now."""
        return self.change(self.live.op)

    def inverted(self) -> Invertible:
        return Derived(self.live.inverted(), self.change)  # pyright: ignore[reportArgumentType]

    def mapped(self, change: Callable[[Invertible], Invertible]) -> Invertible:
        return Derived(self, change)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Derived) and (self.live, self.change) == (other.live, other.change)

    def __hash__(self) -> int:
        return hash(self.live)

    def __repr__(self) -> str:
        return repr(self.op)


@walk.register
def _(op: Derived, state: State, run: Run) -> State:
    return walk(op.op, state, run)


@bind.register
def _(op: Live, context: Context) -> Invertible:
    return bind.default(op, context) if op.marked else bind(op.op, context)


@walk.register
def _(op: Live, state: State, run: Run) -> State:
    if is_sharded(op.module):
        return call_unit(op.call, state, run)
    return store(op, state, run) if op.marked else walk(op.op, state, run)


def is_called(module: nn.Module) -> bool:
    """Whether a call of a module does more than its op: it is sharded, or a tool left hooks or a forward on it."""
    return is_sharded(module) or _torch.has_hooks(module) or "forward" in module.__dict__


class Module(nn.Module):
    """A module that is an invertible op; the base of all modules of this package.

    A subclass defines `build`, which makes the op from the module's parameters.

    Attributes:
        donate: What of the input is freed until backward; see `invfunc.checkpoint`, and ``"safe"`` for whatever may be.

    Example:
        >>> import torch, invfunc as inv
        >>> class Shift(inv.nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.by = torch.nn.Parameter(torch.ones(2))
        ...
        ...     def build(self) -> inv.Invertible:
        ...         return inv.additive(self.by)
        >>> Shift()(torch.zeros(1, 2)).detach()
        tensor([[1., 1.]])
    """

    donate: Donate = False
    _options: Mapping[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy whose functions use copies of what they close over."""
        return copy_object(self, memo)

    def build(self) -> Invertible:
        """The op as the module is now."""
        raise NotImplementedError

    def build_inverse(self) -> Invertible:
        """The inverse of `build`."""
        return self.build().inverted()

    @property
    def op(self) -> Invertible:
        """The module as a value, for combinators: it follows the module, whatever changes in it.

        Example:
            >>> import torch, invfunc as inv
            >>> net = inv.chain(inv.nn.Linear(4, 4).op, inv.split(2))
            >>> net
            chain(Linear, split(2, dim=1))
        """
        return Live(self)

    @property
    def _mode(self) -> str:
        """The mode of `invfunc.checkpoint` that the module is lowered with."""
        return "invert"

    def _donated(self, xs: tuple[Wire, ...], keep: Iterable[Tensor] = ()) -> bool | tuple[int, ...]:
        """Which of these arguments to free, as `invfunc.checkpoint` takes it."""
        if self._mode != "invert" or not self.donate:
            return False
        return safe_to_donate(xs, keep) if self.donate == "safe" else self.donate  # pyright: ignore[reportReturnType]

    def _lowered(self, op: Invertible, donate: bool | tuple[int, ...] = False, mode: str | None = None) -> Checkpointed:
        """An op with the options of this module."""
        return checkpoint(op, mode=mode or self._mode, donate=donate, **self._options)

    def forward(self, *xs: Wire, context: Mapping[str, Any] | None = None) -> Wire:
        """``y = op(x)``, lowered; the functions are told a context, as in a call of the op."""
        return self._lowered(self.build(), self._donated(xs))(*xs, context=context)

    def inverse(self, *ys: Wire, context: Mapping[str, Any] | None = None) -> Wire:
        """``x = op.inverse(y)``, lowered."""
        return self._lowered(self.build(), self._donated(ys)).inverted()(*ys, context=context)


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor)


REBUILT = object()
"""Stands for an argument that the inverse rebuilds, among those that are known."""


def safe_to_donate(xs: tuple[Wire, ...], keep: Iterable[Tensor] = ()) -> tuple[int, ...]:
    """The places of the tensors that may be freed without anybody noticing, but for those in ``keep``.

    A tensor that its maker saved is left alone: the maker may decide by it (a ReLU by its sign), and a rebuilt value
    can fall on the other side. Not so where the maker is another pipeline, which only rebuilds from it.
    """
    if torch.compiler.is_compiling() or runs_plainly():
        return ()
    places = [_storage(leaf) for leaf in leaves(xs)]
    kept = [_storage(leaf) for leaf in keep]
    return tuple(
        i
        for i, (leaf, place) in enumerate(zip(leaves(xs), places, strict=True))
        if place not in kept and places.count(place) == 1 and _is_free(leaf)
    )


def _is_free(leaf: Any) -> bool:
    try:
        return why_not_donate(leaf) is None and (_is_output(leaf) or not saved_by_its_maker(leaf))
    except RuntimeError:  # its graph was freed by a backward, so that nobody can tell what was saved
        return False


def _is_output(leaf: Tensor) -> bool:
    """Whether a tensor is the output of a pipeline."""
    return is_tail(leaf.grad_fn)


def _storage(leaf: Any) -> int:
    """Where a tensor lives: equal for tensors that share memory; wrapped tensors live nowhere."""
    plain = isinstance(leaf, Tensor) and not _torch.is_wrapped(leaf)
    return _torch.storage_of(leaf) if plain else id(leaf)


def apart(outputs: tuple[Wire, ...], inputs: tuple[Wire, ...]) -> tuple[Wire, ...]:
    """Outputs of which none shares memory with an input: those that do are copied, so that the input can be freed."""
    held = {_storage(leaf) for leaf in leaves(inputs)}
    return tuple(y.clone() if is_differentiable(y) and _storage(y) in held else y for y in outputs)


def op_of(module: Any) -> Invertible | nn.Module:
    """A child of a container as a part of its op: with the mode of its flags, and an ordinary module as it is."""
    if not isinstance(module, Module):
        return module
    if is_called(module):
        return Live(module)
    op = module.build()
    return op if module._mode == "invert" else mark(op, module._mode)


# ---- a module of one's own -------------------------------------------------------------------------------------------


class InvertibleModule(Module):
    """A module by its `function` and its `inverse`: subclass it, and define the two (InvTorch's ``Module``).

    Both take positional arguments and return a tensor or a tuple. `forward` runs ``function``; its activations and,
    where that is safe, its inputs are freed until backward rebuilds them by ``inverse``. The flags may change at any
    time.

    Args:
        invertible: Rebuild the inputs by ``inverse``; implies ``checkpoint``.
        checkpoint: Free the activations. Without ``invertible``, the inputs are kept and ``function`` runs again in
            backward. False implies not ``invertible``: the function is called plainly.
        seed: Accepted for InvTorch's sake. Random numbers are the same in backward whatever it is.

    Attributes:
        donate: Free the inputs, too: ``"safe"`` (the default) frees those that nobody else holds and keeps the others,
            False leaves all to the caller. Reading an input that was freed raises `invfunc.errors.DonatedError`.

    Raises:
        NotInvertibleError: When ``inverse`` is missing and a gradient needs it.
        WireError: When ``function`` or ``inverse`` returns something else than a tensor or a tuple.

    Example:
        >>> import torch, invfunc as inv
        >>> class Scale(inv.nn.InvertibleModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.tensor(2.0))
        ...
        ...     def function(self, x):
        ...         return self.scale * x
        ...
        ...     def inverse(self, y):
        ...         return y / self.scale
        >>> module = Scale()
        >>> module.check(torch.ones(3))
        True
        >>> module(torch.ones(3)).sum().backward()
        >>> module.scale.grad
        tensor(3.)
    """

    donate: Donate = "safe"
    seed: bool = False
    _checkpoint: bool = True
    _invertible: bool = True
    _reversed: bool = False

    def __init__(self, invertible: bool = True, checkpoint: bool = True, seed: bool = False) -> None:
        super().__init__()
        self.invertible = invertible
        self.checkpoint = checkpoint
        self.seed = seed

    # ---- what a subclass defines ----

    def function(self, *args: Any) -> Any:
        """``x -> y``."""
        raise self._missing("function")

    def inverse(self, *args: Any) -> Any:
        """``y -> x``."""
        raise self._missing("inverse")

    @property
    def num_outputs(self) -> int | None:
        """How many outputs of `function` are shown (negative: all but so many); the others are for `inverse` alone."""
        return None

    @property
    def num_inputs(self) -> int | None:
        """How many outputs of `inverse` are inputs of `function` (negative: all but so many)."""
        return None

    @property
    def reversible(self) -> bool:
        """Whether the module may be reversed: whether ``inverse`` has ``function`` for an inverse, too."""
        return False

    # ---- flags: InvTorch's, coupled as there ----

    @property
    def checkpoint(self) -> bool:
        """Whether activations are freed; False implies not `invertible`."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, value: bool) -> None:
        self._checkpoint = bool(value)
        self._invertible = self._invertible and self._checkpoint

    @property
    def invertible(self) -> bool:
        """Whether inputs are rebuilt by the inverse; True implies `checkpoint`."""
        return self._checkpoint and self._invertible

    @invertible.setter
    def invertible(self, value: bool) -> None:
        self._invertible = bool(value)
        self._checkpoint = self._checkpoint or self._invertible

    @property
    def reversed(self) -> bool:
        """Whether function and inverse have changed places."""
        return self._reversed

    @reversed.setter
    def reversed(self, value: bool) -> None:
        self.reverse(value)

    def reverse(self: M, mode: bool | None = None) -> M:
        """Exchange function and inverse, or say whether they are.

        Args:
            mode: Whether they are to be exchanged; None exchanges what is.

        Returns:
            The module.

        Raises:
            NotInvertibleError: When the module is not `reversible`.
        """
        wanted = not self.reversed if mode is None else bool(mode)
        if wanted and not self.reversible:
            raise NotInvertibleError(
                f"reverse: {type(self).__name__} is not reversible", cure="let its property `reversible` return True"
            )
        self._reversed = wanted
        return self

    @contextmanager
    def temp_mode(self: M, **flags: bool) -> Iterator[M]:
        """Flags for a while: ``with module.temp_mode(invertible=False): ...``.

        Args:
            flags: Any of ``seed``, ``checkpoint``, ``invertible`` and ``reversed``.

        Raises:
            OptionError: When a flag is unknown, or two contradict each other.
        """
        before = self.get_extra_state()
        if not flags.keys() <= before.keys():
            raise OptionError(f"temp_mode: got {sorted(flags)}", expected=f"some of {sorted(before)}")
        if flags.get("invertible") and not flags.get("checkpoint", True):
            raise OptionError("temp_mode: got checkpoint=False and invertible=True", expected="one or the other")
        try:
            self._set_flags(flags)
            yield self
        finally:
            self._set_flags(before)

    def _set_mode(self, mode: str) -> None:
        self._invertible, self._checkpoint = mode == "invert", mode != "store"

    def _set_flags(self, flags: Mapping[str, bool]) -> None:
        for name in (n for n in ("seed", "checkpoint", "invertible", "reversed") if n in flags):
            setattr(self, name, flags[name])

    # ---- the op ----

    @property
    def call_function(self) -> Any:
        """`function`, or `inverse` of a reversed module."""
        return self.inverse if self.reversed else self.function

    @property
    def call_inverse(self) -> Any:
        """`inverse`, or `function` of a reversed module."""
        return self.function if self.reversed else self.inverse

    @property
    def _mode(self) -> str:
        return "invert" if self.invertible else "recompute" if self.checkpoint else "store"

    def build(self) -> Invertible:
        return self._pair()

    def build_inverse(self) -> Invertible:
        return Inverse(pair(partial(self._do, False), partial(self._undo, None), name=type(self).__name__))

    def _pair(self, copies: bool = False, given: tuple[Any, ...] | None = None) -> Invertible:
        """The two functions as an op; what only the inverse needs is its residue."""
        name = type(self).__name__
        if self.num_outputs is None:
            return pair(partial(self._do, copies), partial(self._undo, given), name=name)
        return pair(partial(self._do_hiding, copies), partial(self._undo_hidden, given), residue=True, name=name)

    def forward(self, *args: Wire, keep: Iterable[Tensor] | Tensor = ()) -> Wire:
        """``function(*args)``, lowered.

        Args:
            args: What the function takes.
            keep: Inputs that are not to be freed.
        """
        if self.invertible and torch.is_grad_enabled():
            self._check_inverse_exists()
        donate = self._donated(args, (keep,) if isinstance(keep, Tensor) else keep)
        given = tuple(REBUILT if isinstance(arg, Tensor) else arg for arg in args)
        return self._lowered(self._pair(bool(donate), given), donate)(*args)

    def _outputs(self, copies: bool, args: tuple[Wire, ...]) -> tuple[Wire, ...]:
        outputs = self._packed(self.call_function(*args), "function")
        return apart(outputs, args) if copies else outputs

    def _do(self, copies: bool, *args: Wire) -> Wire:
        return self.process(self._outputs(copies, args))

    def _do_hiding(self, copies: bool, *args: Wire) -> tuple[Wire, tuple[Any, ...]]:
        outputs = self._outputs(copies, args)
        shown = self.process(outputs)
        return shown, outputs[len(self.pack(shown)) :]

    def _undo(self, given: tuple[Any, ...] | None, *outputs: Any) -> Wire:
        inputs = self.process(self._packed(self.call_inverse(*outputs), "inverse"), inverse=True)
        return inputs if given is None else self._fitted(self.pack(inputs), given)

    def _undo_hidden(self, given: tuple[Any, ...] | None, extras: tuple[Any, ...], *outputs: Any) -> Wire:
        return self._undo(given, *outputs, *extras)

    def _fitted(self, inputs: tuple[Any, ...], given: tuple[Any, ...]) -> Wire:
        """What the inverse returned, like the arguments of the call: those that are no tensors are known."""
        if len(inputs) < len(given):
            raise WireError(
                f"{type(self).__name__}.inverse returned {describe(inputs)}",
                expected=f"{len(given)} like the inputs of function",
            )
        return _unpacked(tuple(x if g is REBUILT else g for x, g in zip(inputs, given, strict=False)))

    def process(self, args: Any, inverse: bool = False) -> Wire:
        """What of the outputs of `function` (or of `inverse`) is shown, by `num_outputs` (or `num_inputs`).

        Args:
            args: The outputs, a tensor or a tuple.
            inverse: Whether they are those of the inverse.

        Raises:
            WireError: When there are fewer.
        """
        args = self._packed(args, "inverse" if inverse else "function")
        wanted = self.num_inputs if inverse else self.num_outputs
        count = len(args) if wanted is None else wanted + len(args) * (wanted < 0)
        if not 0 < count <= len(args):
            raise WireError(
                f"{type(self).__name__}.{'inverse' if inverse else 'function'} returned {describe(args)}",
                expected=f"at least {abs(wanted or 1)}, for {'num_inputs' if inverse else 'num_outputs'} is {wanted}",
            )
        return _unpacked(args[:count])

    def _packed(self, returned: Any, role: str) -> tuple[Wire, ...]:
        if isinstance(returned, (list, dict, set)) or returned is None:
            raise WireError(
                f"{type(self).__name__}.{role} returned {describe(returned)}",
                expected="a tensor or a tuple",
                cure=f"return tuple({'...' if returned is None else 'outputs'})",
            )
        return self.pack(returned)

    def _missing(self, role: str) -> NotInvertibleError:
        return NotInvertibleError(
            f"{type(self).__name__} has no {role}",
            cure=f"define {role}(self, *{'outputs' if role == 'inverse' else 'inputs'})"
            + ", or set invertible=False to keep the inputs instead" * (role == "inverse"),
        )

    def _check_inverse_exists(self) -> None:
        if type(self).inverse is InvertibleModule.inverse:
            raise self._missing("inverse")

    # ---- checks ----

    def check(self, *args: Any, rtol: float = 1e-3, atol: float = 1e-5) -> bool:
        """Whether `inverse` undoes `function` here, and `function` does the same twice, as backward needs.

        Neither the generators nor the buffers are changed.

        Args:
            args: What the function takes.
            rtol: How far two values may be apart, as a part of the value.
            atol: How far they may be apart at least.

        Returns:
            True.

        Raises:
            LawError: When they are not; an ``AssertionError`` that tells by how much.
        """
        random, name = RandomState(accelerators(filter(_is_tensor, args))), type(self).__name__
        with undisturbed(self):
            with random.restored():
                outputs, inputs = self._round_trip(args)
            with random.restored():
                second = self.pack(self.call_function(*args))
        _assert_close(f"{name}: inverse(function(x)) and x", inputs, args, rtol, atol)
        _assert_close(f"{name}: a second function(x) and the first", second, outputs, rtol, atol)
        return True

    def _round_trip(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The outputs, and the inputs that the inverse makes of them, with the same random numbers."""
        random = RandomState(accelerators(filter(_is_tensor, args)))
        outputs = self._packed(self.call_function(*args), "function")
        with random.restored():
            return outputs, self.pack(self._undo(None, *outputs))

    def check_inverse(self, *inputs: Any, atol: float = 1e-5, rtol: float = 1e-3) -> bool:
        """`check` by the name that it has in InvTorch 0.1."""
        return self.check(*inputs, rtol=rtol, atol=atol)

    @staticmethod
    def pack(inputs: Any, is_tensor: bool = False) -> Any:
        """What a function returned as a tuple; with ``is_tensor``, and whether it was a single value."""
        single = not isinstance(inputs, tuple)
        packed = (inputs,) if single else inputs
        return (packed, single) if is_tensor else packed

    @staticmethod
    def do_require_grad(*tensors: Any, at_least_one: bool = True) -> bool:
        """Whether any (or all) of the tensors require grad. Outputs' ``requires_grad`` is found out without it."""
        require = [isinstance(t, Tensor) and t.requires_grad for t in tensors]
        return any(require) if at_least_one else all(require)

    # ---- state dicts: flags that are not the default travel as InvTorch's `_extra_state`, the others do not ----

    def get_extra_state(self) -> dict[str, bool]:
        """The flags."""
        names = ("seed", "checkpoint", "invertible", "reversed")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: Mapping[str, bool]) -> None:
        """Set the flags."""
        self._set_flags(state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.get_extra_state() == {"seed": False, "checkpoint": True, "invertible": True, "reversed": False}:
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        flags = {f"{prefix}_extra_state": self.get_extra_state()}
        super()._load_from_state_dict({**flags, **state_dict}, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The own representation, and the flags that are not the default."""
        shown = {"reversed": self.reversed, "seed": self.seed}
        flags = [name for name, value in shown.items() if value]
        flags += [] if self.invertible else ["invertible=False"] if self.checkpoint else ["checkpoint=False"]
        return ", ".join(filter(None, [super().extra_repr(), *(f if "=" in f else f"{f}=True" for f in flags)]))


def _unpacked(outputs: tuple[Wire, ...]) -> Wire:
    return outputs[0] if len(outputs) == 1 else outputs


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run without gradients, and leave the buffers as they were."""
    held = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in held:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _assert_close(subject: str, found: Wire, expected: Wire, rtol: float, atol: float) -> None:
    from ..testing import LawError  # which is built on `look`, which looks at modules, too

    kinds = [
        [(t.shape, t.dtype) if isinstance(t, Tensor) else None for t in leaves(wire)] for wire in (found, expected)
    ]
    if kinds[0] != kinds[1]:
        raise LawError(f"{subject}: {describe(found)} is not of the kind of {describe(expected)}")
    for i, (a, b) in enumerate(zip(leaves(found), leaves(expected), strict=True)):
        if isinstance(a, Tensor) and not torch.allclose(a, b, rtol, atol):
            raise LawError(f"{subject}: leaf {i} differs by at most {(a - b).abs().max().item():.3g}{_hint(a)}")


def _hint(tensor: Tensor) -> str:
    doubtful = tensor.dtype not in (torch.float64, torch.complex128)
    return "; float64 would tell rounding from a wrong function" if doubtful else ""
