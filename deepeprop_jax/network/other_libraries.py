"""Networks of other libraries: told by what they look like, without importing them, with the lines that make a cell."""

from __future__ import annotations

import inspect
from typing import Any

from deepeprop_jax.network.cell import Cell
from deepeprop_jax.network.plain_function import arguments_of

OTHERS = {"torch": "PyTorch", "keras": "Keras", "tensorflow": "TensorFlow", "haiku": "Haiku", "penzai": "Penzai"}


def refuse_other_libraries(network: Any) -> None:
    """Raise a ``TypeError`` with the lines to write, if ``network`` is an Equinox module, a pair ``init, apply`` as
    Haiku transforms a function to, or a module of another library."""
    name = network.__name__ if inspect.isclass(network) else type(network).__name__
    libraries = _libraries(network if inspect.isclass(network) else type(network))
    if "equinox" in libraries:
        if inspect.isclass(network):
            raise TypeError(
                f"Seen the class {name} of Equinox; needed a Cell made of an instance, for which the error "
                "of that instance has the lines."
            )
        raise TypeError(
            f"Seen {name}, an Equinox module, which owns its parameters; a cell takes them as an argument. With it as "
            f"module, write:\n{_equinox_lines(network)}"
        )
    pair = [getattr(network, field, None) for field in ("init", "apply")]
    if not inspect.isclass(network) and not isinstance(network, Cell) and all(callable(part) for part in pair):
        raise TypeError(
            f"Seen an object of type {name} with init and apply, as Haiku makes it; needed a Cell. With it as module, "
            f"write, for a layer without memory, called with x:\n{_pair_lines(pair[1], False)}"
            f"or, for a function (carry, x) -> (carry, y) whose carry has n numbers:\n{_pair_lines(pair[1], True)}"
        )
    for library in libraries:
        if library in OTHERS:
            raise TypeError(
                f"Seen {name} of {OTHERS[library]}; needed a Flax module, a Cell(init, apply), or a function "
                f"(params, carry, x) -> (carry, y) of JAX arrays."
            )


def _libraries(kind: type) -> list[str]:
    return [str(getattr(base, "__module__", "")).partition(".")[0] for base in kind.__mro__]


def _equinox_lines(module: Any) -> str:
    """Equinox's own cells are called as ``cell(x, carry) -> carry``, an LSTM's carry being (h, c); a user's cell whose
    first argument is its carry is taken to give (carry, y)."""
    call = arguments_of(module)
    lines = ["params, static = eqx.partition(module, eqx.is_inexact_array)", "def step(params, carry, x):"]
    if call is not None and len(call.required) == 1:
        lines += ["    return (), eqx.combine(params, static)(x)", "network = Cell(lambda key, x: (params, ()), step)"]
        return _indented(lines)
    pair = "LSTM" in type(module).__name__
    size = "module.hidden_size" if hasattr(module, "hidden_size") else "n"
    if call is not None and call.required[:1] in (("carry",), ("state",), ("hidden",), ("h",)):
        lines += ["    return eqx.combine(params, static)(carry, x)"]
    else:
        lines += [
            "    carry = eqx.combine(params, static)(x, carry)",
            f"    return carry, carry{'[0]' if pair else ''}",
        ]
    lines += [
        "def init(key, x):",
        f"    carry = jnp.zeros((x.shape[0], {size}))",
        f"    return params, {'(carry, carry)' if pair else 'carry'}",
        "network = Cell(init, step)",
    ]
    return _indented(lines)


def _pair_lines(apply: Any, recurrent: bool) -> str:
    taken = arguments_of(apply)
    random = "None, " if taken is not None and "rng" in (*taken.required, *taken.keywords) else ""
    if not recurrent:
        lines = [
            "network = Cell(",
            "    init=lambda key, x: (module.init(key, x[0]), ()),",
            f"    apply=lambda params, carry, x: ((), module.apply(params, {random}x)),",
            ")",
        ]
        return _indented(lines)
    lines = [
        "network = Cell(",
        "    init=lambda key, x: (module.init(key, jnp.zeros(n), x[0]), jnp.zeros((x.shape[0], n))),",
        f"    apply=lambda params, carry, x: module.apply(params, {random}carry, x),",
        ")",
    ]
    return _indented(lines)


def _indented(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)
