"""The lines of code that an error message says to write, run; and whether a network has BPTT's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deepeprop_jax import Cell, deep_eprop, stack
from deepeprop_jax.reference import bptt
from tests.gradients import FLOAT64, assert_same_gradient

STEPS, BATCH, INPUTS = 5, 3, 2
XS = jax.random.normal(jax.random.key(1), (STEPS, BATCH, INPUTS), jnp.float64)
KEY = jax.random.key(0)


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def refused(call: Callable[[], Any], kind: type[Exception], message: str) -> str:
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        call()
    return str(caught.value)


def network_of(message: str, **names: Any) -> Any:
    """Run the indented lines of a message: they make ``network`` of what they call ``module``."""
    lines = "\n".join(line[4:] for line in message.splitlines() if line.startswith("    "))
    scope = {"nn": nn, "nnx": nnx, "jax": jax, "jnp": jnp, "Cell": Cell, "stack": stack, **names}
    exec(lines, scope)
    return scope["network"]


def loss_fn(y: Any, target: jax.Array) -> jax.Array:
    return sum(jnp.mean((leaf - target) ** 2) for leaf in jax.tree.leaves(y))


def check_exact(network: Any, xs: jax.Array = XS, segment_length: int | None = None) -> Any:
    """``exact=True`` equals BPTT in float64, compiled; gives the gradient."""
    learner = deep_eprop(network, exact=True)
    params, carry = in_float64(learner.network.init(KEY, xs[0]))
    state = learner.init(params, carry, xs[0])
    targets = jnp.linspace(-1.0, 1.0, xs.shape[0])
    run = jax.jit(learner.value_and_grad(loss_fn, segment_length=segment_length or 2))
    (loss, _), grads = run(params, state, xs, targets)
    (needed_loss, _), needed = jax.jit(bptt(learner.network, loss_fn))(params, carry, xs, targets)
    assert jnp.allclose(loss, needed_loss, rtol=FLOAT64)
    assert_same_gradient(grads, needed, FLOAT64)
    return grads
