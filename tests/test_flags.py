"""The flags of the process that choose a kernel are those of forward while a function runs again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.backends import cuda, cudnn, mkldnn

import invfunc as inv
from invfunc import _torch
from invfunc.engine.flags import flags

BACKENDS: Any = torch.backends  # whose parts have no types, as those of the others
DNN: Any = cudnn
MATMUL: Any = cuda.matmul
ONEDNN: Any = mkldnn


def attribute(of: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(of, name), lambda value: setattr(of, name, value)


def reduction(name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Of half precision, and whether it may be split among blocks of threads."""
    split = f"{name}_split_k"
    return lambda: (getattr(MATMUL, name), getattr(MATMUL, split)), lambda value: setattr(MATMUL, name, value)


# What reads it, what writes it, and another value than the default.
PUBLIC: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "fp16 reduction": (*reduction("allow_fp16_reduced_precision_reduction"), (False, False)),
    "bf16 reduction": (*reduction("allow_bf16_reduced_precision_reduction"), (False, False)),
    "bf16 reduction, split": (*reduction("allow_bf16_reduced_precision_reduction"), (False, True)),
    "fp16 accumulation": (*attribute(MATMUL, "allow_fp16_accumulation"), True),
    "attention's reduction": (
        cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp, True
    ),
    "flash attention": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "convolutions": (*attribute(DNN, "allow_tf32"), False),
    "precision": (*attribute(BACKENDS, "fp32_precision"), "tf32"),
    "precision of cuDNN": (*attribute(DNN, "fp32_precision"), "tf32"),
    "precision of cuBLAS": (*attribute(MATMUL, "fp32_precision"), "tf32"),
    "precision of cuDNN's convolutions": (*attribute(DNN.conv, "fp32_precision"), "ieee"),
    "precision of oneDNN's matmul": (*attribute(ONEDNN.matmul, "fp32_precision"), "bf16"),
    "precision of oneDNN's convolutions": (*attribute(ONEDNN.conv, "fp32_precision"), "bf16"),
    "cuDNN": (*attribute(DNN, "enabled"), False),
    "cuDNN's determinism": (*attribute(DNN, "deterministic"), True),
    "oneDNN": (*attribute(ONEDNN, "enabled"), False),
    "oneDNN's determinism": (*attribute(ONEDNN, "deterministic"), True),
    "attention's short way": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
}  # fmt: skip


# Pairs of names of torch that choose no kernel, or none of a function that has a gradient.
OTHERS = """
    autograd_fallback_mode backcompat_broadcast_warn backcompat_keepdim_warn cublas_allow_tf32 cudnn_allow_tf32
    deterministic_algorithms dispatch_mode dtensor_allow_implicit_replication float32_matmul_precision
    graph_exec_group graph_executor_optimize math_sdp_allow_fp16_bf16_reduction qengine tensor_metadata thread_name torch_function_state tracing_state
    value_trace warnAlways
"""


@contextmanager
def other(name: str) -> Iterator[None]:
    """A flag has another value inside."""
    read, write, value = PUBLIC[name]
    before = read()
    assert before != value
    write(value)
    try:
        yield
    finally:
        write(before)
        if name == "matmul precision":  # it has written what the newer names say, too
            MATMUL.fp32_precision = ONEDNN.matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_flag_is_that_of_forward(name: str) -> None:
    read, _, value = PUBLIC[name]
    before, seen = flags(), list[Any]()

    def fn(x: Tensor) -> Tensor:
        seen.append(read())
        return x.sin().sin()

    op = inv.checkpoint(inv.chain(inv.split(2), inv.couple(fn), inv.concat(2)))
    with other(name):
        y = op(torch.rand(2, 4, requires_grad=True))
    assert flags() == before
    y.sum().backward()
    assert seen == [value] * 2 and flags() == before


def test_what_follows_a_wider_precision_goes_on_to_follow_it() -> None:
    assert MATMUL.fp32_precision == BACKENDS.fp32_precision == "none"
    with other("precision"):
        y = inv.checkpoint(lambda x: x.sin().sin())(torch.rand(2, requires_grad=True))
    y.sum().backward()
    with other("precision"):
        assert MATMUL.fp32_precision == "tf32"
    assert MATMUL.fp32_precision == "none"


def test_a_precision_without_an_older_name_is_that_of_forward() -> None:
    seen = list[Any]()
    op = inv.checkpoint(lambda x: seen.append(MATMUL.fp32_precision) or x.sin().sin())
    with other("precision of cuBLAS"):
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        y = op(torch.rand(2, requires_grad=True))
    with other("matmul precision"):
        before = flags()
        y.sum().backward()
        assert flags() == before
    assert seen == ["tf32", "tf32"]


# ---- what torch has -------------------------------------------------------------------------------------------------


def names_of_torch() -> set[str]:
    """Of pairs of a reader and a writer."""
    known = dir(torch._C)
    return {name[5:] for name in known if name.startswith("_get_") and f"_set_{name[5:]}" in known}


def test_every_flag_of_torch_travels_or_chooses_no_kernel() -> None:
    assert names_of_torch() - {read[5:] for read, _ in _torch.KERNEL_FLAGS} <= set(OTHERS.split())


@pytest.mark.parametrize("names", [pair for pair in _torch.KERNEL_FLAGS if hasattr(torch._C, pair[0])])
def test_a_flag_that_is_written_as_it_is_changes_nothing(names: tuple[str, str]) -> None:
    before = flags()
    ((read, write),) = _torch.flags_of([names]).items()
    if names[0] != "_get_onednn_allow_tf32":  # which is None but on XPU, and not to be written there
        write(read())
    assert flags() == before


def test_a_flag_that_torch_does_not_have_is_left_out() -> None:
    assert _torch.flags_of([("_get_nothing", "_set_nothing"), ("_get_cudnn_enabled", "_set_nothing")]) == {}
    assert {read for read, _ in _torch.KERNEL_FLAGS if not hasattr(torch._C, read)} <= {
        "_cuda_get_cudnn_benchmark_limit", "_get_cudnn_depthwise_kernel"
    }  # fmt: skip
