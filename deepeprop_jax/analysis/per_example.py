"""Whether a loss with one number per example is, for each, a function of that example alone.

Some are not: a centred or ranked batch, negatives out of the batch, a division by ``y.shape[0]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.analysis.labels import Labels, depends_on
from deepeprop_jax.jaxpr.primitives import ELEMENTWISE, NONLINEAR_REDUCTIONS
from deepeprop_jax.jaxpr.program import Equation, is_variable, trace
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
    count = len(jax.tree.leaves(y))
    is_split = [True] * count + list(own)
    flow: dict[Any, Labels] = {}
    for variable, split in zip(program.inputs, is_split, strict=True):
        if split:
            shape = variable.aval.shape
            numbers = np.arange(shape[0], dtype=np.int32).reshape(-1, *(1,) * (len(shape) - 1))
            flow[variable] = Labels.of(np.broadcast_to(numbers, shape))
    for equation in program.equations:
        flow |= _labels(equation, flow)
    if not is_variable(loss) or not loss.aval.shape or loss not in flow:
        return False
    return flow[loss].within(np.arange(loss.aval.shape[0], dtype=np.int32))


def _labels(equation: Equation, flow: dict[Any, Labels]) -> dict[Any, Labels]:
    """On which examples an equation's outputs depend; what is not known depends on all that its operands do."""
    known = {atom: flow[atom] for atom in equation.inputs if is_variable(atom) and atom in flow}
    if not known:
        return {}
    output = equation.outputs[0]
    if equation.name in ELEMENTWISE:
        joined = functools.reduce(Labels.join, known.values())
        return {output: joined.map(lambda x: np.broadcast_to(x, output.aval.shape))}
    if equation.name in NONLINEAR_REDUCTIONS:
        return {output: next(iter(known.values())).reduce(tuple(equation.params["axes"]))}
    found = depends_on([equation], known).labels
    return {variable: found[variable] for variable in equation.outputs if variable in found}


def _is_the_same_in_parts(loss_fn: Callable, y: PyTree, target: PyTree, own: Sequence[bool], examples: int) -> bool:
    draw = np.random.default_rng(0)

    def numbers(leaf: Any) -> np.ndarray:
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
