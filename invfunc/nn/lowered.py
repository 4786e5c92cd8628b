"""Pipelines as modules: `Lowered` for any op, `Sequential` and `Coupling` for the two that are built most often."""

# pyright: reportIncompatibleMethodOverride=false
# A module's forward takes what its op takes; those of `torch.nn` take each their own.

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeAlias

from torch import Tensor, nn

from .. import _torch
from ..checkpoint import Wrapper, checkpoint
from ..core.combine import Parallel, split
from ..core.copies import deep_copy
from ..core.couple import Half, additive, as_law, couple
from ..core.op import Chain, Invertible, OneWay, Pair, chain
from ..core.structure import contents_of, globals_of, has_functions
from ..errors import OptionError
from ..wires import Wire
from .module import InvertibleModule, Live, Module, is_called, op_of

Owner: TypeAlias = nn.Module | Tensor
Path: TypeAlias = tuple[str, ...]

# ---- modules made from the catalogue's ops ---------------------------------------------------------------------------


class Layer(InvertibleModule):
    """A module whose function is an op's: a subclass defines `make`, and has all that an `InvertibleModule` has.

    The caller's tensors are left alone, unless ``donate`` says otherwise.

    Example:
        >>> import torch, invfunc as inv
        >>> class Scale(inv.nn.Layer):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.tensor([2.0, 4.0]))
        ...
        ...     def make(self) -> inv.Invertible:
        ...         return inv.ops.diagonal(self.scale)
        >>> Scale().inverse(torch.ones(1, 2)).detach()
        tensor([[0.5000, 0.2500]])
    """

    donate = False

    def make(self) -> Invertible:
        """The op, whether the module is reversed or not."""
        raise NotImplementedError

    def build(self) -> Invertible:
        op = self.make()
        return op.inverted() if self.reversed else op

    def build_inverse(self) -> Invertible:
        return self.build().inverted()

    def function(self, *xs: Wire) -> Wire:
        """``x -> y``, plainly."""
        return self.make()(*xs)

    def forward(self, *xs: Wire, context: Mapping[str, Any] | None = None) -> Wire:
        """``y = op(x)``, lowered; the functions are told a context, as in a call of the op."""
        return Module.forward(self, *xs, context=context)

    def inverse(self, *ys: Wire, context: Mapping[str, Any] | None = None) -> Wire:
        """``x = op.inverse(y)``, lowered."""
        return Module.inverse(self, *ys, context=context)

    @property
    def call_function(self) -> Any:
        """What `forward` lowers, plainly."""
        return self.build()

    @property
    def call_inverse(self) -> Any:
        """What `inverse` lowers, plainly."""
        return self.build_inverse()

    def _round_trip(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        op = self.build()
        y, residue = op.forward_with_residue(args[0] if len(args) == 1 else args)
        return self.pack(y), self.pack(op.inverse_with_residue(residue, y))

    def _configure(self, options: Mapping[str, Any]) -> None:
        """Take options of `invfunc.checkpoint`; those that are flags of the module become its flags."""
        try:
            checkpoint(chain(), **{**options, "segments": 1, "cuts": ()})
        except TypeError as error:
            raise OptionError(f"got {sorted(options)}", expected="options of invfunc.checkpoint") from error
        self._options = {name: value for name, value in options.items() if name not in ("mode", "donate")}
        self.donate = options.get("donate", False)
        self._set_mode(options.get("mode", "invert"))

    @property
    def reversible(self) -> bool:
        """Whether the inverse has an inverse: not where a stage has none."""
        return not _is_one_way(self.make())


def _is_one_way(op: Invertible) -> bool:
    return isinstance(op, OneWay) or any(map(_is_one_way, op.parts))


# ---- any op ----------------------------------------------------------------------------------------------------------


class Names(nn.Module):
    """A level of names between a `Lowered` module and the modules inside its op."""

    def forward(self) -> None:
        """Names are not called."""
        raise OptionError("these are the names of an op's modules", cure="call the Lowered module that they belong to")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # so that a tool, such as torch.distributed.pipelining, does not wait for a call
            self.forward()
        super().__setattr__(name, value)


class Lowered(Layer):
    """An op as a module: it owns the modules and parameters that the op's functions use.

    Names tell where in the op a module is: the number of a part of a chain, ``f`` and ``g`` in a coupling, the name of
    the argument for a tensor. A module that is used at several places has several names, as in `torch.nn`.

    Args:
        op: What the combinators made; a function or a module becomes a `one_way` stage.
        options: Those of `invfunc.checkpoint`.

    Raises:
        OptionError: When an option is unknown, or the op closes over a tensor that a module can not own.

    Limits:
        What a plain Python function finds in its closure, or among its globals, is owned too, but such a module can not
        be pickled, and what is found among globals can not be copied: pass the module itself, a bound method or a
        `functools.partial` instead. A module that holds this one, and which a function finds (``self``, most often),
        is not owned: its parameters are its own.

    Example:
        >>> import torch, invfunc as inv
        >>> block = inv.couple(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> net = inv.nn.Lowered(inv.chain(inv.split(2), block, inv.concat(2)))
        >>> [name for name, _ in net.named_parameters()]
        ['1.f.weight', '1.f.bias', '1.g.weight', '1.g.bias']
        >>> net(torch.randn(3, 8)).sum().backward()
        >>> net.inverse(net(torch.ones(1, 8))).shape
        torch.Size([1, 8])
    """

    def __init__(self, op: Invertible | Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self._op = op if isinstance(op, Invertible) else chain(op)
        self._configure(options)
        checkpoint(self._op, **self._options)
        self._used: dict[Path, dict[str, Owner]] = {}  # by the functions, under the names that they have here
        self._latest, self._latest_of = self._op, list[nn.Module]()
        self._has_closures = False
        for path, owner, closed in owned(self._op):
            self._has_closures |= closed
            self._own(path, owner, closed)

    def make(self) -> Invertible:
        """The op, with what the module holds now in the places of what it was made with."""
        changed = [now for _, _, owner, now in self._held() if now is not owner]
        if not changed:
            return self._op
        _follow_modules(self)
        if all([isinstance(now, nn.Module) for now in changed]):
            return self._latest
        return rebuilt(self._latest, self._now)

    @property
    def op(self) -> Invertible:
        """What the combinators made."""
        return self.make()

    def _held(self) -> list[tuple[dict[str, Owner], str, Owner, Any]]:
        """``(table, name, what is used, what is held)`` for all that the functions use."""
        homes = [(self._home(path), used) for path, used in self._used.items()]
        return [(used, name, owner, _held_as(home, name)) for home, used in homes for name, owner in used.items()]

    def _home(self, path: Path) -> nn.Module:
        home: nn.Module = self
        for name in path:
            home = _torch.children_of(home)[name]
        return home

    def _now(self, path: Path, owner: Owner) -> Any:
        """What the module holds now where the functions at a path used something."""
        home, used = self._home(path[:-1]), self._used.get(path[:-1], {})
        name = _name_on(home, path[-1])
        return _held_as(home, name) if used.get(name) is owner else owner

    def _module_now(self, path: Path, owner: Owner) -> Any:
        return self._now(path, owner) if isinstance(owner, nn.Module) else owner

    def _own(self, path: Path, owner: Owner, closed: bool) -> None:
        home: nn.Module = self
        for name in path[:-1]:
            if name not in _torch.children_of(home):
                home.add_module(name, Names())
            home = _torch.children_of(home)[name]
        name = _name_on(home, path[-1])
        if isinstance(owner, nn.Module):
            home.add_module(name, owner)
        elif not _owns(home, name, owner, closed):
            return
        self._used.setdefault(path[:-1], {})[name] = owner

    def _let_go_of_holders(self) -> None:
        """Forget modules that hold this one: they own what the functions find in them, and torch walks no circles."""
        for path, used in self._used.items():
            home = self._home(path)
            children = _torch.children_of(home)
            for name in [name for name in used if name in children and _holds(children[name], self)]:
                delattr(home, name)
                del used[name]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; a module that holds this one is not below it."""
        self._let_go_of_holders()
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Likewise."""
        self._let_go_of_holders()
        return super().named_children()

    def _save_to_state_dict(self, *args: Any) -> None:
        self._let_go_of_holders()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._let_go_of_holders()
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._op = rebuilt(self._op, self._now)
        self._latest, self._latest_of = self._op, []
        for used, name, _, now in self._held():
            used[name] = now
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: the op and the module refer to the same modules there, too."""
        if self._has_closures:
            raise OptionError(
                f"Lowered: a function of {self._op!r} closes over modules that a pickle would not use",
                cure="pass the module itself, a bound method or a functools.partial",
            )
        return self.__dict__

    def extra_repr(self) -> str:
        """The op, and the flags that are not the default."""
        self._let_go_of_holders()
        given = [f"{name}={value!r}" for name, value in self._options.items()]
        return ", ".join(filter(None, [repr(self._op), *given, super().extra_repr()]))


@_torch.called_not_traced
def _follow_modules(module: Lowered) -> None:
    """Let the latest op be one of the modules that are held now; that of old stays, since Dynamo guards what it saw."""
    held = [now for *_, now in module._held() if isinstance(now, nn.Module)]
    if len(held) != len(module._latest_of) or any([a is not b for a, b in zip(held, module._latest_of, strict=True)]):
        module._latest, module._latest_of = rebuilt(module._op, module._module_now), held


def _holds(module: nn.Module, wanted: nn.Module) -> bool:
    """Whether a module is among those below another."""
    seen: set[int] = set()
    left = [module]
    while left:
        children = [child for child in _torch.children_of(left.pop()).values() if child is not None]
        left += [child for child in children if id(child) not in seen]
        seen |= set(map(id, children))
    return id(wanted) in seen


def _held_as(home: nn.Module, name: str) -> Any:
    children = _torch.children_of(home)
    return children[name] if name in children else getattr(home, name)


def _name_on(home: nn.Module, name: str) -> str:
    return f"{name}_" if hasattr(type(home), name) else name


def _owns(home: nn.Module, name: str, tensor: Tensor, closed: bool) -> bool:
    """Register a tensor, as a parameter or a buffer; a constant in a closure is none of the module's business."""
    if isinstance(tensor, nn.Parameter):
        home.register_parameter(name, tensor)
    elif tensor.requires_grad:
        raise OptionError(
            f"Lowered: the op closes over a tensor {tuple(tensor.shape)} that requires grad and is no parameter",
            expected="a parameter, which a module can own",
            cure="make it one with torch.nn.Parameter, or let a module compute it",
        )
    elif not closed:
        home.register_buffer(name, tensor)
    return name in _torch.parameters_of(home) or name in _torch.buffers_of(home)


# ---- which modules and tensors an op's functions use, and what to call them ------------------------------------------


def owned(op: Invertible) -> Iterator[tuple[Path, Owner, bool]]:
    """Every module and tensor inside an op: its name, itself, and whether it was found in a closure."""
    for path, part in _primitives(op, ()):
        yield from _named(_functions(part), path)


def _primitives(op: Invertible, path: Path) -> Iterator[tuple[Path, Invertible]]:
    for name, part in _inner(op):
        yield from _primitives(part, (*path, *name))
    if not _inner(op):
        yield path, op


def _inner(op: Invertible) -> list[tuple[Path, Invertible]]:
    """The ops that an op is made of, with their names in it; none of a primitive, such as the op of a module."""
    if isinstance(op, Live):
        return []
    return [((), op.op)] if isinstance(op, Wrapper) else [((name,), part) for name, part in _named_parts(op)]


def rebuilt(op: Invertible, now: Callable[[Path, Owner], Any], path: Path = ()) -> Invertible:
    """An op whose functions use ``now(path, owner)`` in the place of each owner; what is the same stays."""
    inner = _inner(op)
    if not inner:
        return _primitive_with(op, [(owner, now(name, owner)) for name, owner, _ in _named(_functions(op), path)])
    parts = [rebuilt(part, now, (*path, *name)) for name, part in inner]
    if all([new is old for new, (_, old) in zip(parts, inner, strict=True)]):
        return op
    if isinstance(op, Wrapper):
        return replace(op, op=parts[0])
    if isinstance(op, (Chain, Parallel)):
        return replace(op, _parts=tuple(parts))
    return deep_copy(op, {id(old): new for new, (_, old) in zip(parts, inner, strict=True)})


def _primitive_with(op: Invertible, uses: list[tuple[Owner, Any]]) -> Invertible:
    if all([new is old for old, new in uses]):
        return op
    if isinstance(op, Live):
        _, module = uses[0]
        one = Live(module) if isinstance(module, Module) else chain(module)
        return one.inverted() if op.backwards else one
    return deep_copy(op, {id(old): new for old, new in uses})


def _named_parts(op: Invertible) -> list[tuple[str, Invertible]]:
    labels = [part.label if isinstance(part, Half) else str(i) for i, part in enumerate(op.parts)]
    unique = len(set(labels)) == len(labels)
    return [(label if unique else str(i), part) for i, (label, part) in enumerate(zip(labels, op.parts, strict=True))]


def _functions(op: Invertible) -> list[tuple[str, Any]]:
    """The functions of a primitive by their roles."""
    if isinstance(op, Live):
        return [("", op.module)]
    if isinstance(op, Pair):
        roles = ("forward", op.forward_fn), ("inverse", op.inverse_fn), ("pullback", op.pullback_fn)
        return [*roles, ("log_det", op.log_det_fn)]
    return [("", fn) for fn in op.functions]


def _named(functions: list[tuple[str, Any]], path: Path) -> Iterator[tuple[Path, Owner, bool]]:
    """What functions own, each once: by its name in the first function that has it, with the role where two collide."""
    found: dict[int, tuple[str, Owner, bool]] = {}
    for role, fn in functions:
        for name, owner, closed in _reached(fn, "", False, set()):
            if id(owner) not in found:
                taken = {n for n, _, _ in found.values()}
                found[id(owner)] = (_free_name(name, role, taken), owner, closed)
    alone = len(found) == 1
    for name, owner, closed in found.values():
        last = () if alone and not name and path else (name or "module",)
        yield (*path, *last), owner, closed


def _free_name(name: str, role: str, taken: set[str]) -> str:
    options = [name, role, f"{role}_{name}", *(f"{name or role}_{i}" for i in range(2, len(taken) + 3))]
    return next(option for option in options if option not in taken)


def _reached(item: Any, name: str, closed: bool, seen: set[int]) -> Iterator[tuple[str, Owner, bool]]:
    """Look through partials, methods, wrappers, containers and closures."""
    if isinstance(item, (nn.Module, Tensor)):
        yield name, item, closed
    elif id(item) not in seen:
        seen.add(id(item))
        for inner, child, closes in _inside(item):
            yield from _reached(child, inner or name, closed or closes, seen)


def _inside(item: Any) -> Iterator[tuple[str, Any, bool]]:
    """``(name or nothing, child, whether it is in a closure)`` for what a function is made of."""
    if isinstance(item, Invertible):
        yield from ((name, fn, False) for name, fn in _functions(item))
        yield from (("", part, False) for part in item.parts)
    elif has_functions(item):
        yield from (("", fn, False) for fn in item.functions)
    elif isinstance(item, partial):
        yield from ((name, value, False) for name, value in [("", item.func), *_arguments(item)])
    elif isinstance(item, MethodType):
        yield "", item.__self__, False
    elif isinstance(item, FunctionType):
        yield from ((name, value, True) for name, value in _closure(item))
    elif isinstance(item, (tuple, list)):
        yield from (("", value, False) for value in item)
    elif isinstance(item, Mapping):
        yield from ((str(name), value, False) for name, value in item.items())
    elif callable(item) and not isinstance(item, type):
        yield from ((name, value, False) for name, value in getattr(item, "__dict__", {}).items())


def _arguments(item: partial[Any]) -> list[tuple[str, Any]]:
    """The bound arguments of a partial by the names of the parameters."""
    try:
        names = [name.strip("_") for name in inspect.signature(item.func).parameters]
    except ValueError:  # a builtin without a signature
        names = []
    names += [str(i) for i in range(len(names), len(item.args))]
    return [*zip(names, item.args, strict=False), *item.keywords.items()]


def _closure(fn: FunctionType) -> list[tuple[str, Any]]:
    """What a function holds, and the modules, tensors and functions that it finds among its globals."""
    found = [(name, v) for name, v in globals_of(fn).items() if isinstance(v, _INTERESTING)]
    return [*found, *contents_of(fn).items()]


_INTERESTING = nn.Module, Tensor, FunctionType, partial, MethodType


# ---- the two that are built most often -------------------------------------------------------------------------------


class Sequential(Layer, nn.Sequential):
    """Modules one after another, as `torch.nn.Sequential`, lowered as one pipeline at constant memory.

    A child of this package whose flags say so is stored or run again instead; an ordinary module has no inverse, so its
    input is stored. A child with hooks, or with a forward that a tool has put there, is called as a module, between two
    stored activations. `Coupling`s of the same parts, one behind the other, split their input once.

    Args:
        modules: As for `torch.nn.Sequential`: modules, or one ``OrderedDict`` of them. An op becomes a `Lowered`.
        options: Those of `invfunc.checkpoint`.

    Raises:
        NotInvertibleError: When the inverse is asked of an ordinary module.

    Example:
        >>> import torch, invfunc as inv
        >>> net = inv.nn.Sequential(inv.nn.Linear(4, 4), inv.ops.tanh(), inv.nn.Linear(4, 6))
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Lowered(tanh())
          (2): Linear(in_features=4, out_features=6, bias=True)
        )
        >>> net(torch.randn(2, 4)).shape
        torch.Size([2, 6])
    """

    def __init__(self, *modules: Any, **options: Any) -> None:
        nn.Module.__init__(self)
        named = modules[0].items() if len(modules) == 1 and isinstance(modules[0], OrderedDict) else enumerate(modules)
        for name, module in named:
            self.add_module(str(name), module)
        self._configure(options)

    def add_module(self, name: str, module: Any) -> None:
        """Add a module, or an op."""
        super().add_module(name, Lowered(module) if isinstance(module, Invertible) else module)

    def make(self) -> Invertible:
        return chain(*_parts_of(self))


def _parts_of(modules: Iterable[Any]) -> list[Any]:
    """What modules do, in a chain; couplings of the same parts do not join them in between, to split them again."""
    parts, way = [], None
    for module in modules:
        before, way = way, _way_to_split(module)
        if way is None:
            parts.append(op_of(module))
            continue
        op = split(way[0], way[1], interleaved=way[2])
        if way == before:
            parts.pop()
        else:
            parts.append(op)
        parts += [module.couple(), op.inverted()]
    return parts


def _way_to_split(module: Any) -> tuple[Any, int, bool] | None:
    """How a module splits its input, if it is a coupling of the parts and nothing more."""
    if getattr(type(module), "make", None) is not Coupling.make or module.sizes is None:
        return None
    if module.reversed or module._mode != "invert" or is_called(module):
        return None
    return module.sizes, module.dim, module.interleaved


class Coupling(Layer):
    """A coupling of the halves of one tensor: ``chain(split, couple(f, g, law), concat)`` as a module.

    Args:
        f: A module or a function; see `invfunc.couple`.
        g: Likewise; without it, the second half passes untouched.
        law: What the halves do to each other; see `invfunc.couple`.
        sizes: Into which parts to split; see `invfunc.split`. None couples the components of a tuple instead.
        dim: The dimension to split.
        interleaved: Take every other slice instead of halves.
        options: Those of `invfunc.checkpoint`.

    Raises:
        WireError: When the input does not split, or f or g returns something that does not fit.

    Example:
        >>> import torch, invfunc as inv
        >>> block = inv.nn.Coupling(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> y = block(torch.ones(2, 8))
        >>> torch.allclose(block.inverse(y), torch.ones(2, 8), atol=1e-6)
        True
    """

    def __init__(
        self,
        f: Callable[..., Any],
        g: Callable[..., Any] | None = None,
        *,
        law: Callable[..., Invertible] = additive,
        sizes: Any = 2,
        dim: int = 1,
        interleaved: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.f, self.g, self.law = f, g, law
        self.sizes, self.dim, self.interleaved = sizes, dim, interleaved
        self._configure(options)

    def couple(self) -> Invertible:
        """The coupling of the parts."""
        return couple(self.f, self.g, law=self.law)

    def make(self) -> Invertible:
        if self.sizes is None:
            return self.couple()
        parts = split(self.sizes, self.dim, interleaved=self.interleaved)
        return chain(parts, self.couple(), parts.inverted())

    def extra_repr(self) -> str:
        """What is not a module."""
        shown = [] if self.sizes is None else [f"sizes={self.sizes}, dim={self.dim}"]
        shown += [as_law(self.law).suffix.removeprefix(", ")]
        return ", ".join(filter(None, [*shown, super().extra_repr()]))
