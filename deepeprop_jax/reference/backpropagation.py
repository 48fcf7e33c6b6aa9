"""Independent references: backpropagation through time and its relatives, in plain JAX.

Nothing here knows of traces. Every function returns

    run(params, carry, xs, targets, resets=None, valid=None) -> ((loss, final_carry), grads)

*Shapes*: ``params`` has no batch axis; ``carry`` leaves are (batch, ...), ``xs`` leaves (T, batch, ...), ``targets``
any pytree with leading T; ``resets`` and ``valid`` are (T, batch) bool. The loss is the sum over steps of
``loss_fn(y_t, target_t)`` on the batched output, a scalar, or (batch,) losses, which are summed where ``valid``.
``grads`` has the pytree, shapes and dtypes of ``params``: complex leaves follow ``jax.grad``'s convention, integer
leaves get zeros.

``resets``: *before* the step those examples' carry returns to the ``carry`` given. ``valid``: where False, the carry is
held and the output gets no cotangent; its value still enters a scalar loss.

``stop_gradient.py`` holds the references of deep e-prop, ``paper.py`` the paper's recursion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepeprop_jax.network.cell import Cell, PyTree

LossFn = Callable[[PyTree, PyTree], jax.Array]
Apply = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class Pair(NamedTuple):
    """A cell split at its new carry: h_t = F(θ, h_{t-1}, u_t), y_t = g(θ, h_t, h_{t-1}, u_t), for one example.

    A cell's ``apply`` alone does not tell the path of y through the new carry from its direct one, and deep e-prop
    treats them differently; so the oracles take the cell as this pair.

    Attributes:
      carry: F, ``carry(params, carry_tm1, x) -> carry_t``.
      output: g, ``output(params, carry_t, carry_tm1, x) -> y``.
    """

    carry: Callable[[PyTree, PyTree, PyTree], PyTree]
    output: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]

    def apply(self, params: PyTree, carry_tm1: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """The cell itself: the composition of F and g."""
        carry_t = self.carry(params, carry_tm1, x)
        return carry_t, self.output(params, carry_t, carry_tm1, x)


class Run(Protocol):
    """A loss over a whole sequence and its gradient; the arguments are described at the top of this file."""

    def __call__(
        self,
        params: PyTree,
        carry: PyTree,
        xs: PyTree,
        targets: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, PyTree], PyTree]: ...


class _Steps(NamedTuple):
    """What one step reads, each with a leading time axis; None where absent."""

    x: PyTree
    target: PyTree
    reset: jax.Array | None
    valid: jax.Array | None
    cut: jax.Array | None = None


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf is real or complex floating point; integers, booleans and PRNG keys are not."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def where_example(mask: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` for the examples in ``mask`` (batch,), ``old`` for the others."""

    def choose(new_leaf: jax.Array, old_leaf: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (jnp.ndim(new_leaf) - 1)), new_leaf, old_leaf)

    return jax.tree.map(choose, new, old)


def _make_step(apply: Apply, loss_fn: LossFn, params: PyTree, initial: PyTree) -> Callable:
    """The body of every time loop here: reset, apply, hold, loss."""
    batched = jax.vmap(apply, in_axes=(None, 0, 0))

    def step(carry_tm1: PyTree, at: _Steps) -> tuple[PyTree, jax.Array]:
        if at.cut is not None:
            cut_carry = lax.stop_gradient(carry_tm1)
            carry_tm1 = jax.tree.map(lambda stop, go: jnp.where(at.cut, stop, go), cut_carry, carry_tm1)
        if at.reset is not None:
            carry_tm1 = where_example(at.reset, initial, carry_tm1)
        carry_t, y = batched(params, carry_tm1, at.x)
        if at.valid is not None:
            carry_t = where_example(at.valid, carry_t, carry_tm1)
            y = where_example(at.valid, y, lax.stop_gradient(y))
        loss = loss_fn(y, at.target)
        if jnp.ndim(loss):  # one per example
            loss = (loss if at.valid is None else jnp.where(at.valid, loss, 0)).sum()
        return carry_t, loss

    return step


def split_params(params: PyTree) -> tuple[list[jax.Array], Callable[[list], PyTree], Callable[[list], PyTree]]:
    """The differentiable leaves of params; how to rebuild params from them; how to rebuild a gradient from theirs."""
    leaves, structure = jax.tree.flatten(params)
    free = [index for index, leaf in enumerate(leaves) if is_differentiable(leaf)]

    def rebuild(values: list, rest: list) -> PyTree:
        full = list(rest)
        for index, value in zip(free, values, strict=True):
            full[index] = value
        return jax.tree.unflatten(structure, full)

    def gradient(values: list) -> PyTree:
        return rebuild(values, [leaf if _is_key(leaf) else jnp.zeros_like(leaf) for leaf in leaves])

    return [jnp.asarray(leaves[index]) for index in free], lambda values: rebuild(values, leaves), gradient


def reverse_mode(apply: Apply, loss_fn: LossFn, loop: Callable | None = None) -> Run:
    """``jax.value_and_grad`` of the summed loss of ``apply`` over a sequence.

    Args:
      apply: one step for one example.
      loss_fn: one step's loss on the batched output.
      loop: ``loop(step, carry, steps) -> (carry, summed loss)``; one ``lax.scan`` by default.
    """
    loop = loop or _scan

    def run(params, carry, xs, targets, resets=None, valid=None):
        free, rebuild, gradient = split_params(params)

        def total(free: list) -> tuple[jax.Array, PyTree]:
            step = _make_step(apply, loss_fn, rebuild(free), carry)
            final_carry, loss = loop(step, carry, _Steps(xs, targets, resets, valid))
            return loss, final_carry

        (loss, final_carry), grads = jax.value_and_grad(total, has_aux=True)(free)
        return (loss, final_carry), gradient(grads)

    return run


def _length(steps: _Steps) -> int:
    return jax.tree.leaves(steps)[0].shape[0]


def _scan(step: Callable, carry: PyTree, steps: _Steps) -> tuple[PyTree, jax.Array]:
    final_carry, losses = lax.scan(step, carry, steps)
    return final_carry, losses.sum()


def bptt(network: Cell, loss_fn: LossFn) -> Run:
    """Backpropagation through time: reverse mode through one ``lax.scan``.

    *Cost*: memory O(T · activations); time about three forward passes.

    Args:
      network: a cell or a network of cells.
      loss_fn: ``loss_fn(y_t, target_t) -> scalar`` on the batched output of one step.

    Returns:
      ``run(params, carry, xs, targets, resets=None, valid=None) -> ((loss, final_carry), grads)``.

    >>> leaky = Cell(init=None, apply=lambda w, h, x: (w * h + x, w * h + x))
    >>> run = bptt(leaky, lambda y, target: jnp.sum(y * target))
    >>> (loss, carry), grad = run(jnp.float32(0.5), jnp.zeros((1,)), jnp.ones((2, 1)), jnp.ones((2, 1)))
    >>> float(loss), float(grad)
    (2.5, 1.0)
    """
    return reverse_mode(network.apply, loss_fn)


def checkpointed_bptt(network: Cell, loss_fn: LossFn, segment_length: int) -> Run:
    """BPTT that keeps the carry every ``segment_length`` steps and recomputes the rest: the same gradient.

    *Cost*: memory O((T / segment_length) · carry + segment_length · activations); one more forward pass than ``bptt``.

    Args:
      network: a cell or a network of cells.
      loss_fn: one step's loss on the batched output.
      segment_length: steps per segment; T need not be a multiple of it.

    Raises:
      ValueError: ``segment_length`` below 1.
    """
    _check_positive("segment_length", segment_length)

    def loop(step: Callable, carry: PyTree, steps: _Steps) -> tuple[PyTree, jax.Array]:
        segment = jax.checkpoint(lambda carry, part: _scan(step, carry, part))
        whole = _length(steps) // segment_length * segment_length
        parts = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, segment_length, *leaf.shape[1:]), steps)
        carry, loss = _scan(segment, carry, parts)
        if whole < _length(steps):
            carry, last = segment(carry, jax.tree.map(lambda leaf: leaf[whole:], steps))
            loss = loss + last
        return carry, loss

    return reverse_mode(network.apply, loss_fn, loop)


def truncated_bptt(network: Cell, loss_fn: LossFn, k: int) -> Run:
    """Truncated BPTT: consecutive chunks of ``k`` steps, with no gradient across their boundaries.

    Step t starts a chunk where t is a multiple of k; its incoming carry is a constant. Equal to ``bptt`` where k >= T.

    Args:
      network: a cell or a network of cells.
      loss_fn: one step's loss on the batched output.
      k: steps per chunk.

    Raises:
      ValueError: ``k`` below 1.
    """
    _check_positive("k", k)

    def loop(step: Callable, carry: PyTree, steps: _Steps) -> tuple[PyTree, jax.Array]:
        return _scan(step, carry, steps._replace(cut=jnp.arange(_length(steps)) % k == 0))

    return reverse_mode(network.apply, loss_fn, loop)


def forward_rtrl(network: Cell, loss_fn: LossFn) -> Run:
    """Real-time recurrent learning by brute force: ``jax.jacfwd`` of the summed loss through ``lax.scan``.

    *Cost*: memory O(|θ| · carry), constant in T; time |θ| forward passes. Cells with a ``jax.custom_vjp`` have no
    forward mode. Source: Williams and Zipser (1989).

    Args:
      network: a cell or a network of cells.
      loss_fn: one step's loss on the batched output.
    """

    def run(params, carry, xs, targets, resets=None, valid=None):
        free, rebuild, gradient = split_params(params)
        reals = [(leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,) for leaf in free]

        def total(reals: list) -> tuple[jax.Array, PyTree]:
            values = [lax.complex(*parts) if len(parts) == 2 else parts[0] for parts in reals]
            step = _make_step(network.apply, loss_fn, rebuild(values), carry)
            final_carry, loss = _scan(step, carry, _Steps(xs, targets, resets, valid))
            return loss, (loss, final_carry)

        grads, result = jax.jacfwd(total, has_aux=True)(reals)
        # jax.grad's convention for a complex leaf z = a + ib: dL/da - i dL/db.
        return result, gradient([lax.complex(g[0], -g[1]) if len(g) == 2 else g[0] for g in grads])

    return run


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} counts steps: needed an integer >= 1, seen {value!r}.")
