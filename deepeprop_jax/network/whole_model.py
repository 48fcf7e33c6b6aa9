"""Models that run over whole sequences: found, and taken apart into the steps that a network is built of."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from chex import ArrayTree
from flax import nnx

RNN = (nn.RNN, nnx.RNN)
BIDIRECTIONAL = (nn.Bidirectional, nnx.Bidirectional)
CELL = (nn.RNNCellBase, nnx.RNNCellBase)
SEQUENTIAL = (nn.Sequential, nnx.Sequential)
MODULE = (nn.Module, nnx.Module)

Place: TypeAlias = str
"""The expression that gives a part of ``module``, as module.layers[0]."""
Context: TypeAlias = "nn.module.InterceptorContext"


def refuse_whole_model(module: nn.Module | nnx.Module) -> None:
    """Raise a ``ValueError`` if a module holds an RNN, or a Sequential with a cell in it, with the lines to write.

    A Linen module that makes its parts when it is called shows them only there: ``watched``.
    """
    for place, part in _whole_parts(module, "module"):
        here = "" if place == "module" else f", which contains {type(part).__name__} at {place}"
        steps = list(dict.fromkeys(_steps(module, "module")))
        raise ValueError(_message(f"{type(module).__name__}{here}", part, isinstance(part, SEQUENTIAL), steps))


def _message(seen: str, part: nn.Module | nnx.Module, sequential: bool, steps: list[Place]) -> str:
    why = "it runs over a whole sequence, and a network computes one step"
    if sequential:
        why = "a Sequential calls a recurrent cell with its input alone, and a cell is called with (carry, x)"
    if isinstance(part, nnx.Module):
        after = "The parameters come along, and params_to_nnx writes them back."
    else:
        after = "params_from_linen brings trained parameters over, params_to_linen back."
    if not sequential:
        after += " If the sequence lies inside one step's x, write a Cell(init, apply) by hand."
    if isinstance(part, BIDIRECTIONAL) or getattr(part, "reverse", False):
        after += (
            " What runs backward in time needs the future: it has no online gradient, and only forward steps count."
        )
    return (
        f"Seen {seen}: {why}. Build the network of the steps, with the module given as module:\n"
        f"    network = stack({', '.join(steps)})\n"
        f"in the order in which the module calls them; functions between them, such as nn.relu, are layers of the "
        f"stack too. {after}"
    )


def _held(value: object, place: Place) -> Iterator[tuple[Place, Callable]]:
    """The modules and functions in a value, also in lists and dicts."""
    if isinstance(value, list | tuple | nnx.List):
        for index, part in enumerate(value):
            yield from _held(part, f"{place}[{index}]")
    elif isinstance(value, dict | nnx.Dict):
        for key, part in value.items():
            yield from _held(part, f"{place}[{key!r}]")
    elif callable(value):
        yield place, value


def _children(module: nn.Module | nnx.Module, place: Place) -> Iterator[tuple[Place, Callable]]:
    """What a module holds in its attributes."""
    if isinstance(module, nn.Module):
        names = [field.name for field in dataclasses.fields(module) if field.name != "parent"]
    else:
        names = [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        yield from _held(getattr(module, name, None), f"{place}.{name}")


def _whole_parts(module: Callable, place: Place) -> Iterator[tuple[Place, nn.Module | nnx.Module]]:
    if isinstance(module, RNN + BIDIRECTIONAL):
        yield place, module
    elif isinstance(module, MODULE):
        for child_place, child in _children(module, place):
            if isinstance(module, SEQUENTIAL) and isinstance(child, CELL):
                yield place, module
            yield from _whole_parts(child, child_place)


def _steps(module: Callable, place: Place) -> Iterator[Place]:
    """The steps that a module is made of, in the order in which it holds them."""
    inside = [part for _, part in _whole_parts(module, place)]
    if isinstance(module, BIDIRECTIONAL):
        yield f"{place}.forward_rnn.cell"
    elif isinstance(module, RNN):
        yield f"{place}.cell"
    elif not inside:
        yield place
    else:
        cells = [part.cell for part in inside if isinstance(part, RNN)]
        for child_place, child in _children(module, place):
            if isinstance(module, SEQUENTIAL) or (isinstance(child, MODULE) and not any(child is c for c in cells)):
                yield from _steps(child, child_place)


class _Inside(Exception):
    """A Linen module calls an RNN, or a cell with its input alone: the one argument."""


def _is_whole(context: Context, args: tuple, kwargs: dict) -> bool:
    if context.method_name != "__call__":
        return False
    alone = isinstance(context.module, nn.RNNCellBase) and len(args) + len(kwargs) == 1
    return alone or isinstance(context.module, nn.RNN | nn.Bidirectional)


@contextlib.contextmanager
def watched(module: nn.Module, x: ArrayTree) -> Iterator[None]:
    """Around a call of a Linen module on one example's ``x``: raise a ``ValueError`` with the lines to write if the
    module turns out to call an RNN, or a cell as if it were a layer."""

    def watch(call: Callable, args: tuple, kwargs: dict, context: Context) -> ArrayTree:
        if _is_whole(context, args, kwargs):
            raise _Inside(context.module)
        return call(*args, **kwargs)

    try:
        with nn.intercept_methods(watch):
            yield
    except _Inside as inside:
        (part,) = inside.args
        steps, note = _called_steps(module, x)
        seen = f"{type(module).__name__}, which calls {type(part).__name__}"
        raise ValueError(_message(seen, part, isinstance(part, CELL), steps) + note) from None


class _Call:
    """A module that was called, and those that it called."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.inner: list[_Call] = []

    def holds_cell(self) -> bool:
        """Whether a cell is called in it, or in what it calls."""
        return any(isinstance(call.module, nn.RNNCellBase) or call.holds_cell() for call in self.inner)

    def steps(self) -> Iterator[nn.Module]:
        """The modules to write: itself, or, where cells are called inside a module that is none, those inside."""
        deep = not isinstance(self.module, nn.RNNCellBase) or any(call.holds_cell() for call in self.inner)
        if deep and self.holds_cell():
            for call in self.inner:
                yield from call.steps()
        else:
            yield self.module


def _called_steps(module: nn.Module, x: ArrayTree) -> tuple[list[str], str]:
    """How to write the steps that a Linen module calls, each RNN replaced by one step of its cell; and a note where
    that did not go to the end of the module's call."""
    open_calls = [_Call(module)]

    def watch(call: Callable, args: tuple, kwargs: dict, context: Context) -> ArrayTree:
        part = context.module
        if context.method_name != "__call__" or not part.path:
            return call(*args, **kwargs)
        whole = _is_whole(context, args, kwargs)
        rnn = part.forward_rnn if isinstance(part, nn.Bidirectional) else part
        step = rnn.cell if isinstance(rnn, nn.RNN) else rnn
        made = _Call(step)
        open_calls[-1].inner.append(made)
        open_calls.append(_Call(step) if whole else made)  # what a cell calls is no step
        try:
            if not whole:
                return call(*args, **kwargs)
            carry, y = step(step.initialize_carry(jax.random.key(0), jnp.shape(args[0])), args[0])
            return (carry, y) if getattr(rnn, "return_carry", False) or kwargs.get("return_carry") else y
        finally:
            open_calls.pop()

    def run(x: ArrayTree) -> ArrayTree:
        with nn.intercept_methods(watch):
            return module.init(jax.random.key(0), x)

    calls, note = open_calls[0].inner, ""
    try:
        jax.eval_shape(run, x)
    except Exception:  # the model may need its sequence; what was called before tells what to write
        note = " (Its layers after these could not be seen.)"
    return [_written(step) for call in calls for step in call.steps()], note


def _written(value: object) -> str:
    """A module, or an attribute of one, as the code that makes it; ``...`` where that is not short."""
    if not isinstance(value, nn.Module):
        items = value if isinstance(value, tuple | list) else (value,)
        if all(item is None or isinstance(item, bool | int | float | str) for item in items):
            return repr(value)
        name = getattr(value, "__name__", "")
        return f"nn.{name}" if name and getattr(nn, name, None) is value else "..."
    given = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name, None)
        if not field.init or field.name in ("parent", "name") or own is field.default:
            continue
        if field.default_factory is dataclasses.MISSING or own != field.default_factory():
            given.append(f"{field.name}={_written(own)}")
    name = type(value).__name__
    return f"{'nn.' if getattr(nn, name, None) is type(value) else ''}{name}({', '.join(given)})"
