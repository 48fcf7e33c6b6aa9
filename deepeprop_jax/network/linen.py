"""Flax Linen modules, unmodified, as cells."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
from flax import errors, nnx

from deepeprop_jax.network.called import MUTABLE_REMEDY, PURE_REMEDY, check_call, check_carry, first_carry, kind_of
from deepeprop_jax.network.cell import Cell, PyTree, remade
from deepeprop_jax.network.whole_model import refuse_whole_model, watched


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
    >>> params, carry = cell.init(jax.random.key(0), jax.numpy.zeros((3, 5)))
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
    name, recurrent = type(module).__name__, isinstance(module, nn.RNNCellBase)

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params_key, carry_key = jax.random.split(key)
        carry = first_carry(name, lambda shape: module.initialize_carry(carry_key, shape), x) if recurrent else ()
        # apply sees one example, so the parameters are made for one: their shapes do not depend on the batch.
        carry_1, x_1 = jax.tree.map(lambda leaf: leaf[0], (carry, x))
        with _explained(module, x_1):
            variables = module.init({"params": params_key}, *((carry_1, x_1) if recurrent else (x_1,)))
        # Linen draws dropout masks from the "params" stream in init; only apply shows that another stream is needed.
        jax.eval_shape(apply, variables, carry_1, x_1)
        return variables, carry

    def apply(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        _check_variables(name, params)
        if recurrent:
            check_carry(name, lambda shape: module.initialize_carry(jax.random.key(0), shape), carry, x)
        with _explained(module, x):
            return module.apply(params, carry, x) if recurrent else ((), module.apply(params, x))

    return remade(Cell(init, apply), linen_cell, module)


def _check_module(module: nn.Module) -> None:
    name = kind_of(module).__name__
    if inspect.isclass(module) and issubclass(module, nn.Module):
        raise TypeError(f"Seen the class {name}; needed an instance, such as {name}(...).")
    if isinstance(module, nnx.Module):
        raise TypeError(f"Seen the NNX module {name}; linen_cell takes Flax Linen modules. Use nnx_cell(module).")
    if not isinstance(module, nn.Module):
        raise TypeError(f"Seen an object of type {name}; needed an instance of a Linen module, such as nn.GRUCell(64).")
    if module.scope is not None:
        raise TypeError(
            f"Seen a bound {name}, which holds its variables; a cell takes them as an argument. With it as module, "
            f"write:\n    module, params = module.unbind()\n    network = stack(module)\n"
            f"The params of a stack are a tuple, here (params,)."
        )
    refuse_whole_model(module)
    check_call(module)


def _check_variables(name: str, variables: PyTree) -> None:
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"The params of {name} are a dict {{'params': ...}}, as its init gives it; seen {type(variables).__name__}."
        )
    extra = {key: variables[key] for key in sorted(variables) if key != "params"}
    if not extra:
        return
    leaves = jax.tree_util.tree_leaves_with_path(extra)
    paths = ", ".join("/".join(str(getattr(key, "key", key)) for key in path) for path, _ in leaves) or ", ".join(extra)
    if "params" not in variables and "batch_stats" not in variables:
        raise ValueError(
            f"{name} has the variables {paths}, but no collection 'params'. Give {{'params': ...}}, as its init gives "
            f"it. {MUTABLE_REMEDY}"
        )
    kind = "BatchNorm statistics" if "batch_stats" in extra else "variables outside the collection 'params'"
    raise ValueError(f"{name} has {kind}: {paths}. {MUTABLE_REMEDY}")


@contextlib.contextmanager
def _explained(module: nn.Module, x: PyTree) -> Iterator[None]:
    """Around a call on one example's ``x``: a whole model is refused, and a Flax error told as the user's mistake, with
    the module's name, what Flax saw, and the remedy."""
    name = type(module).__name__
    with watched(module, x):
        try:
            yield
        except (errors.FlaxError, ValueError) as error:
            seen = str(error)
            foreign = errors.ScopeParamNotFoundError | errors.ScopeParamShapeError
            mutable = (
                errors.ModifyScopeVariableError | errors.ScopeCollectionNotFound | errors.ScopeVariableNotFoundError
            )
            if isinstance(error, errors.InvalidRngError):
                text = f"{name} uses dropout, or other random numbers, inside a step: {seen}. {PURE_REMEDY}"
            elif isinstance(error, foreign) or 'from collection "params"' in seen:
                text = (
                    f"The params do not belong to {name}, or its input has another shape than at init: {seen} "
                    f"Give the params that init made for this module and this input."
                )
            elif isinstance(error, mutable):
                text = f"{name} has variables outside the collection 'params' (BatchNorm?): {seen} {MUTABLE_REMEDY}"
            elif '"deterministic"' in seen:
                text = f"{name} has an nn.Dropout that is not told whether to drop: {seen} {PURE_REMEDY}"
            elif "use_running_average" in seen:
                text = f"{name} has an nn.BatchNorm: {seen} {MUTABLE_REMEDY}"
            else:
                text = f"{name}: {seen}"
            raise ValueError(text) from error
