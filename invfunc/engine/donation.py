"""Donation: the storage of a pipeline's input is freed, too, until backward rebuilds it.

NOTE [Donation] A donated tensor must never be read while it is empty, and C++ would read a null pointer.

1.  Its Python object is given another implementation meanwhile, an empty one that raises in every dispatch; its own
    waits in the `Donation`, with its place in the graph, its hooks and its version.
2.  Nothing else may hold it, then: not Python (counted on the storage), not C++ (counted on the tensor), nor the
    pipeline itself (counted again when it has run).
3.  One holder is let in, the node that made the tensor, so that a ReLU may come before: it runs after the head, where
    the tensor is back; should it be reached by another way, it raises.
4.  That node compares with zero what it saved, and what comes back is rounded: a zero that returns as 1e-17 would
    open the ReLU. So the signs of such a tensor are kept, one bit for each element.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..core.packing import pack_bits, unpack_bits
from ..errors import DonatedError
from ..wires import Wire, is_differentiable, leaves, map_wire
from .trunk import is_tail, kept_by_tail, tell_tail


class Donated(Tensor):
    """What a donated tensor is while its storage is empty: reading it raises, and only its description is shown."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Donated:
        return _torch.make_wrapper(cls, like.shape, dtype=like.dtype, device=torch.device("meta"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.storage, Tensor.untyped_storage):  # whether it is empty may be asked
            return func(torch.empty(0))
        raise _was_read()

    def __repr__(self, **_: Any) -> str:
        with _torch.without_torch_function():
            shape, dtype = tuple(self.shape), str(self.dtype).removeprefix("torch.")
        return f"<donated tensor of shape {shape}, {dtype}: empty until backward rebuilds it>"

    def __format__(self, spec: str) -> str:
        try:
            return format(repr(self), spec)
        except ValueError:  # what fits a number, such as ".2f", fits no description
            return repr(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _was_read()


def _was_read() -> DonatedError:
    return DonatedError(
        "a donated tensor was read",
        expected="that nobody reads it between forward and backward",
        cure="use it before the call, keep x.clone(), or leave donate=False",
    )


class Donation:
    """Frees the storage of a pipeline's inputs until backward rebuilds them; see NOTE [Donation].

    Args:
        x: The input.
        which: True for every differentiable tensor on the wire, or the places of some.

    Raises:
        DonatedError: When a tensor can not be freed, with the reason.
    """

    def __init__(self, x: Wire, which: bool | tuple[int, ...]) -> None:
        found = leaves(x)
        self.x = x
        self.trunk: Callable[[], Any] = lambda: None
        self.waiting: list[Any] = []  # the trunk, from when backward reaches it until the input is back
        self.given: list[Tensor] = []
        self.places: list[int] = []
        self.signs: list[Tensor | None] = []
        self.empty: list[tuple[Tensor, Tensor, int, list[bool]]] = []  # object, implementation, bytes, whether empty
        for place in [i for i, t in enumerate(found) if is_differentiable(t)] if which is True else which or ():
            tensor = found[place] if 0 <= place < len(found) else None
            reason = "it is there twice" if any(tensor is t for t in self.given) else why_not_donate(tensor)
            if reason or tensor is None:
                raise _refusal(place, reason or "it is None")
            self.given.append(tensor)
            self.places.append(place)

    def begin(self) -> Wire:
        """The input, behind a node that sees to it that it is rebuilt before anybody reads it."""
        linked = {id(t): out for t, out in zip(self.given, _Head.apply(self, *self.given), strict=True)}
        return map_wire(lambda leaf: linked.get(id(leaf), leaf), self.x)

    def join(self, trunk: Any) -> None:
        """Let a trunk rebuild the input.

        The head keeps the donation alive, and with it the trunk; or, if no input needs a gradient, so that there is no
        head in the graph, the trunk keeps the donation.
        """
        if any(tensor.requires_grad for tensor in self.given):
            restore, self.trunk, trunk.donation = weakref.WeakMethod(self.restore), lambda: trunk, weakref.ref(self)
            trunk.levels.restore = lambda x: (restore() or _nothing)(x)
        else:
            self.trunk, trunk.donation, trunk.levels.restore = weakref.ref(trunk), lambda: self, self.restore

    def finish(self) -> None:
        """Have the input rebuilt, where backward has not done so by itself."""
        trunk = self.trunk()
        if self.empty and trunk is not None:
            trunk.bottom()

    def reminder(self, trunk: Any) -> Callable[[], None]:
        """What rebuilds the input for its owner at the end of backward, where that had no use for it."""
        self.waiting[:] = [trunk]
        return partial(_rebuild, self.waiting)

    def free(self, y: Wire) -> None:
        """Empty the storages, unless somebody holds one after the pipeline has run."""
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(y)):
            return
        trunk = self.trunk()
        if trunk is not None and trunk.conditions.snapshot.is_lazy:  # it keeps what its first call has saved
            return
        outputs = {leaf.untyped_storage().data_ptr() for leaf in leaves(y) if isinstance(leaf, Tensor)}
        closed = {id(tensor) for tensor in trunk.levels.tensors_in_sight()} if trunk is not None else set()
        for tensor in self.given:
            if tensor.numel() and tensor.untyped_storage().data_ptr() in outputs:
                raise DonatedError("donate: the output is a view of the input", cure="leave donate=False")
            if id(tensor) in closed or why_not_donate(tensor):
                raise DonatedError(
                    "donate: the pipeline itself keeps the input",
                    expected="one that begins with what can be rebuilt, and closes over no input",
                    cure="leave donate=False, or move stored and recomputed parts, and cuts, behind the first coupling",
                )
        for tensor in self.given:
            self.signs.append(_signs(tensor))
            storage, empty, hidden = tensor.untyped_storage(), [True], Donated(tensor)
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(_raise_if, empty))
            size = storage.nbytes()
            _torch.swap_insides(tensor, hidden)
            tensor.__class__, hidden.__class__ = Donated, Tensor  # pyright: ignore[reportAttributeAccessIssue]
            storage.resize_(0)
            self.empty.append((tensor, hidden, size, empty))

    def restore(self, x: Wire) -> None:
        """Fill the same storages with the rebuilt values, at the version that others have seen."""
        if not self.empty:
            return
        rebuilt, trunk = leaves(x), self.trunk()
        values = [rebuilt[place] for place in self.places]
        for (tensor, hidden, size, empty), value, signs in zip(self.empty, values, self.signs, strict=True):
            hidden.untyped_storage().resize_(size)
            with torch.no_grad(), _torch.preserved_version(hidden):
                hidden.detach().copy_(value if signs is None else _put_signs(value, signs))
            _torch.swap_insides(tensor, hidden)
            tensor.__class__, hidden.__class__ = Tensor, Donated  # pyright: ignore[reportAttributeAccessIssue]
            empty[0] = False
            if trunk is not None and trunk.levels.probe is not None:
                tell_tail(tensor.grad_fn, trunk.levels.probe.error)
        for items in self.given, self.places, self.signs, self.empty, self.waiting:
            items.clear()
        self.x, self.trunk = None, lambda: None  # blocks below this one run while its nodes are alive


def _rebuild(waiting: list[Any]) -> None:
    for trunk in list(waiting):
        trunk.bottom()


def _nothing(x: Wire) -> None:
    pass


def _signs(tensor: Tensor) -> Tensor | None:
    """Rule 4 of NOTE [Donation]: where a tensor is positive, if its maker saved it; a tail does not compare."""
    if is_tail(tensor.grad_fn) or not tensor.is_floating_point() or not saved_by_its_maker(tensor):
        return None
    with torch.no_grad():
        return pack_bits(tensor > 0)


def _put_signs(value: Tensor, signs: Tensor) -> Tensor:
    """A rebuilt tensor, positive exactly where the original was."""
    positive = value.clamp_min(torch.finfo(value.dtype).tiny)
    return torch.where(unpack_bits(signs, value.shape), positive, value.clamp_max(0))


def _raise_if(empty: list[bool], *_: Any) -> None:
    if empty[0]:
        raise _was_read()


def _refusal(place: int, reason: str) -> DonatedError:
    return DonatedError(f"donate: input {place} can not be freed: {reason}", cure="leave it out of donate=...")


def why_not_donate(tensor: Any) -> str | None:
    """The reason why a tensor's storage must not be freed; None if it may."""
    _torch.check_donation()
    if tensor is None or not isinstance(tensor, Tensor):
        return "there is no tensor at this place of the wire"
    if type(tensor) is Donated:
        return "it has been donated already"
    if _torch.active():
        return "a torch.func transform is active"
    if tensor.grad_fn is not None and not _can_tell(tensor.grad_fn):
        return "the operation that made it has already run backward"
    if tensor.is_leaf and tensor.requires_grad:
        return "it is a leaf that requires grad, which its owner will read"
    if type(tensor) is not Tensor or not is_differentiable(tensor):
        return f"it is a {type(tensor).__name__} of {tensor.dtype}, not a plain floating-point tensor"
    storage = tensor.untyped_storage()
    if _torch.is_view(tensor) or not storage.resizable() or storage.nbytes() != tensor.numel() * tensor.element_size():
        return "it is a view, does not fill its storage, or lies in memory that is not torch's own"
    users = _torch.storage_use_count(storage) - 1 - saved_by_its_maker(tensor)
    if users > 1:
        return f"{users - 1} other tensors share its storage (views, detached aliases, or results saved for backward)"
    if _torch.use_count(tensor) > 1:
        return "an operation has saved it for backward, or a view of it is alive"
    if tensor.retains_grad and not tensor.is_leaf:
        return "its gradient is to be retained, which needs the tensor itself"
    return None


def _can_tell(node: Any) -> bool:
    """Whether a node still has what it saved: after its backward it can not tell whether that was the tensor."""
    try:
        _torch.values_saved_by(node)
        return not is_tail(node) or bool(kept_by_tail(node))
    except RuntimeError:
        return False


def saved_by_its_maker(tensor: Tensor) -> int:
    """How often the node that made a tensor has saved it: rule 3 of NOTE [Donation]."""
    saved = [*_torch.values_saved_by(tensor.grad_fn), *kept_by_tail(tensor.grad_fn)]
    pointer = tensor.untyped_storage().data_ptr()
    return sum(isinstance(s, Tensor) and s.untyped_storage().data_ptr() == pointer for s in saved)


class _Head(torch.autograd.Function):
    """``(donation, *xs) -> xs``; its backward has the values rebuilt, if that has not happened yet."""

    @staticmethod
    def forward(ctx: Any, donation: Donation, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.donation = donation
        ctx.set_materialize_grads(False)
        out = tuple([x.view_as(x) for x in xs])
        ctx.mark_non_differentiable(*[o for o, x in zip(out, xs, strict=True) if not x.requires_grad])
        return out

    @staticmethod
    def backward(ctx: Any, *gxs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.donation.finish()
        return (None, *gxs)
