"""MemCNN's names over the same values: change ``import memcnn`` to ``from invfunc.compat import memcnn``.

A coupling is ``chain(split, couple, concat)`` with a module around it, and a wrapper lowers what it wraps.
MIGRATING.md tells what differs, and why.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import trees as pytree
from ..core.combine import split
from ..core.couple import additive, affine, couple
from ..core.op import Invertible, Rearrangement, chain, pair
from ..engine.devices import accelerators
from ..engine.random_numbers import RandomState
from ..errors import NotInvertibleError, OptionError, WireError
from ..nn.module import Module, apart, is_called, undisturbed
from ..wires import Wire, describe

__all__ = [
    "AdditiveBlock",
    "AdditiveCoupling",
    "AffineAdapterNaive",
    "AffineAdapterSigmoid",
    "AffineBlock",
    "AffineCoupling",
    "InvertibleModuleWrapper",
    "ReversibleBlock",
    "create_coupling",
    "is_invertible_module",
]

# ---- couplings -------------------------------------------------------------------------------------------------------


class AffineAdapterNaive(nn.Module):
    r"""A net's output t as ``(exp(t), t)``, scale and shift of an `AffineCoupling`.

    Args:
        module: The net.

    Limits:
        The scale is unbounded: in fp32, chains of 4 such couplings overflow. Prefer `invfunc.ops.tanh_scale`.

    Example:
        >>> AffineAdapterNaive(torch.nn.Identity())(torch.zeros(2))
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.f = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(exp(f(x)), f(x))``."""
        t = self.f(x)
        return torch.exp(t), t


class AffineAdapterSigmoid(nn.Module):
    r"""A net's odd channels h as scale :math:`\sigma(h + 2)`, its even channels as shift.

    Args:
        module: The net; it returns twice the channels of its partner.

    Raises:
        WireError: When the net returns an odd number of channels.

    Example:
        >>> scale, shift = AffineAdapterSigmoid(torch.nn.Identity())(torch.zeros(1, 4))
        >>> scale.shape, shift.shape
        (torch.Size([1, 2]), torch.Size([1, 2]))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.f = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(sigmoid(odd + 2), even)``."""
        h = self.f(x)
        if h.dim() < 2 or h.shape[1] % 2:
            raise WireError(
                f"AffineAdapterSigmoid: the net returned {describe(h)}",
                expected="an even number of channels (dim 1): scale and shift",
                cure="let the net return twice the channels of its input",
            )
        return torch.sigmoid(h[:, 1::2] + 2.0), h[:, 0::2]


class _Coupling(Module):
    """What the two couplings share."""

    def __init__(
        self, Fm: nn.Module, Gm: nn.Module | None, implementation_fwd: int, implementation_bwd: int, split_dim: int
    ) -> None:
        super().__init__()
        if not isinstance(split_dim, int):
            raise OptionError(f"{type(self).__name__}: split_dim is {split_dim!r}", expected="a dimension, an int")
        if (implementation_fwd, implementation_bwd) != (-1, -1):
            warnings.warn("there is one implementation: leave implementation_* at -1", DeprecationWarning, stacklevel=3)
        self.Gm = copy.deepcopy(Fm) if Gm is None else Gm
        self.Fm = Fm
        self.implementation_fwd, self.implementation_bwd = implementation_fwd, implementation_bwd
        self.split_dim = split_dim

    def couple(self) -> Invertible:
        """The coupling of the halves."""
        raise NotImplementedError

    def build(self) -> Invertible:
        return self._chain(self.implementation_fwd)

    def build_inverse(self) -> Invertible:
        return self._chain(self.implementation_bwd).inverted()

    def _chain(self, implementation: int) -> Invertible:
        if implementation not in (-1, 0, 1):
            raise NotImplementedError(f"implementation {implementation}: expected -1, 0 or 1, which are the same")
        both = halves(type(self).__name__, self.split_dim)
        return chain(both, self.couple(), both.inverted())

    def inverse(self, *ys: Wire) -> Wire:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``x``, lowered."""
        return self._lowered(self.build_inverse())(*ys)

    def extra_repr(self) -> str:
        """The options."""
        return "" if self.split_dim == 1 else f"split_dim={self.split_dim}"


def halves(owner: str, dim: int) -> Invertible:
    """``split(2, dim)`` that speaks of ``split_dim`` in its errors."""
    op, label = split(2, dim), f"split_dim={dim}"
    return Rearrangement(partial(_halve, op, owner, dim), op.inverse, label, f"invert({label})")


def _halve(op: Invertible, owner: str, dim: int, x: Any) -> Wire:
    if isinstance(x, Tensor) and not -x.dim() <= dim < x.dim():
        raise WireError(f"{owner}: the input is {describe(x)}", expected=f"a dimension split_dim={dim}")
    if isinstance(x, Tensor) and x.shape[dim] % 2:
        sizes = [x.shape[dim] // 2 + 1, x.shape[dim] // 2]
        raise WireError(
            f"{owner}: the input is {describe(x)}",
            expected=f"an even size along split_dim={dim}",
            got=str(x.shape[dim]),
            cure=f"pad it, or use invfunc.nn.Coupling(f, g, sizes={sizes}, dim={dim})",
        )
    return op.forward(x)


class AdditiveCoupling(_Coupling):
    """``y1 = x1 + Fm(x2)``, ``y2 = x2 + Gm(y1)`` on the halves of the input.

    Args:
        Fm: A module of half of the input.
        Gm: Likewise; a copy of ``Fm`` if it is not given.
        implementation_fwd: -1, 0 or 1, which are the same.
        implementation_bwd: Likewise, for the inverse.
        split_dim: The dimension that is halved.

    Raises:
        WireError: When the dimension does not halve, or a module returns what does not fit its partner.
        NotImplementedError: When it is called with another implementation.

    Example:
        >>> block = AdditiveCoupling(torch.nn.Linear(2, 2))
        >>> block(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        split_dim: int = 1,
    ) -> None:
        super().__init__(Fm, Gm, implementation_fwd, implementation_bwd, split_dim)

    def couple(self) -> Invertible:
        return couple(self.Fm, self.Gm, law=additive)


class AffineCoupling(_Coupling):
    """``y1 = s * x1 + t`` with ``s, t = Fm(x2)``, and likewise for the other half.

    Args:
        Fm: A module of half of the input; it returns ``(s, t)``, or ``adapter`` makes them.
        Gm: Likewise; a copy of ``Fm`` if it is not given.
        adapter: What makes ``(s, t)`` of a module's output: `AffineAdapterNaive`, `AffineAdapterSigmoid`, or another
            module class whose constructor takes the module.
        implementation_fwd: -1, 0 or 1, which are the same.
        implementation_bwd: Likewise, for the inverse.
        split_dim: The dimension that is halved.

    Raises:
        WireError: When the dimension does not halve, a module returns what does not fit its partner, or one tensor
            where ``(s, t)`` is needed.
        NotImplementedError: When it is called with another implementation.

    Example:
        >>> block = AffineCoupling(torch.nn.Linear(2, 2), adapter=AffineAdapterNaive)
        >>> block(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        adapter: Callable[[nn.Module], nn.Module] | None = None,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        split_dim: int = 1,
    ) -> None:
        super().__init__(Fm, Gm, implementation_fwd, implementation_bwd, split_dim)
        if adapter is not None:
            self.Gm, self.Fm = adapter(self.Gm), adapter(self.Fm)

    def couple(self) -> Invertible:
        return couple(ScaleAndShift(self.Fm, "Fm"), ScaleAndShift(self.Gm, "Gm"), law=affine)


@dataclass(frozen=True)
class ScaleAndShift:
    """A module that has to return ``(s, t)``."""

    module: nn.Module
    label: str

    @property
    def functions(self) -> tuple[nn.Module, ...]:
        """The user's module."""
        return (self.module,)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.module(x)
        if isinstance(out, (tuple, list)) and len(out) == 2:
            return out[0], out[1]
        raise WireError(
            f"AffineCoupling: {self.label} returned {describe(out)}",
            expected="(s, t), scale and shift",
            cure="pass adapter=AffineAdapterNaive or adapter=AffineAdapterSigmoid, or return a tuple",
        )

    @property
    def __name__(self) -> str:
        return type(self.module).__name__


def create_coupling(
    Fm: nn.Module,
    Gm: nn.Module | None = None,
    coupling: str = "additive",
    implementation_fwd: int = -1,
    implementation_bwd: int = -1,
    adapter: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """An `AdditiveCoupling` or an `AffineCoupling`, by name.

    Args:
        Fm: See the couplings.
        Gm: See the couplings.
        coupling: ``"additive"`` or ``"affine"``.
        implementation_fwd: See the couplings.
        implementation_bwd: See the couplings.
        adapter: See `AffineCoupling`.

    Raises:
        NotImplementedError: When the name is another.

    Example:
        >>> create_coupling(torch.nn.Linear(2, 2))(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """
    if coupling == "additive":
        return AdditiveCoupling(Fm, Gm, implementation_fwd, implementation_bwd)
    if coupling == "affine":
        return AffineCoupling(Fm, Gm, adapter, implementation_fwd, implementation_bwd)
    raise NotImplementedError(f"coupling {coupling!r}: expected 'additive' or 'affine'")


# ---- the wrapper -----------------------------------------------------------------------------------------------------


class InvertibleModuleWrapper(Module):
    """Frees the activations of a module that has an ``inverse``, in both directions, and its input where that is safe.

    Args:
        fn: A module with ``forward`` and ``inverse``.
        keep_input: Leave the input of `forward` alone and rebuild nothing: ``fn`` runs again from it in backward.
            Otherwise the input is freed if nobody else holds it, and rebuilt in backward; reading it in between raises
            `invfunc.errors.DonatedError`.
        keep_input_inverse: Likewise for the input of `inverse`.
        num_bwd_passes: Not needed: backward may run as often as autograd allows.
        disable: Call ``fn`` plainly.
        preserve_rng_state: Not needed: random numbers are always the same in backward.

    Raises:
        NotInvertibleError: When ``fn`` has no inverse and needs one.

    Example:
        >>> block = InvertibleModuleWrapper(AdditiveCoupling(torch.nn.Linear(2, 2)))
        >>> y = block(torch.ones(3, 4))
        >>> torch.allclose(block.inverse(y), torch.ones(3, 4), atol=1e-6)
        True
    """

    donate = "safe"

    def __init__(
        self,
        fn: nn.Module,
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        num_bwd_passes: int = 1,
        disable: bool = False,
        preserve_rng_state: bool = False,
    ) -> None:
        super().__init__()
        self.disable = disable
        self.keep_input, self.keep_input_inverse = keep_input, keep_input_inverse
        self.num_bwd_passes, self.preserve_rng_state = num_bwd_passes, preserve_rng_state
        self._fn = fn

    def build(self) -> Invertible:
        return self._op(False)

    def build_inverse(self) -> Invertible:
        return self._op(True)

    def _op(self, backwards: bool) -> Invertible:
        if self._is_op():
            return self._fn.build_inverse() if backwards else self._fn.build()  # pyright: ignore
        functions = [self._call, self._uncall]
        return pair(*functions[:: -1 if backwards else 1], name=type(self._fn).__name__)

    def forward(self, *xin: Any, **kwargs: Any) -> Any:
        """``fn(*xin)``, lowered. Arguments may be nested lists and dicts; keywords go to ``fn`` and to its inverse."""
        return self._run(False, self.keep_input, xin, kwargs)

    def inverse(self, *yin: Any, **kwargs: Any) -> Any:
        """``fn.inverse(*yin)``, lowered."""
        return self._run(True, self.keep_input_inverse, yin, kwargs)

    def _run(self, backwards: bool, keep: bool, xs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = "store" if self.disable else "recompute" if keep else "invert"
        if mode == "invert" and torch.is_grad_enabled():
            self._check_inverse_exists()
        if self._is_op():
            donate = self._donated(xs) if mode == "invert" else False
            return self._lowered(self._op(backwards), donate, mode)(*xs, **kwargs)
        flat, spec = pytree.tree_flatten(xs)
        donate = self._donated(tuple(flat)) if mode == "invert" else False
        functions = [partial(fn, **kwargs) for fn in (self._call, self._uncall)][:: -1 if backwards else 1]
        there = Structured(functions[0], [spec], [], bool(donate))
        op = pair(there, Structured(functions[1], there.gives, []), name=type(self._fn).__name__)
        return there.rebuild(self._lowered(op, donate, mode)(*flat))

    def _is_op(self) -> bool:
        """Whether the module is an op's, and no more than that is called."""
        return isinstance(self._fn, Module) and not is_called(self._fn)

    def _call(self, *xs: Any, **kwargs: Any) -> Any:
        return self._fn(*xs, **kwargs)

    def _uncall(self, *ys: Any, **kwargs: Any) -> Any:
        return self._fn.inverse(*ys, **kwargs)  # pyright: ignore[reportCallIssue]

    def _check_inverse_exists(self) -> None:
        if not hasattr(self._fn, "inverse"):
            raise NotInvertibleError(
                f"InvertibleModuleWrapper: {type(self._fn).__name__} has no inverse",
                cure="give it a method inverse(self, *y), or pass keep_input=True",
            )


@dataclass(frozen=True)
class Structured:
    """A function of nested lists and dicts as a function of their leaves; it takes what its counterpart gives."""

    fn: Callable[..., Any]
    takes: list[pytree.TreeSpec]
    gives: list[pytree.TreeSpec]  # filled by each call
    copies: bool = False

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function."""
        return (self.fn,)

    def __call__(self, *flat: Any) -> Wire:
        out = self.fn(*pytree.tree_unflatten(list(flat), self.takes[0]))
        found, spec = pytree.tree_flatten(out if isinstance(out, tuple) else (out,))
        self.gives[:] = [spec]
        return _single(apart(tuple(found), flat) if self.copies else tuple(found))

    def rebuild(self, out: Wire) -> Any:
        """What the function returned."""
        return _single(pytree.tree_unflatten(list(out) if isinstance(out, tuple) else [out], self.gives[0]))

    @property
    def __name__(self) -> str:
        return "fn"


def _single(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) and len(out) == 1 else out


class ReversibleBlock(InvertibleModuleWrapper):
    """`InvertibleModuleWrapper` of `create_coupling`; deprecated, as in MemCNN.

    Args:
        Fm: See `AdditiveCoupling`.
        Gm: See `AdditiveCoupling`.
        coupling: ``"additive"`` or ``"affine"``.
        keep_input: See `InvertibleModuleWrapper`.
        keep_input_inverse: See `InvertibleModuleWrapper`.
        implementation_fwd: See `AdditiveCoupling`.
        implementation_bwd: See `AdditiveCoupling`.
        adapter: See `AffineCoupling`.

    Example:
        >>> import torch, warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", DeprecationWarning)
        ...     ReversibleBlock(torch.nn.Linear(2, 2), coupling="additive")(torch.ones(1, 4)).shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        coupling: str = "additive",
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        adapter: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        warnings.warn("use InvertibleModuleWrapper(create_coupling(...))", DeprecationWarning, stacklevel=2)
        fn = create_coupling(Fm, Gm, coupling, implementation_fwd, implementation_bwd, adapter)
        super().__init__(fn, keep_input, keep_input_inverse)


class AdditiveBlock(AdditiveCoupling):
    """`AdditiveCoupling`; deprecated, as in MemCNN.

    Example:
        >>> import torch, warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", DeprecationWarning)
        ...     AdditiveBlock(torch.nn.Linear(2, 2))(torch.ones(1, 4)).shape
        torch.Size([1, 4])
    """

    def __init__(
        self, Fm: nn.Module, Gm: nn.Module | None = None, implementation_fwd: int = 1, implementation_bwd: int = 1
    ) -> None:
        warnings.warn("use AdditiveCoupling", DeprecationWarning, stacklevel=2)
        super().__init__(Fm, Gm)
        self.implementation_fwd, self.implementation_bwd = implementation_fwd, implementation_bwd


class AffineBlock(AffineCoupling):
    """`AffineCoupling`; deprecated, as in MemCNN.

    Example:
        >>> import torch, warnings
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ...         return 1 + x * x, x
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", DeprecationWarning)
        ...     AffineBlock(Net())(torch.ones(1, 4)).shape
        torch.Size([1, 4])
    """

    def __init__(
        self, Fm: nn.Module, Gm: nn.Module | None = None, implementation_fwd: int = 1, implementation_bwd: int = 1
    ) -> None:
        warnings.warn("use AffineCoupling", DeprecationWarning, stacklevel=2)
        super().__init__(Fm, Gm)
        self.implementation_fwd, self.implementation_bwd = implementation_fwd, implementation_bwd


# ---- the check -------------------------------------------------------------------------------------------------------


def is_invertible_module(
    module_in: nn.Module,
    test_input_shape: Any,
    test_input_dtype: torch.dtype = torch.float32,
    atol: float = 1e-6,
    random_seed: int = 42,
) -> bool:
    """Whether a module's ``inverse`` undoes its ``forward``, and the other way round, on uniform random inputs.

    Neither the global generator nor the module's buffers are changed, and the inputs are on the module's device.

    Args:
        module_in: The module, wrapped or not.
        test_input_shape: The shape of the input, or a tuple of shapes for several.
        test_input_dtype: The dtype of the inputs.
        atol: How far two values may be apart.
        random_seed: For the inputs.

    Raises:
        ValueError: When ``test_input_shape`` is no shape and no tuple of shapes.

    Limits:
        A bare yes or no: `invfunc.testing.check_laws` tells by how much, and looks at the gradients, too.

    Example:
        >>> is_invertible_module(AdditiveCoupling(torch.nn.Linear(2, 2)), test_input_shape=(3, 4))
        True
        >>> is_invertible_module(torch.nn.Linear(4, 4), test_input_shape=(3, 4))
        False
    """
    module = module_in._fn if isinstance(module_in, InvertibleModuleWrapper) else module_in
    if not hasattr(module, "inverse"):
        return False
    inputs = _uniform(module, _shapes(test_input_shape), test_input_dtype, random_seed)
    with undisturbed(module), RandomState(accelerators(inputs)).restored():
        outputs = _packed(module(*inputs))
        rebuilt = _packed(module.inverse(*outputs))  # pyright: ignore[reportCallIssue]
        again = _packed(module(*rebuilt)) if _close(rebuilt, inputs, atol) else ()
    _warn_of_zeros(inputs, "inputs")
    _warn_of_zeros(outputs, "outputs")
    if not (again and _close(again, outputs, atol)):
        return False
    _warn_of_sharing(inputs, outputs)
    _warn_of_sharing(outputs, rebuilt)
    return True


def _shapes(given: Any) -> list[tuple[int, ...]]:
    several = given if isinstance(given, (tuple, list)) and not _is_shape(given) else (given,)
    if not all(map(_is_shape, several)):
        raise ValueError(f"test_input_shape is {given!r}: expected a tuple of ints, or a tuple of such tuples")
    return [tuple(shape) for shape in several]


def _is_shape(given: Any) -> bool:
    return isinstance(given, (tuple, list)) and all(isinstance(size, int) for size in given)


def _uniform(module: nn.Module, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in module.parameters()), None)
    return tuple(torch.rand(shape, generator=generator, dtype=dtype, device="cpu").to(device) for shape in shapes)


def _packed(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def _close(found: Sequence[Tensor], expected: Sequence[Tensor], atol: float) -> bool:
    same = [a.shape for a in found] == [b.shape for b in expected]
    return same and all(torch.allclose(a, b, atol=atol) for a, b in zip(found, expected, strict=True))


def _warn_of_zeros(tensors: Sequence[Tensor], what: str) -> None:
    if not all(tensor.any() for tensor in tensors):
        warnings.warn(f"some {what} are all zeros: another random_seed tells more", stacklevel=3)


def _warn_of_sharing(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    ids = [id(tensor) for tensor in outputs]
    if len(set(ids)) < len(ids):
        warnings.warn("some outputs are the same tensor", stacklevel=3)
    if set(ids) & {id(tensor) for tensor in inputs}:
        warnings.warn("some outputs are inputs: such a function frees nothing", stacklevel=3)
