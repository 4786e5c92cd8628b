"""What happens between steps, and between the forward and the backward of a step: one function for each kind.

A mutation gets a world and a number that says which of its things to change; where there is none it does nothing. Both
worlds are changed alike, with the same random numbers.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .functions import seed_all
from .programs import Mutation
from .stages import SIZE, World

Slot = tuple[nn.Module, str]


def apply(world: World, mutation: Mutation, values: dict[str, Tensor] | None = None) -> None:
    """Change a world. ``values`` are the input and the output of the step that is on its way."""
    if mutation.kind in OF_VALUES:
        OF_VALUES[mutation.kind](values or {})
        return
    seed_all(mutation.seed)
    MUTATIONS[mutation.kind](world, mutation.at)


# ---- what there is to change -----------------------------------------------------------------------------------------


def slots(world: World) -> list[Slot]:
    """The places of parameters."""
    return [(m, name) for m in world.trunk.modules() for name, p in m._parameters.items() if isinstance(p, Tensor)]


def chosen(items: list[Any], at: int) -> list[Any]:
    """One of them, if there is one."""
    return [items[at % len(items)]] if items else []


def owners(world: World) -> list[nn.Module]:
    return [m for m in world.trunk.functions.modules() if m is not world.trunk.functions]


def initialised(p: Any) -> bool:
    return isinstance(p, Tensor) and not nn.parameter.is_lazy(p)


def each_slot(change: Callable[[World, nn.Module, str, Any], None]) -> Callable[[World, int], None]:
    """A mutation of one parameter in its place."""

    def run(world: World, at: int) -> None:
        for module, name in chosen(slots(world), at):
            if initialised(module._parameters[name]):
                change(world, module, name, module._parameters[name])

    return run


def each_tensor(change: Callable[[Tensor], Any]) -> Callable[[World, int], None]:
    """A mutation of one parameter, which may belong to no module."""

    def run(world: World, at: int) -> None:
        for _, tensor in chosen(world.tensors(), at):
            if initialised(tensor):
                change(tensor)

    return run


def each_module(change: Callable[[World, nn.Module], Any]) -> Callable[[World, int], None]:
    """A mutation of one module."""

    def run(world: World, at: int) -> None:
        for module in chosen(owners(world), at):
            change(world, module)

    return run


# ---- parameters ------------------------------------------------------------------------------------------------------


def replace(world: World, module: nn.Module, name: str, p: Tensor) -> None:
    setattr(module, name, nn.Parameter(p.detach() * 0.9 + 0.05 * torch.randn_like(p), p.requires_grad))


def tie(world: World, at: int) -> None:
    """One parameter in the place of another of its shape."""
    for module, name in chosen(slots(world), at):
        p: Any = module._parameters[name]
        if initialised(p):
            alike = [s for s in slots(world) if initialised(s[0]._parameters[s[1]])]
            alike = [(m, n) for m, n in alike if m._parameters[n].shape == p.shape and m is not module]
            for other, key in chosen(alike, at // 2):
                setattr(other, key, p)


def in_place_of_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A tensor that is no parameter, as an attribute."""
    del module._parameters[name]
    setattr(module, name, tensor)


def nonleaf(world: World, module: nn.Module, name: str, p: Tensor) -> None:
    base = p.detach().clone().requires_grad_()
    world.loose.append(base)
    in_place_of_parameter(module, name, base + 0.05)  # which saves nothing: its graph can be used in every step


def view_of_leaf(world: World, module: nn.Module, name: str, p: Tensor) -> None:
    base = torch.cat([p.detach().flatten(), torch.randn(2)]).requires_grad_()
    world.loose.append(base)
    in_place_of_parameter(module, name, base[: p.numel()].view(p.shape))


def view_of_data(world: World, at: int) -> None:
    """Every parameter becomes a part of one flat tensor."""
    found = [p for p in {id(t): t for _, t in world.tensors()}.values() if initialised(p) and p.is_leaf]
    flat = torch.cat([torch.zeros(0), *(p.detach().flatten() for p in found)])
    for p, part in zip(found, flat.split([p.numel() for p in found]), strict=True):
        p.data = part.view(p.shape)


def function_of_another(world: World, at: int) -> None:
    """A weight becomes, in place, a function of another."""
    weights = [t for _, t in world.tensors() if initialised(t)]
    for target in chosen(weights, at):
        alike = [t for t in weights if t.shape == target.shape and t is not target]
        for other in chosen(alike, at // 2):
            target.requires_grad_(False)
            target.mul_(0.5).add_(other)


def add_in_place(p: Tensor) -> None:
    with torch.no_grad():
        p.add_(0.05 * torch.randn_like(p))


def write_data(p: Tensor) -> None:
    p.data.mul_(0.9)


def swap_data(p: Tensor) -> None:
    p.data = p.data * 0.9


def freeze(p: Tensor) -> None:
    p.requires_grad_(False)


def thaw(p: Tensor) -> None:
    p.requires_grad_()


def freeze_all(world: World, at: int) -> None:
    for _, t in world.tensors():
        if t.is_leaf:
            t.requires_grad_(False)


def sgd(world: World, at: int) -> None:
    with torch.no_grad():
        for t in world.leaves():
            if t.grad is not None:
                t.sub_(0.01 * t.grad.clamp(-1, 1))


def zero_grad(world: World, at: int) -> None:
    for _, t in world.tensors():
        t.grad = None


def dtypes(world: World, at: int) -> None:
    """To single precision and back."""
    for owner in (world.face, world.trunk):
        if isinstance(owner, nn.Module):
            owner.float()
            owner.double()
    for t in world.loose:
        if t.is_leaf:
            t.data = t.data.float().double()


# ---- modules ---------------------------------------------------------------------------------------------------------


def set_training(world: World, training: bool) -> None:
    for owner in (world.face, world.trunk):
        if isinstance(owner, nn.Module):
            owner.train(training)


def state_dict(assign: bool) -> Callable[[World, int], None]:
    """Load another state."""

    def run(world: World, at: int) -> None:
        state = {
            name: t.clone() * 0.9 if t.is_floating_point() else t.clone()
            for name, t in world.trunk.state_dict().items()
            if initialised(t)
        }
        world.trunk.load_state_dict(state, strict=False, assign=assign)

    return run


def replace_child(world: World, module: nn.Module) -> None:
    """A copy of a child, with other weights, in its place."""
    for name, child in module._modules.items():
        if isinstance(child, nn.Linear) and not nn.parameter.is_lazy(child.weight):
            new = nn.Linear(child.in_features, child.out_features)
            setattr(module, name, new)
            return


class Smaller(nn.Module):
    """A parametrisation."""

    def forward(self, w: Tensor) -> Tensor:
        return 0.8 * w.tanh()


def linears(world: World) -> list[nn.Module]:
    return [m for m in owners(world) if isinstance(m, nn.Linear) and initialised(m._parameters.get("weight"))]


def parametrized(world: World, at: int) -> None:
    for module in chosen(linears(world), at):
        parametrize.register_parametrization(module, "weight", Smaller())


def unparametrized(world: World, at: int) -> None:
    for module in chosen([m for m in owners(world) if parametrize.is_parametrized(m)], at):
        parametrize.remove_parametrizations(module, next(iter(module.parametrizations)))


def buffer_in_place(world: World, at: int) -> None:
    for _, buffer in chosen([b for b in world.buffers() if b[1].is_floating_point()], at):
        buffer.mul_(0.9)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def scales(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 1.5 if isinstance(out, Tensor) else None


def shifts(module: nn.Module, args: Any) -> Any:
    return (args[0] + 0.1, *args[1:]) if args[0].is_floating_point() else None


def takes(module: nn.Module, args: Any, out: Any) -> None:
    """Takes an auxiliary loss."""
    if isinstance(out, Tensor):
        module.aux = out.cos().sum() / 5


def clips(module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
    return tuple(g if g is None else g * 0.5 for g in grad_in)


def doubles(g: Tensor) -> Tensor:
    return 2 * g


def hooked(world: World, handle: Any) -> None:
    world.hooks.append(handle)


def hook_tensor(world: World, at: int) -> None:
    for _, tensor in chosen([item for item in world.tensors() if item[1].requires_grad], at):
        hooked(world, tensor.register_hook(doubles))


def unhook(world: World, at: int) -> None:
    if world.hooks:
        world.hooks.pop().remove()


# ---- calls and copies ------------------------------------------------------------------------------------------------


def call_under(context: Callable[[], Any]) -> Callable[[World, int], None]:
    """Another forward, whose result nobody uses."""

    def run(world: World, at: int) -> None:
        with context():
            world(torch.randn(3, 2 * SIZE))

    return run


def become(world: World, other: World) -> None:
    """A world goes on as its copy; handles of hooks stay with the original."""
    world.__dict__.update(other.__dict__)
    world.hooks = []


def deep_copy(world: World, at: int) -> None:
    if world.copies:
        become(world, copy.deepcopy(world))


def pickled(world: World, at: int) -> None:
    if world.copies:
        become(world, pickle.loads(pickle.dumps(world)))


def copy_aside(world: World, at: int) -> None:
    """A copy that nobody uses; what can not be copied is not."""
    with suppress(Exception):
        copy.deepcopy(world.trunk)


MUTATIONS: dict[str, Callable[[World, int], None]] = {
    "freeze": each_tensor(freeze),
    "freeze_module": each_module(lambda world, m: m.requires_grad_(False)),
    "freeze_all": freeze_all,
    "thaw": each_tensor(thaw),
    "train": lambda world, at: set_training(world, True),
    "eval": lambda world, at: set_training(world, False),
    "eval_one": each_module(lambda world, m: m.eval()),
    "replace": each_slot(replace),
    "tie": tie,
    "view_of_data": view_of_data,
    "view_of_leaf": each_slot(view_of_leaf),
    "nonleaf": each_slot(nonleaf),
    "function_of_another_in_place": function_of_another,
    "add_in_place": each_tensor(add_in_place),
    "write_data": each_tensor(write_data),
    "swap_data": each_tensor(swap_data),
    "hook_scales": each_module(lambda world, m: hooked(world, m.register_forward_hook(scales))),
    "hook_before": each_module(lambda world, m: hooked(world, m.register_forward_pre_hook(shifts))),
    "hook_takes": each_module(lambda world, m: hooked(world, m.register_forward_hook(takes))),
    "hook_backward": each_module(lambda world, m: hooked(world, m.register_full_backward_hook(clips))),
    "hook_tensor": hook_tensor,
    "unhook": unhook,
    "state_dict": state_dict(assign=False),
    "state_dict_assigned": state_dict(assign=True),
    "dtypes": dtypes,
    "deepcopy": deep_copy,
    "pickle": pickled,
    "copy_aside": copy_aside,
    "sgd": sgd,
    "zero_grad": zero_grad,
    "replace_child": each_module(replace_child),
    "parametrize": parametrized,
    "unparametrize": unparametrized,
    "forward": call_under(torch.enable_grad),
    "forward_without_grad": call_under(torch.no_grad),
    "forward_in_inference": call_under(torch.inference_mode),
    "buffer_in_place": buffer_in_place,
}


def input_in_place(values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        values["x"].add_(1)


OF_VALUES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "input_in_place": lambda values: "x" in values and input_in_place(values),
    "draw": lambda values: torch.rand(3),
}
