"""Flax modules as cells: Flax's own parameters, Flax's own results, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepeprop_jax.network.build import stack
from deepeprop_jax.network.linen import linen_cell
from deepeprop_jax.network.nnx import nnx_cell
from tests.zoo_cells import MLP, MixedMemoryCell, Squash

STEPS, BATCH, INPUTS = 5, 3, 2
KEY = jax.random.key(0)
# The same operations in float32, batched by vmap on one side and by Flax on the other.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
X = jax.random.normal(jax.random.key(1), (BATCH, INPUTS), jnp.float32)
XS = jax.random.normal(jax.random.key(2), (STEPS, BATCH, INPUTS), jnp.float32)

LINEN = {
    "simple": nn.SimpleCell(5),
    "gru": nn.GRUCell(5),
    "lstm": nn.LSTMCell(5),
    "optimized_lstm": nn.OptimizedLSTMCell(5),
    "mgu": nn.MGUCell(5),
    "user": MixedMemoryCell(5),
}
NNX = {
    "simple": lambda rngs: nnx.SimpleCell(INPUTS, 5, dtype=None, rngs=rngs),
    "gru": lambda rngs: nnx.GRUCell(INPUTS, 5, rngs=rngs),
    "lstm": lambda rngs: nnx.LSTMCell(INPUTS, 5, rngs=rngs),
    "optimized_lstm": lambda rngs: nnx.OptimizedLSTMCell(INPUTS, 5, rngs=rngs),
}


def run(cell, params, carry, xs):
    step = jax.vmap(cell.apply, in_axes=(None, 0, 0))
    return jax.jit(lambda p, h: jax.lax.scan(lambda h, x: step(p, h, x), h, xs))(params, carry)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


class Noise(nn.Module):
    """Dropout, or BatchNorm, or a collection of its own, on top of a Dense layer."""

    kind: str
    flag: bool | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        if self.kind == "dropout":
            return nn.Dropout(0.5, deterministic=self.flag)(x)
        if self.kind == "batch_norm":
            return nn.BatchNorm(use_running_average=self.flag)(x)
        return x + self.variable("cache", "seen", lambda: jnp.zeros(4)).value


class NoisyCell(nn.RNNCellBase):
    """Recurrent dropout."""

    @nn.compact
    def __call__(self, carry, x):
        carry, y = nn.GRUCell(4)(carry, x)
        return carry, nn.Dropout(0.5, deterministic=False)(y)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 4), jnp.float32)


@pytest.mark.parametrize("name", LINEN)
def test_linen_recurrent_cell_is_flax_rnn(name):
    module, cell = LINEN[name], linen_cell(LINEN[name])
    params, carry = cell.init(KEY, X)
    assert shapes(params) == shapes(module.init(KEY, module.initialize_carry(KEY, X.shape), X))
    final, ys = run(cell, params, carry, XS)
    flax_params = {"params": {"cell": params["params"]}}
    flax_final, flax_ys = nn.RNN(module, return_carry=True, time_major=True).apply(flax_params, XS)
    np.testing.assert_allclose(ys, flax_ys, **ROUNDING)
    jax.tree.map(lambda ours, flax: np.testing.assert_allclose(ours, flax, **ROUNDING), final, flax_final)


def test_linen_conv_lstm_is_flax_rnn():
    module = nn.ConvLSTMCell(features=2, kernel_size=(3,))
    xs = jax.random.normal(KEY, (STEPS, BATCH, 5, 1), jnp.float32)
    cell = linen_cell(module)
    params, carry = cell.init(KEY, xs[0])
    _, ys = run(cell, params, carry, xs)
    flax_ys = nn.RNN(module, time_major=True).apply({"params": {"cell": params["params"]}}, xs)
    assert ys.shape == (STEPS, BATCH, 5, 2)
    np.testing.assert_allclose(ys, flax_ys, **ROUNDING)


@pytest.mark.parametrize("module", [nn.Dense(5), MLP(5), Squash()], ids=lambda module: type(module).__name__)
def test_linen_feed_forward_module(module):
    cell = linen_cell(module)
    params, carry = cell.init(KEY, X)
    assert carry == ()
    assert shapes(params) == shapes(module.init(KEY, X))
    carry_t, y = jax.vmap(cell.apply, in_axes=(None, 0, 0))(params, carry, X)
    assert carry_t == ()
    np.testing.assert_allclose(y, module.apply(params, X), **ROUNDING)


def test_linen_dropout_that_is_off_is_accepted():
    cell = linen_cell(Noise("dropout", flag=True))
    params, _ = cell.init(KEY, X)
    assert list(params) == ["params"]


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(
    ("module", "named"),
    [
        (Noise("dropout", flag=False), "Noise.*dropout.*deterministic=True"),
        (Noise("dropout"), "Noise.*nn.Dropout.*deterministic=True"),
        (Noise("batch_norm", flag=False), "Noise.*BatchNorm.*LayerNorm"),
        (Noise("batch_norm", flag=True), "Noise.*BatchNorm.*LayerNorm"),
        (Noise("batch_norm"), "Noise.*BatchNorm.*LayerNorm"),
        (Noise("cache"), "Noise.*cache/seen.*keep other state in the carry"),
        (NoisyCell(), "NoisyCell.*dropout.*deterministic=True"),
        (nn.BatchNorm(use_running_average=False), "BatchNorm.*LayerNorm"),
    ],
    ids=lambda case: case if isinstance(case, str) else None,
)
def test_linen_refuses_what_is_no_pure_function(module, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        linen_cell(module).init(KEY, X)


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(("kind", "named"), [("dropout", "dropout"), ("batch_norm", "BatchNorm"), ("cache", "cache")])
def test_linen_refuses_it_with_the_users_own_params(kind, named):
    module = Noise(kind, flag=False)
    variables = module.init(KEY, X)
    cell = linen_cell(module)
    with pytest.raises(ValueError, match=f"(?s)Noise.*{named}"):
        cell.apply(variables, (), X[0])
    with pytest.raises(ValueError, match=f"(?s)Noise.*{named}"):
        cell.apply({"params": variables["params"]}, (), X[0])


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"params": {"kernel": jnp.zeros((INPUTS, 5))}}, "Dense.*bias.*params that init made"),
        ({"params": {"kernel": jnp.zeros((7, 5)), "bias": jnp.zeros(5)}}, "Dense.*kernel.*params that init made"),
        ({}, "Dense.*params that init made"),
        ({"kernel": jnp.zeros((INPUTS, 5))}, "Dense.*kernel.*no collection 'params'"),
        ((jnp.zeros(3),), "Dense.*seen tuple"),
    ],
)
def test_linen_refuses_params_of_another_module(params, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        linen_cell(nn.Dense(5)).apply(params, (), X[0])


@pytest.mark.parametrize(
    ("thing", "error", "named"),
    [
        (nn.Dense, TypeError, "the class Dense"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TypeError, "nnx_cell"),
        (3, TypeError, "type int"),
        (nn.RNN(nn.GRUCell(3)), ValueError, "stack\\(module.cell\\)"),
    ],
)
def test_linen_cell_refuses_what_is_no_step(thing, error, named):
    with pytest.raises(error, match=named):
        linen_cell(thing)


def test_linen_carry_without_a_batch_axis_is_refused():
    class Unbatched(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry, x):
            return carry + nn.Dense(4)(x), x

        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros(4)

    with pytest.raises(ValueError, match=r"Unbatched.initialize_carry.*\(4,\).*size 3"):
        linen_cell(Unbatched()).init(KEY, X)


@pytest.mark.parametrize("cell", [linen_cell(nn.GRUCell(INPUTS)), nnx_cell(lambda r: nnx.GRUCell(2, 2, rngs=r))])
def test_init_under_vmap_gives_every_layer_its_own_numbers(cell):
    params, carry = stack(cell, depth=4).init(KEY, X)
    assert carry.shape == (BATCH, 4, INPUTS)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 3]
    assert kernels
    for kernel in kernels:
        assert kernel.shape[0] == 4
        assert len({layer.tobytes() for layer in np.asarray(kernel)}) == 4


class NnxMLP(nnx.Module):
    """A small feed-forward module, with parts that a cell may not have."""

    def __init__(self, kind: str, rngs: nnx.Rngs):
        self.kind = kind
        self.low = nnx.Linear(INPUTS, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=kind != "dropout", rngs=rngs)
        self.high = nnx.Linear(5, 3, rngs=rngs)
        if kind == "batch_norm":
            self.norm = nnx.BatchNorm(5, rngs=rngs)
        if kind == "variable":
            self.count = nnx.Variable(jnp.zeros(()))
        if kind == "array":
            self.constant = nnx.data(jnp.zeros(()))
        self.rngs = rngs

    def __call__(self, x):
        if self.kind == "noise":
            x = x + jax.random.normal(self.rngs.noise(), x.shape)
        if self.kind == "writes":
            self.low.bias[...] = self.low.bias[...] + 1
        return self.high(self.drop(nnx.tanh(self.norm(self.low(x)))))


@pytest.mark.parametrize("name", NNX)
def test_nnx_recurrent_cell_is_flax_rnn(name):
    cell = nnx_cell(NNX[name])
    params, carry = cell.init(KEY, X)
    module = NNX[name](nnx.Rngs(0))
    assert jax.tree.structure(params) == jax.tree.structure(nnx.split(module, nnx.Param)[1])
    nnx.update(module, params)
    _, ys = run(cell, params, carry, XS)
    flax_ys = nnx.RNN(module, time_major=True, rngs=nnx.Rngs(0))(XS)
    np.testing.assert_allclose(ys, flax_ys, **ROUNDING)


@pytest.mark.parametrize(
    "factory",
    [lambda rngs: nnx.Linear(INPUTS, 3, rngs=rngs), lambda rngs: NnxMLP("plain", rngs)],
    ids=["linear", "mlp"],
)
def test_nnx_feed_forward_module(factory):
    cell = nnx_cell(factory)
    params, carry = cell.init(KEY, X)
    module = factory(nnx.Rngs(0))
    nnx.update(module, params)
    carry_t, y = jax.vmap(cell.apply, in_axes=(None, 0, 0))(params, carry, X)
    assert carry == carry_t == ()
    np.testing.assert_allclose(y, module(X), **ROUNDING)


@pytest.mark.mixed_promotion
def test_nnx_params_go_through_grad_and_optax():
    cell = nnx_cell(NNX["gru"])
    params, carry = cell.init(KEY, X)
    loss = jax.jit(lambda params: jnp.sum(run(cell, params, carry, XS)[1] ** 2))
    grads = jax.grad(loss)(params)
    optimiser = optax.adam(1e-2)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert loss(new) < loss(params)


@pytest.mark.mixed_promotion
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("dropout", "NnxMLP has an active nnx.Dropout at drop.*deterministic=True"),
        ("batch_norm", "NnxMLP has BatchNorm statistics at norm/mean.*LayerNorm"),
        ("variable", "NnxMLP has a Variable that is no nnx.Param at count.*carry"),
        ("array", "NnxMLP has an array that is no nnx.Param at constant.*closure"),
        ("noise", "NnxMLP draws random numbers at rngs/default/count"),
        ("writes", "NnxMLP changes its variable at low/bias"),
    ],
)
def test_nnx_refuses_what_is_no_pure_function(kind, named):
    def make_and_apply():
        cell = nnx_cell(lambda rngs: NnxMLP(kind, rngs))
        params, carry = cell.init(KEY, X)
        cell.apply(params, carry, X[0])

    with pytest.raises(ValueError, match=f"(?s){named}"):
        make_and_apply()


@pytest.mark.parametrize(
    ("factory", "error", "named"),
    [
        (nnx.GRUCell, TypeError, "the class GRUCell.*lambda rngs: GRUCell"),
        (nn.Dense(3), TypeError, "linen_cell"),
        (3, TypeError, "type int"),
        (nn.relu, TypeError, r"factory\(rngs\) -> nnx.Module; called with rngs, relu raised"),
        (lambda: 3, TypeError, r"factory\(rngs\) -> nnx.Module"),
        (lambda rngs: "module", TypeError, "returned a str"),
        (lambda rngs: nnx.RNN(nnx.GRUCell(2, 2, rngs=rngs), rngs=rngs), ValueError, "RNN.*whole sequence"),
    ],
)
def test_nnx_cell_refuses_what_is_no_factory(factory, error, named):
    with pytest.raises(error, match=f"(?s){named}"):
        nnx_cell(factory)


def test_nnx_refuses_params_of_another_module():
    cell = nnx_cell(NNX["gru"])
    other, _ = nnx_cell(NNX["lstm"]).init(KEY, X)
    with pytest.raises(ValueError, match="do not belong to GRUCell"):
        cell.apply(other, jnp.zeros(5), X[0])
    with pytest.raises(ValueError, match=r"GRUCell are an nnx\.State.*seen dict"):
        cell.apply({}, jnp.zeros(5), X[0])
