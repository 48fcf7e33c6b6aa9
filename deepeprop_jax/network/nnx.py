"""Flax NNX modules, unmodified, as cells."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from deepeprop_jax.network.called import (
    MUTABLE_REMEDY,
    PURE_REMEDY,
    Arguments,
    arguments_of,
    check_call,
    check_carry,
    first_carry,
    kind_of,
    refuse_other_libraries,
)
from deepeprop_jax.network.cell import Cell, PyTree, Vertex, remade
from deepeprop_jax.network.whole_model import refuse_whole_model

Factory = Callable[[nnx.Rngs], nnx.Module]
Place = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class NnxStep:
    """One step of an NNX module as a pure function of its parameters: the ``apply`` of an NNX cell.

    Attributes:
      graphdef: the module without its values.
      streams: shapes of the random streams that it holds and does not draw from.
      recurrent: called with (carry, x), not with x alone.
      name: the module's class, for messages.
      module: the instance that the cell was made of; None where it was a factory.
    """

    graphdef: nnx.GraphDef
    streams: PyTree
    recurrent: bool
    name: str
    module: nnx.Module | None

    @classmethod
    def of(cls, module: nnx.Module, instance: nnx.Module | None) -> NnxStep:
        """That of a module, or of one without values, which may hold nothing but parameters that changes."""
        _check_module(module)
        graphdef, _, streams = nnx.split(module, nnx.Param, ...)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), streams)
        return cls(graphdef, shapes, isinstance(module, nnx.RNNCellBase), type(module).__name__, instance)

    def merge(self, params: nnx.State) -> nnx.Module:
        """The module with these parameters."""
        return nnx.merge(self.graphdef, params, jax.tree.map(_constant, self.streams))

    def start(self, key: jax.Array, params: nnx.State, x: PyTree) -> PyTree:
        """Its carry for a batch x."""
        if not self.recurrent:
            return ()
        module = self.merge(params)
        return first_carry(self.name, lambda shape: module.initialize_carry(shape, nnx.Rngs(key)), x)

    def __call__(self, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        if not isinstance(params, nnx.State):
            raise ValueError(
                f"The params of {self.name} are an nnx.State, as init gives it; seen {type(params).__name__}."
            )
        try:
            module = self.merge(params)
        except ValueError as error:
            raise ValueError(
                f"The params do not belong to {self.name}: {error}. Give the params that init made for this module."
            ) from error
        if self.recurrent:
            check_carry(self.name, lambda shape: module.initialize_carry(shape, nnx.Rngs(0)), carry, x)
        before = {path: value for path, (_, value) in _variables(module).items()}
        carry_t, y_t = module(carry, x) if self.recurrent else ((), module(x))
        for path, (variable, value) in _variables(module).items():
            if path not in before or value is not before[path]:
                if isinstance(variable, nnx.RngState):
                    raise ValueError(f"{self.name} draws random numbers{_at(path)} when it is called. {PURE_REMEDY}")
                raise ValueError(f"{self.name} changes its variable{_at(path)} when it is called. {MUTABLE_REMEDY}")
        return carry_t, y_t


def nnx_cell(factory: nnx.Module | Factory) -> Cell:
    """A Flax NNX module as a cell: any ``RNNCellBase``, or a feed-forward module.

        Recurrent:     carry_t, y_t = nnx.merge(graphdef, params)(carry_tm1, x_t)
        Feed-forward:  carry = (),  y_t = nnx.merge(graphdef, params)(x_t)

    An instance is split, ``nnx.split(module, nnx.Param)``, and ``init`` gives copies of the parameters that it has now,
    whatever the key; the instance is left as it is. A factory is called by ``init`` with the key's ``nnx.Rngs``, and so
    gives new parameters for each key. ``stack``, ``graph`` and ``deep_eprop`` take an instance as it is.

    *Shapes*: params are the ``nnx.State`` of the module's ``nnx.Param`` variables, exactly as
    ``nnx.split(module, nnx.Param)`` gives it. ``params_to_nnx`` writes trained ones into the instances of a network and
    ``params_from_nnx`` reads them. The carry is that of ``module.initialize_carry`` on the batched x.

    *Cost*: none; the module's own function is called as it stands, on a module merged while JAX traces.

    Args:
      factory: an instance of a module, or ``factory(rngs) -> module``.

    Raises:
      TypeError: neither of the two, or a module that is called with something else than (carry, x) for an
        ``RNNCellBase``, and x for others.
      ValueError: the module has active dropout, BatchNorm, any variables but ``nnx.Param``, or is or contains an
        ``nnx.RNN``, ``nnx.Bidirectional``, or a ``nnx.Sequential`` with a cell in it. Variables that change only when
        the module is called are refused when the cell is applied.

    >>> cell = nnx_cell(nnx.GRUCell(5, 4, rngs=nnx.Rngs(0)))
    >>> params, carry = cell.init(jax.random.key(0), jnp.zeros((3, 5)))
    >>> carry_t, y_t = cell.apply(params, carry[0], jnp.zeros(5))
    >>> carry.shape, y_t.shape
    ((3, 4), (4,))
    """
    _check_source(factory)
    if isinstance(factory, nnx.Module):
        return _instance_cell(factory)
    step = NnxStep.of(nnx.eval_shape(lambda: _build(factory, jax.random.key(0))), None)

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params_key, carry_key = jax.random.split(key)
        params = nnx.split(_build(factory, params_key), nnx.Param, ...)[1]
        return params, step.start(carry_key, params, x)

    return remade(Cell(init, step), nnx_cell, factory)


def _instance_cell(module: nnx.Module, held: nnx.State | None = None) -> Cell:
    step = NnxStep.of(module, module)
    held = own_params(module) if held is None else held

    def init(key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
        params = copied(held)  # again: a caller may donate what init gives
        return params, step.start(key, params, x)

    # Not nnx_cell(module): what init gives stays what it was, also where the instance has changed since.
    return remade(Cell(init, step), _instance_cell, module, held)


def copied(params: nnx.State) -> nnx.State:
    """Parameters in buffers of their own, which those who have the others may donate."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)


def own_params(module: nnx.Module) -> nnx.State:
    """Copies of a module's parameters; the variables of ``nnx.split`` are the module's own, and change with it."""
    return copied(nnx.split(module, nnx.Param, ...)[1])


def check_nothing_is_shared(vertices: Iterable[Vertex]) -> None:
    """A ``ValueError`` for a network whose nodes hold the same NNX variables: as nodes they would be trained apart."""
    owners: dict[int, str] = {}
    for vertex in vertices:
        step = vertex.cell.apply
        if not isinstance(step, NnxStep) or step.module is None:
            continue
        if vertex.depth is not None:
            raise ValueError(
                f"stack(cell, depth=L) makes L layers, and the instance of {step.name} has the parameters of one. "
                f"Give a factory: stack(nnx_cell(lambda rngs: {step.name}(..., rngs=rngs)), depth=L)."
            )
        own = {id(part) for _, part in nnx.iter_graph(step.module) if isinstance(part, nnx.Param)}
        for shared in own & owners.keys():
            raise ValueError(
                f"The nodes '{owners[shared]}' and '{vertex.name}' hold the same nnx.Param of {step.name}; as nodes "
                f"of a network they would be trained apart. Give each its own instance, nnx.clone(module), or put "
                f"both into one module."
            )
        owners |= dict.fromkeys(own, vertex.name)


def _build(factory: Factory, key: jax.Array) -> nnx.Module:
    try:
        module = factory(nnx.Rngs(key))
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"nnx_cell takes an NNX module, or a function factory(rngs) -> nnx.Module; called with rngs, "
            f"{getattr(factory, '__name__', type(factory).__name__)} raised: {error}"
        ) from error
    if not isinstance(module, nnx.Module):
        raise TypeError(f"The factory given to nnx_cell returned a {type(module).__name__}; needed an nnx.Module.")
    return module


def _check_source(source: nnx.Module | Factory) -> None:
    name = kind_of(source).__name__
    if isinstance(source, nnx.bridge.ToNNX):
        raise TypeError("Seen a nnx.bridge.ToNNX; give the Linen module that it was made of, e.g. stack(nn.Dense(10)).")
    if isinstance(source, nnx.Module):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(source))):
            raise ValueError(f"Seen a {name} without values, as nnx.eval_shape makes it; give it values, or a factory.")
        return
    if isinstance(source, nn.Module):
        raise TypeError(f"Seen the Flax Linen module {name}; nnx_cell takes NNX modules. Use linen_cell(module).")
    if inspect.isclass(source) and issubclass(source, nnx.Module):
        raise TypeError(
            f"Seen the class {name}; pass an instance, {name}(..., rngs=nnx.Rngs(0)), or a factory: "
            f"nnx_cell(lambda rngs: {name}(..., rngs=rngs))."
        )
    if not inspect.isroutine(source) and not isinstance(source, functools.partial | Cell):
        refuse_other_libraries(source)
    taken = arguments_of(source) if callable(source) else Arguments((), 0, ())
    if taken is not None and (len(taken.required) > 1 or taken.most == 0):
        raise TypeError(
            f"Seen an object of type {name}; needed an NNX module, or a function factory(rngs) -> nnx.Module."
        )


def _check_module(module: nnx.Module) -> None:
    name = type(module).__name__
    refuse_whole_model(module)
    check_call(module)
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Dropout) and not part.deterministic and part.rate > 0:
            raise ValueError(f"{name} has an active nnx.Dropout{_at(path)}. {PURE_REMEDY}")
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if not isinstance(variable, nnx.Param | nnx.RngState):
            kind = f"a {type(variable).__name__}" if isinstance(variable, nnx.Variable) else "an array"
            kind = "BatchNorm statistics" if isinstance(variable, nnx.BatchStat) else f"{kind} that is no nnx.Param"
            raise ValueError(f"{name} has {kind}{_at(path)}. {MUTABLE_REMEDY}")


def _at(path: Place) -> str:
    return f" at {'/'.join(str(key) for key in path)}" if path else ""


def _constant(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A value for a random stream that a module holds and never draws from."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _variables(module: nnx.Module) -> dict[Place, tuple[nnx.Variable, jax.Array]]:
    """Every variable and its value by path, but ``nnx.Intermediate``, which is what ``sow`` leaves behind."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {path: (v, v.get_raw_value()) for path, v in flat if not isinstance(v, nnx.Intermediate)}
