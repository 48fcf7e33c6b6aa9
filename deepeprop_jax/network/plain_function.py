"""Plain functions as cells: a step ``(params, carry, x) -> (carry, y)``, or an activation ``x -> y``."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.network.called import Arguments, arguments_of
from deepeprop_jax.network.cell import Cell, PyTree, remade


def function_cell(function: Callable) -> Cell:
    """A plain function as a cell, told by how many arguments it needs.

    Three, ``(params, carry, x) -> (carry, y)``: a step, which brings no initialiser. One, ``x -> y``, as ``nn.relu``: a
    feed-forward node without parameters, with params ``()`` and carry ``()``. Either is written for one example. What a
    function closes over is a constant.

    Raises:
      TypeError: a function of another number of arguments, one of NumPy or of ``math``, or an object that is called
        with x alone and holds arrays, which would not be trained.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, np.ufunc) or getattr(function, "__module__", None) == "math":
        raise TypeError(f"Seen {name} of NumPy or math, which JAX cannot trace; use jax.numpy's: jnp.{name}.")
    taken = arguments_of(function)
    if isinstance(function, jnp.ufunc):  # its signature says *args
        taken = Arguments(tuple(f"x{i}" for i in range(1, function.nin + 1)), function.nin, ())
    if taken is not None:
        _check_count(name, taken)
    if taken is None or taken.most is None or len(taken.required) != 1:

        def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
            raise ValueError(
                f"The plain function {name} brings no initialiser. Make its params and carry yourself and give them to "
                f"learner.init(params, carry, x), or pass Cell(init, {name}) instead of {name}. (An activation is a "
                f"function of one argument: lambda x: {name}(x).)"
            )

        return remade(Cell(init, function), function_cell, function)
    _check_no_arrays(name, function)
    cell = Cell(lambda key, x: ((), ()), lambda params, carry, x: ((), function(x)))
    return remade(cell, function_cell, function)


def _check_count(name: str, taken: Arguments) -> None:
    seen = ", ".join(taken.required)
    if taken.keywords:
        given = ", ".join(f"{keyword}=..." for keyword in taken.keywords)
        raise TypeError(
            f"The function {name} needs the keyword arguments {', '.join(taken.keywords)}, and a network is called "
            f"without. Bind them: functools.partial({name}, {given})."
        )
    if taken.most is None or len(taken.required) == 1 or len(taken.required) <= 3 <= taken.most:
        return
    function = name if name.isidentifier() else "f"
    pair = f"If it is (carry, x) -> (carry, y), write lambda params, carry, x: {function}(carry, x). "
    raise TypeError(
        f"The function {name} takes {len(taken.required)} arguments ({seen}); needed a step (params, carry, x) -> "
        f"(carry, y), or an activation x -> y, each for one example. {pair if len(taken.required) == 2 else ''}"
        f"Bind what is constant with functools.partial; several inputs are one x: lambda x: {function}(*x), or x of a "
        f"node with a dict of parents."
    )


def _check_no_arrays(name: str, function: Callable) -> None:
    if isinstance(function, jax.tree_util.Partial) or inspect.isroutine(function):
        return
    held = getattr(function, "__dict__", {}).items()
    arrays = [key for key, value in held if any(isinstance(a, jax.Array) for a in jax.tree.leaves(value))]
    if arrays:
        raise TypeError(
            f"Seen an object of type {name} that is called with x alone and holds arrays ({', '.join(arrays)}), which "
            f"would be constants and never trained. Write Cell(init, apply), with them in params; if they are meant as "
            f"constants, lambda x: module(x)."
        )
