"""Whether a loss with one number per example is, for each, a function of that example alone.

Some are not: a centred or ranked batch, negatives out of the batch, a division by ``y.shape[0]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.labels import Labels, depends_on
from deepeprop_jax.jaxpr.primitives import ELEMENTWISE, NONLINEAR_REDUCTIONS
from deepeprop_jax.jaxpr.program import Variable
from deepeprop_jax.jaxpr.trace import trace
from deepeprop_jax.network.cell import PyTree


def is_per_example(loss_fn: Callable, y: PyTree, target: PyTree, own: Sequence[bool], examples: int) -> bool:
    """Whether ``loss_fn`` of some examples gives what it gives for them among all.

    Proven for what an example's loss is computed from, by labels; tried, on random numbers, for how it changes with the
    number of examples, which no data depend on. False where it cannot be told.

    Args:
      y, target: shapes and dtypes of one step, of all examples.
      own: per leaf of the target, whether its first axis is that of the examples; other leaves have no such axis.
      examples: how many make a part.
    """
    try:
        return _needs_no_other(loss_fn, y, target, own) and _is_the_same_in_parts(loss_fn, y, target, own, examples)
    except (TypeError, ValueError):  # it needs all of them, or is traced with values that are not known here
        return False


def _needs_no_other(loss_fn: Callable, y: PyTree, target: PyTree, own: Sequence[bool]) -> bool:
    program = trace(loss_fn, y, target)
    loss = program.outputs[0]
    is_split = [True] * len(jax.tree.leaves(y)) + list(own)
    seeds: dict[Variable, Labels] = {}
    for variable, split in zip(program.inputs, is_split, strict=True):
        if split:
            shape = variable.aval.shape
            numbers = np.arange(shape[0], dtype=np.int32).reshape(-1, *(1,) * (len(shape) - 1))
            seeds[variable] = Labels.of(np.broadcast_to(numbers, shape))
    found = depends_on(program.equations, seeds, None, ELEMENTWISE, {*NONLINEAR_REDUCTIONS, "reduce_sum"}).of(loss)
    return found is not None and bool(found.low.shape) and found.within(np.arange(len(found.low), dtype=np.int32))


def _is_the_same_in_parts(loss_fn: Callable, y: PyTree, target: PyTree, own: Sequence[bool], examples: int) -> bool:
    draw = np.random.default_rng(0)

    def numbers(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return draw.uniform(0.1, 0.9, leaf.shape).astype(leaf.dtype)
        return draw.integers(0, 2, leaf.shape).astype(leaf.dtype)

    every = jax.tree.map(numbers, (y, target))
    flat, structure = jax.tree.flatten(every)
    is_split = [True] * len(jax.tree.leaves(y)) + list(own)
    part = jax.tree.unflatten(structure, [x[:examples] if s else x for x, s in zip(flat, is_split, strict=True)])
    with jax.ensure_compile_time_eval():
        whole, alone = (np.asarray(loss_fn(*jax.tree.map(jnp.asarray, given))) for given in (every, part))
    return alone.shape == (examples,) and np.allclose(whole[:examples], alone, rtol=1e-3, equal_nan=True)
