"""Closures: what a function finds in its cells, and the function with something else there, in a graph, too.

NOTE [Closures] A traced node gives its functions other tensors than those that they close over. Outside of a graph the
cells are read, and a function is made anew on others. In a graph Dynamo knows the cells, and hides them: it is asked by
way of its own ``comptime``, which runs plain Python on what it knows while it traces.

1.  A cell whose content stays is shared with the function that there was: ``nonlocal`` works as before.
2.  A global name can not be given another value: modules are swapped inside, and a tensor that requires grad raises.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from ..core.structure import LIBRARIES, globals_in, is_empty


def contents_of(fn: FunctionType) -> list[Any]:
    """What a function holds: what is in its cells, None for an empty one, and the defaults of its arguments."""
    if torch.compiler.is_dynamo_compiling():
        found: list[Any] = []
        _torch.at_compile_time(_read)
        return found
    cells = [None if is_empty(cell) else cell.cell_contents for cell in fn.__closure__ or ()]
    return [*cells, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]


def with_contents(fn: FunctionType, contents: list[Any]) -> FunctionType:
    """A function that holds something else; a cell whose content is the same is shared."""
    if torch.compiler.is_dynamo_compiling():
        found: list[Any] = []
        _torch.at_compile_time(_write)
        return found[0]
    cells, values = fn.__closure__ or (), iter(contents)
    closure = [
        cell if new is old else CellType(new) for cell, new, old in zip(cells, values, contents_of(fn), strict=False)
    ]
    defaults = None if fn.__defaults__ is None else tuple([next(values) for _ in fn.__defaults__])
    again = FunctionType(fn.__code__, fn.__globals__, fn.__name__, defaults, tuple(closure))
    again.__kwdefaults__ = None if fn.__kwdefaults__ is None else dict(zip(fn.__kwdefaults__, values, strict=True))
    return again


def named_by(fn: FunctionType) -> list[Any]:
    """The modules, the functions and the tensors that a function finds among its globals."""
    if torch.compiler.is_dynamo_compiling():
        found: list[Any] = []
        _torch.at_compile_time(_look_up)
        return found
    return [value for _, value in _named(fn.__code__, fn.__globals__)]


def _named(code: Any, names: dict[str, Any]) -> list[tuple[str, Any]]:
    found = globals_in(code, names).items()
    return [(name, value) for name, value in found if isinstance(value, (nn.Module, FunctionType, Tensor))]


def is_object(item: Any) -> bool:
    """Whether an item is an object of a class of the user's, which can be called, or a checkpointed function."""
    if torch.compiler.is_dynamo_compiling():
        found: list[Any] = []
        _torch.at_compile_time(_is_object)
        return found[0]
    return _is_called(item)


def _is_called(item: Any) -> bool:
    home = type(item).__module__.partition(".")[0]
    is_known = isinstance(item, (type, nn.Module, Tensor)) or is_dataclass(item)
    wraps = "__wrapped__" in getattr(item, "__dict__", ())
    is_of_user = wraps or home not in (*LIBRARIES, "builtins", "functools", "types")
    return callable(item) and not is_known and is_of_user


# ---- while Dynamo traces: the locals are those of the function above that asks ---------------------------------------


def _local(ctx: Any, name: str) -> Any:
    """What Dynamo knows of a local of the function that asks, which calls `_torch.at_compile_time`."""
    variable = ctx.get_local(name, stacklevel=1)._i_will_not_complain_if_bc_breaks_VariableTracker()
    return variable.realize()


def _tracer(ctx: Any) -> Any:
    return ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator()


def _read(ctx: Any) -> None:
    fn, tx = _local(ctx, "fn"), _tracer(ctx)
    defaults, kwdefaults = _defaults(tx, fn)
    _local(ctx, "found").items += [
        *[_content(tx, cell) for cell in _cells(tx, fn)],
        *([] if defaults is None else defaults.items),
        *([] if kwdefaults is None else kwdefaults.items.values()),
    ]


def _defaults(tx: Any, fn: Any) -> tuple[Any, Any]:
    """The defaults of a function's arguments, and of those by keyword alone."""
    if hasattr(fn, "closure"):
        return fn.defaults, fn.kwdefaults
    return tuple(
        [
            None if getattr(fn.fn, name, None) is None else fn.var_getattr(tx, name).realize()
            for name in ("__defaults__", "__kwdefaults__")
        ]
    )


def _content(tx: Any, cell: Any) -> Any:
    from torch._dynamo import variables

    if cell.pre_existing_contents is None and not tx.output.side_effects.has_pending_mutation_of_attr(
        cell, "cell_contents"
    ):
        return variables.ConstantVariable.create(None)
    content = tx.output.side_effects.load_cell(cell)
    return variables.ConstantVariable.create(None) if isinstance(content, variables.DeletedVariable) else content


def _cells(tx: Any, fn: Any) -> list[Any]:
    """The cells of a function that was made in the graph, or of one that there was before."""
    if hasattr(fn, "closure"):
        return [] if fn.closure is None else list(fn.closure.items)
    plain = getattr(fn, "fn", None)
    if not (isinstance(plain, FunctionType) and plain.__closure__):
        return []
    return [_existing_cell(tx, fn.get_source(), i, cell) for i, cell in enumerate(plain.__closure__)]


def _existing_cell(tx: Any, source: Any, index: int, cell: CellType) -> Any:
    """As Dynamo finds it when the function is called."""
    from torch._dynamo import variables
    from torch._dynamo.source import AttrSource, ClosureSource, GetItemSource

    effects = tx.output.side_effects
    if cell in effects:
        return effects[cell]
    if is_empty(cell):
        content, place = variables.DeletedVariable(), None
    elif source is None:
        content, place = variables.base.VariableTracker.build(tx, cell.cell_contents), None
    else:
        place = GetItemSource(ClosureSource(source), index)
        content = variables.base.VariableTracker.build(tx, cell.cell_contents, AttrSource(place, "cell_contents"))
    return effects.track_cell_existing(place, cell, content)


def _write(ctx: Any) -> None:
    from torch._dynamo import variables

    tx, fn, values = _tracer(ctx), _local(ctx, "fn"), iter(_local(ctx, "contents").items)
    cells: list[Any] = []
    for cell in _cells(tx, fn):
        old, new = _content(tx, cell), next(values)
        is_same = old is new or isinstance(old, variables.ConstantVariable)
        cells.append(cell if is_same else tx.output.side_effects.track_cell_new())
        if not is_same:
            tx.output.side_effects.store_cell(cells[-1], new)
    defaults, kwdefaults = _defaults(tx, fn)
    if defaults is not None:
        defaults = variables.TupleVariable([next(values) for _ in defaults.items])
    if kwdefaults is not None:
        kwdefaults = kwdefaults.clone(items=dict(zip(kwdefaults.items, values, strict=True)))
    held = defaults, kwdefaults, variables.TupleVariable(cells)
    _local(ctx, "found").items.append(variables.NestedUserFunctionVariable(*_code(tx, fn), *held))


def _code(tx: Any, fn: Any) -> tuple[Any, Any, Any]:
    """What a function is beside what it holds: name, code and globals."""
    from torch._dynamo import variables

    if hasattr(fn, "closure"):
        return fn.fn_name, fn.code, fn.f_globals
    plain = fn.fn
    name, code = [variables.base.VariableTracker.build(tx, part) for part in (plain.__qualname__, plain.__code__)]
    return name, code, plain.__globals__


def _is_object(ctx: Any) -> None:
    from torch._dynamo import variables

    item = _local(ctx, "item")
    is_user_defined = isinstance(item, variables.UserDefinedObjectVariable)
    found = is_user_defined and _is_called(item.value)
    _local(ctx, "found").items.append(variables.ConstantVariable.create(found))


def _look_up(ctx: Any) -> None:
    from torch._dynamo import variables
    from torch._dynamo.source import DictGetItemSource, GlobalSource

    tx, fn = _tracer(ctx), _local(ctx, "fn")
    if not hasattr(fn, "get_globals"):
        return
    names = fn.get_globals()
    for name, value in _named(fn.get_code(), names):
        scope = GlobalSource(tx.output.install_global_by_id("___unnamed_scope", names))
        variable = variables.base.VariableTracker.build(tx, value, DictGetItemSource(scope, name))
        _local(ctx, "found").items.append(variable)
