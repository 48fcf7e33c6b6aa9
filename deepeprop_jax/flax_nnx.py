"""Flax NNX modules, unmodified, as cells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from deepeprop_jax.cell import Cell, PyTree, remade
from deepeprop_jax.checks import check_module_carry

DROPOUT_REMEDY = (
    "The output of a cell must be a function of (params, carry, x) alone, or its traces would belong to another "
    "sample. Build it with rate=0 or deterministic=True, or draw the mask outside and feed it in as part of x."
)
MUTABLE_REMEDY = (
    "A cell has parameters (nnx.Param) and a carry, and nothing else that changes. Replace BatchNorm by LayerNorm or "
    "GroupNorm, keep other state in the carry, and constants in a closure or as NumPy arrays."
)


def nnx_cell(factory: Callable[[nnx.Rngs], nnx.Module]) -> Cell:
    """A Flax NNX module as a cell: any ``RNNCellBase``, or a feed-forward module.

    Recurrent:     carry_t, y_t = nnx.merge(graphdef, params)(carry_tm1, x_t)
    Feed-forward:  carry = (),  y_t = nnx.merge(graphdef, params)(x_t)

    *Shapes*: params are the ``nnx.State`` of the module's ``nnx.Param`` variables, exactly as
    ``nnx.split(module, nnx.Param)`` gives it, and ``nnx.update(module, params)`` brings trained ones back. The carry is
    that of ``module.initialize_carry`` on the batched x.

    *Cost*: none; the module's own function is called as it stands, on a module merged while JAX traces.

    Args:
      factory: ``factory(rngs) -> module``. An NNX module owns its parameters and a cell takes them as an argument, so
        the cell needs to know how to make one.

    Returns:
      The cell.

    Raises:
      TypeError: ``factory`` is a module, a class, or does not return an NNX module.
      ValueError: the module has active dropout, BatchNorm, any variables but ``nnx.Param``, or is an ``nnx.RNN``.
        Variables that change only when the module is called are refused when the cell is applied.

    >>> cell = nnx_cell(lambda rngs: nnx.GRUCell(5, 4, rngs=rngs))
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry_t, y_t = cell.apply(params, carry[0], jnp.zeros(5))
    >>> carry.shape, y_t.shape
    ((3, 4), (4,))
    """
    _check_factory(factory)
    abstract = nnx.eval_shape(lambda: _build(factory, jax.random.key(0)))
    _check_module(abstract)
    graphdef, _, streams = nnx.split(abstract, nnx.Param, ...)
    recurrent = isinstance(abstract, nnx.RNNCellBase)
    name = type(abstract).__name__

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params_key, carry_key = jax.random.split(key)
        module = _build(factory, params_key)
        carry = _initialize_carry(module, carry_key, x) if recurrent else ()
        return nnx.split(module, nnx.Param, ...)[1], carry

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        if not isinstance(params, nnx.State):
            raise ValueError(f"The params of {name} are an nnx.State, as init gives it; seen {type(params).__name__}.")
        try:
            module = nnx.merge(graphdef, params, jax.tree.map(_constant, streams))
        except ValueError as error:
            raise ValueError(
                f"The params do not belong to {name}: {error}. Give the params that init made for this module."
            ) from error
        if recurrent:
            check_module_carry(name, lambda shape: module.initialize_carry(shape, nnx.Rngs(0)), carry, x)
        before = _variables(module)
        carry_t, y_t = module(carry, x) if recurrent else ((), module(x))
        _check_unchanged(before, module)
        return carry_t, y_t

    return remade(Cell(init, apply), nnx_cell, factory)


def _build(factory: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.Module:
    module = factory(nnx.Rngs(key))
    if not isinstance(module, nnx.Module):
        raise TypeError(f"The factory given to nnx_cell returned a {type(module).__name__}; needed an nnx.Module.")
    return module


def _check_factory(factory: Any) -> None:
    name = factory.__name__ if inspect.isclass(factory) else type(factory).__name__
    if isinstance(factory, nnx.Module):
        raise TypeError(
            f"Seen an instance of {name}, which owns its parameters; a cell takes them as an argument. "
            f"Pass a factory: nnx_cell(lambda rngs: {name}(..., rngs=rngs))."
        )
    if isinstance(factory, nn.Module):
        raise TypeError(f"Seen the Flax Linen module {name}; nnx_cell makes NNX modules. Use linen_cell(module).")
    if inspect.isclass(factory) and issubclass(factory, nnx.Module):
        raise TypeError(f"Seen the class {name}; pass a factory: nnx_cell(lambda rngs: {name}(..., rngs=rngs)).")
    if not callable(factory):
        raise TypeError(f"Seen an object of type {name}; needed a function factory(rngs) -> nnx.Module.")


def _check_module(module: nnx.Module) -> None:
    name = type(module).__name__
    if isinstance(module, nnx.RNN | nnx.Bidirectional):
        raise ValueError(
            f"Seen {name}, which runs over a whole sequence; a cell computes one step. Make the cell inside it. "
            f"A bidirectional network needs the future: it has no online gradient."
        )
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Dropout) and not part.deterministic and part.rate > 0:
            raise ValueError(f"{name} has an active nnx.Dropout{_at(path)}. {DROPOUT_REMEDY}")
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if not isinstance(variable, nnx.Param | nnx.RngState):
            kind = f"a {type(variable).__name__}" if isinstance(variable, nnx.Variable) else "an array"
            kind = "BatchNorm statistics" if isinstance(variable, nnx.BatchStat) else f"{kind} that is no nnx.Param"
            raise ValueError(f"{name} has {kind}{_at(path)}. {MUTABLE_REMEDY}")


def _at(path: tuple[Any, ...]) -> str:
    return f" at {'/'.join(str(key) for key in path)}" if path else ""


def _initialize_carry(module: nnx.RNNCellBase, key: jax.Array, x: PyTree) -> PyTree:
    shape = jax.tree.map(jnp.shape, x)
    carry = module.initialize_carry(shape, nnx.Rngs(key))
    batch = jax.tree.leaves(x)[0].shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != batch:
            raise ValueError(
                f"{type(module).__name__}.initialize_carry gave a carry{jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(leaf)} for an input of shape {shape}; its leading axis must be the batch, of size {batch}."
            )
    return carry


def _constant(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A value for a random stream that a module holds and never draws from."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _variables(module: nnx.Module) -> dict[tuple[Any, ...], tuple[nnx.Variable, Any]]:
    """Every variable and its value by path, but ``nnx.Intermediate``, which is what ``sow`` leaves behind."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {path: (v, v.get_raw_value()) for path, v in flat if not isinstance(v, nnx.Intermediate)}


def _check_unchanged(before: dict[tuple[Any, ...], tuple[nnx.Variable, Any]], module: nnx.Module) -> None:
    for path, (variable, value) in _variables(module).items():
        if path in before and value is before[path][1]:
            continue
        name = type(module).__name__
        if isinstance(variable, nnx.RngState):
            raise ValueError(f"{name} draws random numbers{_at(path)} when it is called. {DROPOUT_REMEDY}")
        raise ValueError(f"{name} changes its variable{_at(path)} when it is called. {MUTABLE_REMEDY}")
