"""Flax Linen modules, unmodified, as cells."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors, nnx

from deepeprop_jax.network.arguments import check_module_carry
from deepeprop_jax.network.cell import Cell, PyTree, remade
from deepeprop_jax.network.module_call import check_call
from deepeprop_jax.network.whole_model import refuse_whole_model, watched

DROPOUT_REMEDY = (
    "The output of a cell must be a function of (params, carry, x) alone, or its traces would belong to another "
    "sample. Build the module with rate=0 or deterministic=True, or draw the mask outside and feed it in as part of x."
)
MUTABLE_REMEDY = (
    "A cell has parameters and a carry, and nothing else that changes. Replace BatchNorm by LayerNorm or GroupNorm, "
    "keep other state in the carry, and pass constants to the module as attributes."
)


def linen_cell(module: nn.Module) -> Cell:
    """A Flax Linen module as a cell: any ``RNNCellBase``, or a feed-forward module.

    Recurrent:     carry_t, y_t = module.apply(params, carry_tm1, x_t)
    Feed-forward:  carry = (),  y_t = module.apply(params, x_t)

    *Shapes*: params are the module's own variables ``{"params": ...}``, exactly as ``module.init`` gives them. The
    carry is that of ``module.initialize_carry`` on the batched x.

    *Cost*: none; the module's own function is called as it stands.

    Args:
      module: an instance, e.g. ``nn.GRUCell(features=64)`` or ``nn.Dense(10)``.

    Returns:
      The cell. Its functions raise a ``ValueError`` that names the module for dropout, for BatchNorm and any other
      collection than "params", and for parameters of another module.

    Raises:
      TypeError: ``module`` is not an instance of a Linen module, is bound to variables, or is called with something
        else than (carry, x) for an ``RNNCellBase``, and x for others.
      ValueError: ``module`` is or contains ``nn.RNN`` or ``nn.Bidirectional``, which take whole sequences, or a
        ``nn.Sequential`` with a cell in it. If it makes them only when it is called, the cell's functions raise it. (A
        module that runs an RNN over an axis of one step's x is a ``Cell(init, apply)`` by hand.)

    >>> cell = linen_cell(nn.GRUCell(features=4))
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> list(params), carry.shape
    (['params'], (3, 4))
    """
    _check_module(module)
    # Modules that are equal give one cell, so that the layers of a deep network are analysed once. 1 equals True.
    kinds = tuple(type(getattr(module, field.name)) for field in dataclasses.fields(module))
    try:
        hash(module)
    except TypeError:
        return _cell_of.__wrapped__(module, kinds)
    return _cell_of(module, kinds)


@functools.lru_cache(maxsize=64)
def _cell_of(module: nn.Module, kinds: tuple[type, ...]) -> Cell:
    """The cell; ``kinds`` tells apart modules whose attributes are equal but not of one type."""
    recurrent = isinstance(module, nn.RNNCellBase)

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params_key, carry_key = jax.random.split(key)
        carry = _initialize_carry(module, carry_key, x) if recurrent else ()
        # apply sees one example, so the parameters are made for one: their shapes do not depend on the batch.
        carry_1, x_1 = jax.tree.map(lambda leaf: leaf[0], (carry, x))
        with watched(module, x_1):
            try:
                variables = module.init({"params": params_key}, *((carry_1, x_1) if recurrent else (x_1,)))
            except (errors.FlaxError, ValueError) as error:
                raise _explained(module, error) from error
        # Linen draws dropout masks from the "params" stream in init; only apply shows that another stream is needed.
        jax.eval_shape(apply, variables, carry_1, x_1)
        return variables, carry

    def initialise(shape: PyTree) -> PyTree:
        return module.initialize_carry(jax.random.key(0), shape)

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        _check_variables(module, params)
        if recurrent:
            check_module_carry(type(module).__name__, initialise, carry, x)
        with watched(module, x):
            try:
                if recurrent:
                    return module.apply(params, carry, x)
                return (), module.apply(params, x)
            except (errors.FlaxError, ValueError) as error:
                raise _explained(module, error) from error

    return remade(Cell(init, apply), linen_cell, module)


def _check_module(module: Any) -> None:
    name = module.__name__ if inspect.isclass(module) else type(module).__name__
    if inspect.isclass(module) and issubclass(module, nn.Module):
        raise TypeError(f"Seen the class {name}; needed an instance, such as {name}(...).")
    if isinstance(module, nnx.Module):
        raise TypeError(f"Seen the NNX module {name}; linen_cell takes Flax Linen modules. Use nnx_cell(module).")
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"Seen an object of type {name}; needed an instance of a Flax Linen module, such as "
            f"nn.GRUCell(features=64)."
        )
    if module.scope is not None:
        raise TypeError(
            f"Seen a bound {name}, which holds its variables; a cell takes them as an argument. With it as module, "
            f"write:\n    module, params = module.unbind()\n    network = stack(module)\n"
            f"The params of a stack are a tuple, here (params,)."
        )
    refuse_whole_model(module)
    check_call(module)


def _initialize_carry(module: nn.RNNCellBase, key: jax.Array, x: PyTree) -> PyTree:
    shape = jax.tree.map(jnp.shape, x)
    carry = module.initialize_carry(key, shape)
    batch = jax.tree.leaves(x)[0].shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != batch:
            raise ValueError(
                f"{type(module).__name__}.initialize_carry gave a carry{jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(leaf)} for an input of shape {shape}; its leading axis must be the batch, of size {batch}."
            )
    return carry


def _check_variables(module: nn.Module, variables: PyTree) -> None:
    name = type(module).__name__
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"The params of {name} are a dict {{'params': ...}}, as its init gives it; seen {type(variables).__name__}."
        )
    extra = sorted(key for key in variables if key != "params")
    if not extra:
        return
    leaves = jax.tree_util.tree_leaves_with_path({key: variables[key] for key in extra})
    paths = ", ".join("/".join(str(getattr(key, "key", key)) for key in path) for path, _ in leaves) or ", ".join(extra)
    if "params" not in variables and "batch_stats" not in variables:
        raise ValueError(
            f"{name} has the variables {paths}, but no collection 'params'. Give {{'params': ...}}, as its init gives "
            f"it. {MUTABLE_REMEDY}"
        )
    kind = "BatchNorm statistics" if "batch_stats" in extra else "variables outside the collection 'params'"
    raise ValueError(f"{name} has {kind}: {paths}. {MUTABLE_REMEDY}")


def _explained(module: nn.Module, error: Exception) -> ValueError:
    """A Flax error as the user's mistake: the module's name, what Flax saw, and the remedy."""
    name, seen = type(module).__name__, str(error)
    if isinstance(error, errors.InvalidRngError):
        return ValueError(f"{name} uses dropout, or other random numbers, inside a step: {seen}. {DROPOUT_REMEDY}")
    foreign = errors.ScopeParamNotFoundError | errors.ScopeParamShapeError
    if isinstance(error, foreign) or 'from collection "params"' in seen:
        return ValueError(
            f"The params do not belong to {name}, or its input has another shape than at init: {seen} "
            f"Give the params that init made for this module and this input."
        )
    mutable = errors.ModifyScopeVariableError | errors.ScopeCollectionNotFound | errors.ScopeVariableNotFoundError
    if isinstance(error, mutable):
        return ValueError(f"{name} has variables outside the collection 'params' (BatchNorm?): {seen} {MUTABLE_REMEDY}")
    if '"deterministic"' in seen:
        return ValueError(f"{name} has an nn.Dropout that is not told whether to drop: {seen} {DROPOUT_REMEDY}")
    if "use_running_average" in seen:
        return ValueError(f"{name} has an nn.BatchNorm: {seen} {MUTABLE_REMEDY}")
    return ValueError(f"{name}: {seen}")
