"""Models that run over whole sequences: found, and taken apart into the steps that a network is built of."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

RNN = (nn.RNN, nnx.RNN)
BIDIRECTIONAL = (nn.Bidirectional, nnx.Bidirectional)
CELL = (nn.RNNCellBase, nnx.RNNCellBase)
SEQUENTIAL = (nn.Sequential, nnx.Sequential)
MODULE = (nn.Module, nnx.Module)


def refuse_whole_model(module: Any) -> None:
    """Raise a ``ValueError`` if a module holds an RNN, or a Sequential with a cell in it, with the lines to write.

    A Linen module that makes its parts when it is called shows them only there: ``watched``.
    """
    found = next(_whole_parts(module, "module"), None)
    if found is not None:
        place, part = found
        here = "" if place == "module" else f", which contains {type(part).__name__} at {place}"
        raise ValueError(
            _message(f"{type(module).__name__}{here}", part, list(dict.fromkeys(_steps(module, "module"))))
        )


def _message(seen: str, part: Any, steps: list[str], note: str = "") -> str:
    if isinstance(part, SEQUENTIAL):
        why = "a Sequential calls a recurrent cell with its input alone, and a cell is called with (carry, x)"
    else:
        why = "it runs over a whole sequence, and a network computes one step"
    lines = f"Seen {seen}: {why}. Build the network of the steps, with the module given as module:\n"
    lines += f"    network = stack({', '.join(steps)})\n"
    lines += (
        "in the order in which the module calls them; functions between them, such as nn.relu, are layers of the stack "
        "too. "
    )
    if isinstance(part, nnx.Module):
        lines += "The parameters come along, and params_to_nnx writes them back."
    else:
        lines += "params_from_linen brings trained parameters over, params_to_linen back."
    if not isinstance(part, SEQUENTIAL):
        lines += " If the sequence lies inside one step's x, write a Cell(init, apply) by hand."
    if isinstance(part, BIDIRECTIONAL) or getattr(part, "reverse", False):
        lines += (
            " What runs backward in time needs the future: it has no online gradient, and only forward steps count."
        )
    return lines + note


def _children(module: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The parts that a module holds in its attributes, also in lists and dicts, and the expressions that give them."""
    if isinstance(module, nn.Module):
        held = {f.name: getattr(module, f.name, None) for f in dataclasses.fields(module) if f.name != "parent"}
    else:
        held = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    for name, value in held.items():
        yield from _held(value, f"{place}.{name}")


def _held(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple | nnx.List):
        for index, part in enumerate(value):
            yield from _held(part, f"{place}[{index}]")
    elif isinstance(value, dict | nnx.Dict):
        for key, part in value.items():
            yield from _held(part, f"{place}[{key!r}]")
    elif callable(value):
        yield place, value


def _whole_parts(module: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(module, RNN + BIDIRECTIONAL):
        yield place, module
        return
    if not isinstance(module, MODULE):
        return
    for child_place, child in _children(module, place):
        if isinstance(module, SEQUENTIAL) and isinstance(child, CELL):
            yield place, module
        yield from _whole_parts(child, child_place)


def _steps(module: Any, place: str) -> Iterator[str]:
    """The expressions of the steps that a module is made of, in the order in which it holds them."""
    if isinstance(module, BIDIRECTIONAL):
        yield f"{place}.forward_rnn.cell"
    elif isinstance(module, RNN):
        yield f"{place}.cell"
    elif next(_whole_parts(module, place), None) is None:
        yield place
    else:
        inside = [part.cell for _, part in _whole_parts(module, place) if isinstance(part, RNN)]
        for child_place, child in _children(module, place):
            if isinstance(module, SEQUENTIAL) or (isinstance(child, MODULE) and not any(child is c for c in inside)):
                yield from _steps(child, child_place)


class _Inside(Exception):
    """A Linen module calls an RNN, or a cell with its input alone."""

    def __init__(self, part: nn.Module):
        super().__init__(type(part).__name__)
        self.part = part


def _is_whole(context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if context.method_name != "__call__":
        return False
    if isinstance(context.module, nn.RNN | nn.Bidirectional):
        return True
    return isinstance(context.module, nn.RNNCellBase) and len(args) + len(kwargs) == 1


@contextlib.contextmanager
def watched(module: nn.Module, x: Any) -> Iterator[None]:
    """Around a call of a Linen module on one example's ``x``: raise a ``ValueError`` with the lines to write if the
    module turns out to call an RNN, or a cell as if it were a layer."""

    def watch(call: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        if _is_whole(context, args, kwargs):
            raise _Inside(context.module)
        return call(*args, **kwargs)

    try:
        with nn.intercept_methods(watch):
            yield
    except _Inside as inside:
        part = inside.part
        steps, complete = _called_steps(module, x)
        note = "" if complete else " (Its layers after these could not be seen.)"
        seen = f"{type(module).__name__}, which calls {type(part).__name__}"
        kind = nn.Sequential(()) if isinstance(part, nn.RNNCellBase) else part
        raise ValueError(_message(seen, kind, steps, note)) from None


def _called_steps(module: nn.Module, x: Any) -> tuple[list[str], bool]:
    """How to write the steps that a Linen module calls, each RNN replaced by one step of its cell; and whether that
    went to the end of the module's call."""
    tree: list[tuple[nn.Module, list]] = []
    open_calls = [tree]

    def watch(call: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        part = context.module
        if context.method_name != "__call__" or not part.path:
            return call(*args, **kwargs)
        if not _is_whole(context, args, kwargs):
            inner: list[tuple[nn.Module, list]] = []
            open_calls[-1].append((part, inner))
            open_calls.append(inner)
            try:
                return call(*args, **kwargs)
            finally:
                open_calls.pop()
        if isinstance(part, nn.Bidirectional):
            part = part.forward_rnn
        cell = part.cell if isinstance(part, nn.RNN) else part
        open_calls[-1].append((cell, []))
        open_calls.append([])
        carry, y = cell(cell.initialize_carry(jax.random.key(0), jnp.shape(args[0])), args[0])
        open_calls.pop()
        return (carry, y) if getattr(part, "return_carry", False) or kwargs.get("return_carry") else y

    def run(x: Any) -> Any:
        with nn.intercept_methods(watch):
            return module.init(jax.random.key(0), x)

    complete = True
    try:
        jax.eval_shape(run, x)
    except Exception:  # the model may need its sequence; what was called before tells what to write
        complete = False
    return [_written(part) for part in _flat(tree)], complete


def _flat(tree: list[tuple[nn.Module, list]]) -> Iterator[nn.Module]:
    for part, inner in tree:
        deep = any(isinstance(below, nn.RNNCellBase) for below, _ in inner) and not isinstance(part, nn.RNNCellBase)
        if deep or any(_holds_cell(rest) for _, rest in inner):
            yield from _flat(inner)
        else:
            yield part


def _holds_cell(tree: list[tuple[nn.Module, list]]) -> bool:
    return any(isinstance(part, nn.RNNCellBase) or _holds_cell(inner) for part, inner in tree)


def _written(module: Any) -> str:
    """A module as the code that makes it; a value that has no short code is written as ``...``."""
    kind = type(module)
    given = []
    for field in dataclasses.fields(kind):
        value = getattr(module, field.name, None)
        if not field.init or field.name in ("parent", "name") or value is field.default:
            continue
        if field.default_factory is dataclasses.MISSING or value != field.default_factory():
            given.append(f"{field.name}={_value(value)}")
    name = f"nn.{kind.__name__}" if getattr(nn, kind.__name__, None) is kind else kind.__name__
    return f"{name}({', '.join(given)})"


def _value(value: Any) -> str:
    if isinstance(value, nn.Module):
        return _written(value)
    name = getattr(value, "__name__", "")
    if name and getattr(nn, name, None) is value:
        return f"nn.{name}"
    items = value if isinstance(value, tuple | list) else (value,)
    plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
    return repr(value) if plain else "..."
