"""Independent references: backpropagation through time and its relatives, in plain JAX.

Nothing here knows of traces. Every function takes ``network``, a cell or a network of cells, and ``loss_fn(y_t,
target_t)``, one step's loss on the batched output, and returns

    run(params, carry, xs, targets, resets=None, valid=None) -> ((loss, final_carry), grads)

*Shapes*: ``params`` has no batch axis; ``carry`` leaves are (batch, ...), ``xs`` leaves (T, batch, ...), ``targets``
any pytree with leading T; ``resets`` and ``valid`` are (T, batch) bool. The loss is the sum over steps of
``loss_fn(y_t, target_t)`` on the batched output, a scalar, or (batch,) losses, which are summed where ``valid``.
``grads`` has the pytree, shapes and dtypes of ``params``: complex leaves follow ``jax.grad``'s convention, integer
leaves get zeros.

``resets``: *before* the step those examples' carry returns to the ``carry`` given. ``valid``: where False, the carry is
held and the output gets no cotangent; its value still enters a scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from deepeprop_jax.network.cell import Cell, PyTree

LossFn = Callable[[PyTree, PyTree], jax.Array]
Apply = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
Run = Callable[..., tuple[tuple[jax.Array, PyTree], PyTree]]


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


class _Steps(NamedTuple):
    """What one step reads, each with a leading time axis; None where absent."""

    x: PyTree
    target: PyTree
    reset: jax.Array | None
    valid: jax.Array | None
    cut: jax.Array | None = None


def is_differentiable(leaf: ArrayLike) -> bool:
    """Whether a leaf is real or complex floating point; integers, booleans and PRNG keys are not."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def real_leaves(tree: PyTree) -> list[jax.Array]:
    """The differentiable leaves, a complex one as its real and its imaginary part."""
    reals: list[jax.Array] = []
    for leaf in filter(is_differentiable, jax.tree.leaves(tree)):
        reals += [jnp.real(leaf), jnp.imag(leaf)] if jnp.iscomplexobj(leaf) else [jnp.asarray(leaf)]
    return reals


def with_real_leaves(tree: PyTree, reals: Sequence[jax.Array]) -> PyTree:
    """The inverse of ``real_leaves``; leaves that are not differentiable come from ``tree``."""
    values = iter(reals)

    def rebuild(leaf: jax.Array) -> jax.Array:
        if not is_differentiable(leaf):
            return leaf
        return lax.complex(next(values), next(values)) if jnp.iscomplexobj(leaf) else next(values)

    return jax.tree.map(rebuild, tree)


def as_gradient(reals: Sequence[jax.Array], params: PyTree) -> PyTree:
    """Derivatives by ``real_leaves(params)`` as a pytree like params: dL/da - i dL/db for a complex leaf a + ib, as
    ``jax.grad`` has it; zero for a leaf that is not differentiable, but for a PRNG key, which has no zero."""

    def convert(leaf: jax.Array) -> jax.Array:
        if is_differentiable(leaf):
            return jnp.conj(leaf)
        return leaf if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else jnp.zeros_like(leaf)

    return jax.tree.map(convert, with_real_leaves(params, reals))


def _where_example(mask: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` for the examples in ``mask`` (batch,), ``old`` for the others."""

    def choose(new_leaf: jax.Array, old_leaf: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (jnp.ndim(new_leaf) - 1)), new_leaf, old_leaf)

    return jax.tree.map(choose, new, old)


def _make_step(apply: Apply, params: PyTree, initial: PyTree) -> Callable:
    """The body of every time loop here: reset, apply, hold; gives the output."""
    batched = jax.vmap(apply, in_axes=(None, 0, 0))

    def step(carry_tm1: PyTree, at: _Steps) -> tuple[PyTree, PyTree]:
        if at.cut is not None:
            cut_carry = lax.stop_gradient(carry_tm1)
            carry_tm1 = jax.tree.map(lambda stop, go: jnp.where(at.cut, stop, go), cut_carry, carry_tm1)
        if at.reset is not None:
            carry_tm1 = _where_example(at.reset, initial, carry_tm1)
        carry_t, y = batched(params, carry_tm1, at.x)
        if at.valid is not None:
            carry_t = _where_example(at.valid, carry_t, carry_tm1)
            y = _where_example(at.valid, y, lax.stop_gradient(y))
        return carry_t, y

    return step


def _loss_of(loss_fn: LossFn, y: PyTree, at: _Steps) -> jax.Array:
    """Of a step, or of a window of them: losses per example are summed where valid."""
    loss = loss_fn(y, at.target)
    if jnp.ndim(loss):
        loss = (loss if at.valid is None else jnp.where(at.valid, loss, 0)).sum()
    return loss


def _make_loss_step(apply: Apply, loss_fn: LossFn, params: PyTree, initial: PyTree) -> Callable:
    """A step that gives its loss."""
    step = _make_step(apply, params, initial)

    def with_loss(carry_tm1: PyTree, at: _Steps) -> tuple[PyTree, jax.Array]:
        carry_t, y = step(carry_tm1, at)
        return carry_t, _loss_of(loss_fn, y, at)

    return with_loss


def _scan(step: Callable, carry: PyTree, steps: _Steps) -> tuple[PyTree, jax.Array]:
    final_carry, losses = lax.scan(step, carry, steps)
    return final_carry, losses.sum()


def _length(steps: _Steps) -> int:
    return jax.tree.leaves(steps)[0].shape[0]


def reverse_mode(apply: Apply, loss_fn: LossFn, loop: Callable = _scan) -> Run:
    """``jax.value_and_grad`` of the loss of ``apply``, one step for one example; ``loop(step, carry, steps) -> (carry,
    summed loss)`` runs over the steps."""

    def total(params: PyTree, carry: PyTree, steps: _Steps) -> tuple[jax.Array, PyTree]:
        final_carry, loss = loop(_make_loss_step(apply, loss_fn, params, carry), carry, steps)
        return loss, final_carry

    return _gradient_of(total)


def _gradient_of(total: Callable[[PyTree, PyTree, _Steps], tuple[jax.Array, PyTree]]) -> Run:
    """``run``, from what gives the loss of a sequence and the carry at its end."""

    def run(params, carry, xs, targets, resets=None, valid=None):
        def of_reals(reals: list[jax.Array]) -> tuple[jax.Array, PyTree]:
            return total(with_real_leaves(params, reals), carry, _Steps(xs, targets, resets, valid))

        result, grads = jax.value_and_grad(of_reals, has_aux=True)(real_leaves(params))
        return result, as_gradient(grads, params)

    return run


def bptt(network: Cell, loss_fn: LossFn) -> Run:
    """Backpropagation through time: reverse mode through one ``lax.scan``.

    *Cost*: memory O(T · activations); time about three forward passes.

    >>> leaky = Cell(init=None, apply=lambda w, h, x: (w * h + x, w * h + x))
    >>> run = bptt(leaky, lambda y, target: jnp.sum(y * target))
    >>> (loss, carry), grad = run(jnp.float32(0.5), jnp.zeros((1,)), jnp.ones((2, 1)), jnp.ones((2, 1)))
    >>> float(loss), float(grad)
    (2.5, 1.0)
    """
    return reverse_mode(network.apply, loss_fn)


def windowed_bptt(network: Cell, loss_fn: LossFn, window: int) -> Run:
    """BPTT of a loss on C steps together, ``loss_fn(ys, targets)`` on (C, batch, ...), summed over windows; the last
    one may be shorter. The loss is a scalar, or one per step and example, (C, batch).

    *Cost*: as ``bptt``.

    Raises:
      ValueError: ``window``, C, below 1.
    """
    _check_positive("window", window)

    def total(params: PyTree, carry: PyTree, steps: _Steps) -> tuple[jax.Array, PyTree]:
        final_carry, ys = lax.scan(_make_step(network.apply, params, carry), carry, steps)
        whole = _length(steps) // window * window
        losses = []
        if whole:
            parts = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, window, *leaf.shape[1:]), (ys, steps))
            losses.append(lax.map(lambda part: _loss_of(loss_fn, *part), parts).sum())
        if whole < _length(steps):
            losses.append(_loss_of(loss_fn, *jax.tree.map(lambda leaf: leaf[whole:], (ys, steps))))
        return sum(losses[1:], start=losses[0]), final_carry

    return _gradient_of(total)


def checkpointed_bptt(network: Cell, loss_fn: LossFn, segment_length: int) -> Run:
    """BPTT that keeps the carry every ``segment_length`` steps and recomputes the rest: the same gradient.

    *Cost*: memory O((T / segment_length) · carry + segment_length · activations); one more forward pass than ``bptt``.

    Raises:
      ValueError: ``segment_length``, of which T need not be a multiple, below 1.
    """
    segments = loop_over_segments(segment_length, lambda carry: carry, jax.checkpoint)
    return reverse_mode(network.apply, loss_fn, segments)


def loop_over_segments(
    segment_length: int, boundary: Callable[[PyTree], PyTree], wrapped: Callable = lambda segment: segment
) -> Callable:
    """A ``loop`` for ``reverse_mode``: segments of C steps, each ``wrapped``, the carry between them through
    ``boundary``; the last segment may be shorter.

    Raises:
      ValueError: ``segment_length`` below 1.
    """
    _check_positive("segment_length", segment_length)

    def loop(step: Callable, carry: PyTree, steps: _Steps) -> tuple[PyTree, jax.Array]:
        segment = wrapped(lambda carry, part: _scan(step, boundary(carry), part))
        whole = _length(steps) // segment_length * segment_length
        parts = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, segment_length, *leaf.shape[1:]), steps)
        carry, loss = _scan(segment, carry, parts)
        if whole < _length(steps):
            carry, last = segment(carry, jax.tree.map(lambda leaf: leaf[whole:], steps))
            loss = loss + last
        return carry, loss

    return loop


def truncated_bptt(network: Cell, loss_fn: LossFn, k: int) -> Run:
    """Truncated BPTT: consecutive chunks of ``k`` steps, with no gradient across their boundaries.

    Step t starts a chunk where t is a multiple of k; its incoming carry is a constant. Equal to ``bptt`` where k >= T.

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
    """

    def run(params, carry, xs, targets, resets=None, valid=None):
        def total(reals: list[jax.Array]) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            step = _make_loss_step(network.apply, loss_fn, with_real_leaves(params, reals), carry)
            final_carry, loss = _scan(step, carry, _Steps(xs, targets, resets, valid))
            return loss, (loss, final_carry)

        grads, result = jax.jacfwd(total, has_aux=True)(real_leaves(params))
        return result, as_gradient(grads, params)

    return run


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} counts steps: needed an integer >= 1, seen {value!r}.")
