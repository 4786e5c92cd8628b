"""`ActNorm`: a scale and a shift for each channel that start from the first batch, on one process or on many.

NOTE [Start] The first batch sets scale and shift once, for all.

1.  *All ranks start alike.* The statistics are those of the union of the ranks' batches, and what comes of them is sent
    by the first rank. Every rank has to make the call, as with `torch.nn.SyncBatchNorm`.
2.  *The flag is a buffer*, so that it goes where parameters go: state dicts, DDP's broadcast, averaged models. A state
    dict that has no flag, but scale and shift, is an older one: it counts as started unless all of them are 0. One that
    has neither changes nothing.
3.  *The flag is read from the device once*; that it is set is then known of this buffer. Another one in its slot, as
    under `torch.func.functional_call`, is read as well, and so is this one after a load.
4.  *A first batch with one value in each channel* tells no scale: the module waits for the next one. One with NaN or
    infinity anywhere, on any rank, raises on all of them, and sets nothing: it would stay for good.
5.  *Below a transform, and in eval, nothing starts*; a call that runs again in backward finds the flag set.
6.  *Under FSDP2* a call sees gathered parameters, and what it writes into them is lost: a module has to start before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch, ops
from ..core.op import Invertible, Pair
from ..errors import DomainError, OptionError
from ..ops.normalisation import check_channels, start_of
from ..ops.shape import check_size
from .lowered import Layer


class ActNorm(Layer):
    r"""A scale and a shift for each channel, which start so that the first batch has mean 0 and variance 1.

    The first call in training mode sets them; `initialise` sets them at any time. The variance is 1 up to rounding of
    the parameters, however small the numbers are. A channel that is constant in that batch gets scale 1: one whose
    standard deviation is at most :math:`8 \epsilon_{dtype} |mean|`, or below the smallest normal number. The dtype is
    that of the batch, and at least float32. Where `torch.distributed` is initialised, the batch is that of all ranks
    together, and all of them have to make the call.

    Args:
        num_features: The number of channels.
        dim: Their dimension.
        device: Of the parameters.
        dtype: Of the parameters.
        process_group: The ranks that share a batch; all by default.

    Attributes:
        initialised: Whether the first batch has been seen; set it to start from 1 and 0 instead. It is the buffer
            ``started``, so that a state dict tells it. One without the module's keys does not change it.

    Raises:
        DomainError: When the first batch, on any rank, has NaN or infinity: all ranks raise, and nothing is set. A
            compiled call can not raise, and leaves the channels where it is at scale 1 and shift 0.

    Limits:
        Under FSDP2 a call writes into gathered parameters, which are dropped: call `initialise`, or the model, before
        ``fully_shard``. `fully_shard_blocks` checks that.

        A first batch with one value in each channel tells no scale: the module waits for the next one. An average of
        models (EMA) that starts before the first batch averages the 0 that parameters had before it. On a device the
        module waits until it has learned that it has started: in its first call, and in each one before that.

    Example:
        >>> import torch, invfunc as inv
        >>> layer = inv.nn.ActNorm(1)
        >>> layer(torch.tensor([[1.0], [3.0]])).round(decimals=4)
        tensor([[-1.],
                [ 1.]], grad_fn=<RoundBackward1>)

    Source:
        Kingma and Dhariwal, Glow (2018).
    """

    started: Tensor

    def __init__(
        self, num_features: int, dim: int = 1, device: Any = None, dtype: Any = None, *, process_group: Any = None
    ) -> None:
        super().__init__()
        self.num_features, self.dim, self.process_group = num_features, dim, process_group
        self.log_scale = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("started", torch.zeros((), dtype=torch.long, device=device))  # a bool can not be averaged
        self._set_flag: Tensor | None = None  # rule 3 of NOTE [Start]

    @property
    def initialised(self) -> bool:
        """Whether scale and shift are set."""
        flag = self.started
        if torch.compiler.is_exporting():  # what is in the slot stands for the flag
            return self._set_flag is not None
        is_known = self._set_flag is flag
        if not (is_known or _torch.active() or torch.compiler.is_compiling() or _has_no_data(flag)) and flag:
            self._set_flag = flag
        return self._set_flag is flag

    @initialised.setter
    def initialised(self, value: bool) -> None:
        with torch.no_grad():
            self.started.fill_(value)
        self._set_flag = self.started if value else None

    def initialise(self, x: Tensor) -> None:
        """Set scale and shift so that this batch gets mean 0 and variance 1.

        Args:
            x: The batch, as it arrives at the module; that of this rank, where there are several.

        Raises:
            DomainError: When a value of the batch, or of its statistics, is not finite; nothing is set then.
        """
        self._check(x)
        self._start(x, torch.zeros_like(self.started))

    @torch.no_grad()
    def _start(self, x: Tensor, has_started: Tensor) -> None:
        """`initialise` of a batch that is checked, unless that is done: a graph does not know it while it is traced."""
        found = start_of(x, self.dim, self.log_scale.dtype, partial(_total, self.process_group))
        found = [_of_first_rank(self.process_group, value) for value in found]
        for parameter, value in zip((self.log_scale, self.bias), _finite(found), strict=True):
            start = torch.where(has_started > 0, parameter, value)
            if torch.compiler.is_compiling() or not torch.equal(parameter, start):  # a first batch may run again
                parameter.copy_(start)
        self.initialised = True

    def _check(self, x: Any) -> None:
        """Raise unless x is a batch that the module can start from."""
        check_channels(x, self.dim)
        check_size("ActNorm", x, self.dim, self.num_features)

    def make(self) -> Invertible:
        op = ops.actnorm(self.log_scale, self.bias, self.dim)
        assert isinstance(op, Pair)
        return op if self.initialised else replace(op, forward_fn=_Initialising(self, op.forward_fn))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Rule 2 of NOTE [Start]."""
        flag, parameters = f"{prefix}started", [state_dict.get(f"{prefix}{name}") for name in ("log_scale", "bias")]
        is_whole = all([tensor is not None for tensor in parameters])
        if flag in state_dict and not is_whole:
            state_dict = {name: value for name, value in state_dict.items() if name != flag}
        if flag not in state_dict and is_whole:
            has_started = any([bool((tensor != 0).any()) for tensor in parameters])
            state_dict = {**state_dict, flag: torch.tensor(int(has_started), device=parameters[0].device)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._set_flag = None

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(filter(None, [f"{self.num_features}, dim={self.dim}", super().extra_repr()]))


class _Initialising:
    """The forward function of an `ActNorm` that has not been called yet."""

    def __init__(self, module: ActNorm, fn: Callable[..., Any]) -> None:
        self.module, self.fn = module, fn

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The op's function."""
        return (self.fn,)

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        if module.training and not module.initialised:
            module._check(x)
            if not (_torch.active() or _has_no_data(x)):
                self._start(x)
        return self.fn(x)

    def _start(self, x: Tensor) -> None:
        module = self.module
        if torch.compiler.is_exporting():
            _refuse_first_batch()
        with _torch.untraced():
            if _values(module.process_group, x, module.dim) > 1:
                module._start(x, module.started)


@_torch.called_not_traced
def _refuse_first_batch() -> None:
    raise OptionError(
        "ActNorm: exported in training mode before its first batch, of which an example tells nothing",
        expected="a scale and a shift that are set",
        cure="call the module, or its initialise, on a batch first",
    )


def _finite(found: Sequence[Tensor]) -> list[Tensor]:
    """A scale and a shift, if they are finite; a graph can not ask, and leaves a channel where they are not as it was.

    Raises:
        DomainError: When they are not, outside of a graph.
    """
    is_bad = ~torch.stack([value.isfinite() for value in found]).all(0)
    if not torch.compiler.is_compiling() and is_bad.any():
        raise DomainError(
            "ActNorm: the first batch",
            expected="statistics that are finite",
            got=f"NaN or infinity in channels {is_bad.nonzero().flatten().tolist()}",
            cure="mend what comes before; or call initialise on another batch",
        )
    return [value.masked_fill(is_bad, 0) for value in found]


def _has_no_data(tensor: Tensor) -> bool:
    return tensor.is_meta or (not torch.compiler.is_compiling() and _torch.on_fake_tensors())


# ---- ranks: rule 1 of NOTE [Start] -----------------------------------------------------------------------------------


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _total(group: Any, tensor: Tensor) -> Tensor:
    """The sum over the ranks of a group."""
    if _has_ranks():
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def _of_first_rank(group: Any, tensor: Tensor) -> Tensor:
    """What the first rank of a group has: a sum may be rounded in another order elsewhere."""
    if _has_ranks():
        tensor = tensor.contiguous()
        first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast(tensor, first, group=group)
    return tensor


def _values(group: Any, x: Tensor, dim: int) -> float:
    """How many values there are in each channel, over all ranks."""
    count = x.numel() // max(x.shape[dim], 1)
    return _total(group, torch.tensor(float(count), device=x.device)).item() if _has_ranks() else count
