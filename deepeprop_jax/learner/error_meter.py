"""How far a gradient is from BPTT's, measured beside it, forward in time and without BPTT.

    E (ĝ · ξ − Σ_t ∂L_t/∂y_t · Y_t ξ)²  =  ‖ĝ − g‖²        for ξ ~ N(0, 1) that ĝ does not depend on

g is BPTT's gradient, and g · ξ the loss's derivative along ξ: what forward mode finds with one tangent of the carry,
exactly, in memory that does not grow with time. Its square is, in the mean, ‖g‖². (Forward-mode derivatives along
random directions: Baydin et al., "Gradients without backpropagation", 2022; here they judge a gradient.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.jaxpr.real_leaves import RealView
from deepeprop_jax.learner import checks
from deepeprop_jax.learner.contract import LearnerState, OnlineLearner, documented_by
from deepeprop_jax.learner.sequence import make_sequence
from deepeprop_jax.learner.sharded import with_whole_batches
from deepeprop_jax.learner.tangent import Moving, no_tangent, push_forward, random_tangent
from deepeprop_jax.network.arguments import as_arrays, check_same
from deepeprop_jax.network.cell import PyTree
from deepeprop_jax.traces.plan import Plan


class Meter(NamedTuple):
    """What a meter holds: the probes under way, and running means so far. A pytree.

    Attributes:
      key: of the probes to come.
      probe: ξ, shaped as params, (probes, ...): each of one node's parameters, the nodes in turn.
      node: (probes,), whose, as places among the nodes with trained parameters.
      tangent: τ = S ξ, shaped as the carry, (probes, batch, ...).
      sequences: how many were begun.
      errors, squares: (nodes,) running means of (ĝ · ξ − g · ξ)² and of (g · ξ)².
      fourths: (nodes,) running mean of (ĝ · ξ − g · ξ)⁴.
      counts: (nodes,) how many went into them.
      squared_weights: (nodes,) sum of the squares of the weights that those have in the means: 1 / n of n alike.
    """

    key: jax.Array
    probe: PyTree
    node: jax.Array
    tangent: PyTree
    sequences: jax.Array
    errors: jax.Array
    squares: jax.Array
    fourths: jax.Array
    counts: jax.Array
    squared_weights: jax.Array


class Error(NamedTuple):
    """An estimate of ‖ĝ − g‖ / ‖g‖; nan before every node was probed once, and where g is zero.

    Attributes:
      total: of the whole gradient.
      nodes: of each node with trained parameters, from below.
      uncertainty: standard error of ``total``.
    """

    total: jax.Array
    nodes: jax.Array
    uncertainty: jax.Array


class InitMeter(Protocol):
    """A meter that has seen nothing, before a sequence.

    Args:
      key: from ``jax.random.key``.
      params, carry, x: as given to ``learner.init``.
    """

    def __call__(self, key: jax.Array, params: PyTree, carry: PyTree, x: PyTree) -> Meter: ...


class BeginMeter(Protocol):
    """Before a new sequence, all of whose examples start from their initial carry: other probes.

    Args:
      meter: the one so far.
      params, carry, x: as given to ``learner.init``.
    """

    def __call__(self, meter: Meter, params: PyTree, carry: PyTree, x: PyTree) -> Meter: ...


class UpdateMeter(Protocol):
    """After a sequence, or a piece of a stream: compare its gradient with BPTT's along the probes.

    *Cost*: the network forward with one tangent for each probe. Constant memory.

    Args:
      meter: where the piece started.
      params, state, xs, targets, resets, valid: as given to ``value_and_grad``'s ``run``. Of the state its carry and
        initial carry alone are looked at.
      grads: what came out, or any other gradient of this piece's losses.
    """

    def __call__(
        self,
        meter: Meter,
        params: PyTree,
        state: LearnerState,
        xs: PyTree,
        targets: PyTree,
        grads: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> Meter: ...


class ErrorMeter(NamedTuple):
    """What ``error_meter`` returns: pure functions.

    Attributes:
      init: ``init(key, params, carry, x) -> meter``.
      begin: ``begin(meter, params, carry, x) -> meter``.
      update: ``update(meter, params, state, xs, targets, grads) -> meter``.
      error: ``error(meter) -> Error``.
    """

    init: InitMeter
    begin: BeginMeter
    update: UpdateMeter
    error: Callable[[Meter], Error]


def error_meter(
    learner: OnlineLearner, loss_fn: Callable[..., PyTree], *, horizon: int = 100, probes: int = 1
) -> ErrorMeter:
    """Measure the error of a gradient against BPTT's while learning, in any mode, without BPTT.

    A probe ξ lasts for a sequence, from its first step on; each ``update`` gives one sample for each probe. n samples
    of a node, at fixed parameters, leave an error of about 1 / sqrt(n). The reading is a ratio of running means, in
    which large gradients weigh most: a few sequences may decide it, and then their few samples leave more to chance.
    Ask for more ``probes`` where that matters. While gradients fall fast the reading tells of the past, the longer the
    larger ``horizon`` is. ``init`` begins a sequence too. Where one sequence in four is enough, call ``begin`` and
    ``update`` for those alone.

    In a stream that never begins anew the same probes stay: right in the mean over keys, not over time.

    Args:
      learner: what made the gradient; its network and ``trainable`` are asked for. Parameters that are not trained are
        left out.
      loss_fn: as for ``value_and_grad``, without aux.
      horizon: how many samples of a node a running mean looks back.
      probes: how many directions at a time, of as many nodes in turn; with more of them than nodes, several of a node.

    Raises:
      TypeError, ValueError: loss_fn is no function; ``horizon`` or ``probes`` below 1; in calls, a meter that was made
        with another number of probes.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from deepeprop_jax import deep_eprop, error_meter
    >>> learner = deep_eprop(nn.GRUCell(features=4), exact=True)
    >>> xs = jax.random.normal(jax.random.key(0), (6, 2, 3), jnp.float32)
    >>> params, carry = learner.network.init(jax.random.key(1), xs[0])
    >>> loss_fn = lambda y, target: jnp.mean((y - target) ** 2)
    >>> meter_of = error_meter(learner, loss_fn)
    >>> meter = meter_of.init(jax.random.key(2), params, carry, xs[0])
    >>> state = learner.init(params, carry, xs[0])
    >>> (loss, after), grads = learner.value_and_grad(loss_fn)(params, state, xs, jnp.zeros(6))
    >>> meter = meter_of.update(meter, params, state, xs, jnp.zeros(6), grads)
    >>> bool(meter_of.error(meter).total < 1e-5)
    True
    """
    checks.check_loss_and_learner(learner, loss_fn)
    checks.check_count("horizon", horizon, 1, "an integer >= 1, how many samples a running mean looks back")
    checks.check_count("probes", probes, 1, "an integer >= 1, how many directions are probed at a time")

    @documented_by(BeginMeter)
    @with_whole_batches
    def begin(meter, params, carry, x):
        params, carry = as_arrays(params, "params"), as_arrays(carry, "carry")
        _check_probes(meter, probes)
        plan = learner.plan(params, carry, x)
        nodes = jnp.asarray(_trained(plan), jnp.int32)
        node = (meter.sequences % len(nodes) * probes + jnp.arange(probes, dtype=jnp.int32)) % len(nodes)
        key, now = jax.random.split(meter.key)
        draw = jax.vmap(lambda key, number: random_tangent(plan, key, params, number))
        none = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (probes, *leaf.shape)), no_tangent(carry))
        probe = draw(jax.random.split(now, probes), nodes[node])
        return meter._replace(key=key, probe=probe, node=node, tangent=none, sequences=meter.sequences + 1)

    @documented_by(InitMeter)
    @with_whole_batches
    def init(key, params, carry, x):
        carry = as_arrays(carry, "carry")
        plan = learner.plan(params, carry, x)
        nodes = len(_trained(plan))
        # Each an array of its own, so that a meter may be donated.
        errors, squares, fourths, weights = (jnp.zeros(nodes, plan.dtype) for _ in range(4))
        sequences, counts = jnp.zeros((), jnp.int32), jnp.zeros(nodes, jnp.int32)
        meter = Meter(key, params, jnp.zeros(probes), carry, sequences, errors, squares, fourths, counts, weights)
        return begin(meter, params, carry, x)

    @documented_by(UpdateMeter)
    @with_whole_batches
    def update(meter, params, state, xs, targets, grads, resets=None, valid=None):
        params, xs = as_arrays(params, "params"), as_arrays(xs, "xs")
        _check_probes(meter, probes)
        remedy = "Give what value_and_grad gave for these params."
        check_same(_numbers(grads), _numbers(params), "grads", remedy)
        plan = learner.plan(params, state.carry, jax.tree.map(lambda leaf: leaf[0], xs))
        steps = make_sequence(plan, loss_fn, False, state.initial_carry, xs, targets, resets, valid)

        def cotangent(y: PyTree, target: PyTree, valid: jax.Array | None) -> PyTree:
            return steps.loss_and_dy(y, target, valid)[1]

        def sample(probe: PyTree, tangent: PyTree) -> tuple[PyTree, jax.Array, jax.Array]:
            start = Moving(state.carry, tangent)
            pushed = push_forward(learner.network, params, probe, start, state.initial_carry, steps.inputs, cotangent)
            along = pushed.along.astype(plan.dtype)
            return pushed.moving.tangent, (_along(grads, probe, params, plan.dtype) - along) ** 2, along**2

        tangent, error, square = jax.vmap(sample)(meter.probe, meter.tangent)
        return _averaged(meter._replace(tangent=tangent), error, square, horizon)

    return ErrorMeter(init, begin, update, _read)


def _averaged(meter: Meter, error: jax.Array, square: jax.Array, horizon: int) -> Meter:
    """With one sample more for each probe.

    Args:
      error, square: (probes,) (ĝ · ξ − g · ξ)² and (g · ξ)².
    """
    dtype = meter.errors.dtype
    of_node = jnp.arange(len(meter.counts), dtype=jnp.int32)[:, None] == meter.node[None]
    counts = meter.counts + of_node.sum(axis=1, dtype=meter.counts.dtype)
    new, so_far = (counts - meter.counts).astype(dtype), counts.astype(dtype)
    weight = jnp.minimum(1 / jnp.maximum(new, 1), jnp.maximum(1 / jnp.maximum(so_far, 1), 1 / horizon))

    def mean(old: jax.Array, samples: jax.Array) -> jax.Array:
        return old + weight * jnp.where(of_node, samples[None] - old[:, None], 0).sum(axis=1)

    return meter._replace(
        errors=mean(meter.errors, error),
        squares=mean(meter.squares, square),
        fourths=mean(meter.fourths, error**2),
        counts=counts,
        squared_weights=(1 - new * weight) ** 2 * meter.squared_weights + new * weight**2,
    )


def _read(meter: Meter) -> Error:
    """The error, from a meter's running means."""
    seen = (meter.counts > 0).all()
    errors, squares = meter.errors.sum(), meter.squares.sum()
    # Of a sum of squares of normal numbers the variance is twice the mean's square.
    spread = jnp.sum((meter.fourths - meter.errors**2) * meter.squared_weights) / errors**2
    spread = spread + jnp.sum(2 * meter.squares**2 * meter.squared_weights) / squares**2
    total = jnp.sqrt(errors / squares)
    uncertainty = jnp.where(errors == 0, 0, total * jnp.sqrt(spread) / 2)
    nothing = jnp.nan
    return Error(
        jnp.where(seen, total, nothing),
        jnp.where(meter.counts > 0, jnp.sqrt(meter.errors / meter.squares), nothing),
        jnp.where(seen, uncertainty, nothing),
    )


def _check_probes(meter: Meter, probes: int) -> None:
    if meter.node.shape != (probes,):
        raise ValueError(
            f"The meter has {meter.node.size} probes at a time, this error_meter {probes}: begin another with init."
        )


def _trained(plan: Plan) -> list[int]:
    found = [v for v, leaves in enumerate(plan.trained) if leaves]
    if not found:
        raise ValueError("No parameter is trained, so that there is no gradient whose error could be measured.")
    return found


def _numbers(tree: PyTree) -> list[jax.Array]:
    """The leaves that have derivatives."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _along(grads: PyTree, probe: PyTree, params: PyTree, dtype: np.dtype) -> jax.Array:
    """ĝ · ξ, the gradient in ``jax.grad``'s convention."""
    view = RealView(params)
    pairs = zip(view.split_cotangent(grads), view.split(probe).real, strict=True)
    return sum((jnp.sum(a * b).astype(dtype) for a, b in pairs), jnp.zeros((), dtype))
