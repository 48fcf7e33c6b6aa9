"""Whole models and modules of another kind: refused, with lines of code that make a network with BPTT's gradient."""

import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deepeprop_jax import Cell, deep_eprop, graph, linen_cell, nnx_cell, stack
from tests.advice import INPUTS, KEY, XS, check_exact, network_of, refused

pytestmark = pytest.mark.mixed_promotion  # Flax modules of float32 on inputs of float64.


class Compact(nn.Module):
    """The model of every tutorial."""

    @nn.compact
    def __call__(self, xs):
        return nn.Dense(2)(nn.relu(nn.RNN(nn.GRUCell(4))(xs)))


class Setup(nn.Module):
    def setup(self):
        self.rnn = nn.RNN(nn.SimpleCell(4, activation_fn=nn.relu), return_carry=True)
        self.head = nn.Dense(2)

    def __call__(self, xs):
        return self.head(self.rnn(xs)[1])


class Nested(nn.Module):
    """An RNN two modules deep, and after it what needs a whole sequence."""

    @nn.compact
    def __call__(self, xs):
        ys = Setup()(nn.Dense(3)(xs))
        return nn.Dense(5)(ys[:, -1])


class Attributes(nn.Module):
    rnn: nn.Module
    heads: tuple[nn.Module, ...]

    def __call__(self, xs):
        return self.heads[0](self.rnn(xs))


class SequentialInside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(3), nn.SimpleCell(4)])(x)


class Leaky(nn.Module):
    """A step, but no RNNCellBase."""

    @nn.compact
    def __call__(self, carry, x):
        carry = 0.9 * carry + nn.Dense(4)(nn.tanh(x))
        return carry, nn.Dense(2)(carry)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))


class NoisyCell(nn.RNNCellBase):
    @nn.compact
    def __call__(self, carry, x, *, deterministic):
        carry, y = nn.SimpleCell(4)(carry, x)
        return carry, nn.Dropout(0.5, deterministic=deterministic)(y)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 4))


class NoCall(nn.Module):
    def step(self, x):
        return x


class WithLengths(nn.Module):
    """A whole model, as one with padding is written."""

    @nn.compact
    def __call__(self, tokens, lengths):
        return nn.Dense(2)(nn.RNN(nn.GRUCell(4))(nn.Embed(8, 4)(tokens), seq_lengths=lengths))


class Two(nn.Module):
    def __call__(self, x, y, z):
        return x


def rngs():
    return nnx.Rngs(0)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.low = nnx.List([nnx.Linear(INPUTS, 3, rngs=rngs)])
        self.cell = nnx.SimpleCell(3, 4, dtype=None, rngs=rngs)
        self.rnn = nnx.RNN(self.cell, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.rnn(self.low[0](xs)))


class NnxLeaky(nnx.Module):
    def __init__(self, rngs):
        self.low, self.high = nnx.Linear(INPUTS, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, carry, x):
        carry = 0.9 * carry + self.low(nnx.tanh(x))
        return carry, self.high(carry)


class NnxNoisy(nnx.Module):
    def __init__(self, rngs):
        self.low = nnx.Linear(INPUTS, 4, rngs=rngs)

    def __call__(self, x, train):
        return self.low(x)


class NnxNoisyCell(nnx.SimpleCell):
    def __call__(self, carry, x, *, train):
        return super().__call__(carry, x)


def simple():
    return nnx.RNN(nnx.SimpleCell(INPUTS, 4, dtype=None, rngs=rngs()), rngs=rngs())


LINEN = {
    "rnn": (nn.RNN(nn.GRUCell(4)), ValueError, r"stack\(module\.cell\)"),
    "reversed": (nn.RNN(nn.GRUCell(4), reverse=True), ValueError, r"stack\(module\.cell\).*needs the future"),
    "bidirectional": (
        nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4))),
        ValueError,
        r"stack\(module\.forward_rnn\.cell\).*needs the future",
    ),
    "sequential_rnn": (
        nn.Sequential([nn.RNN(nn.GRUCell(4)), nn.relu, nn.Dense(2)]),
        ValueError,
        r"RNN at module\.layers\[0\].*stack\(module\.layers\[0\]\.cell, module\.layers\[1\], module\.layers\[2\]\)",
    ),
    "sequential_cell": (
        nn.Sequential([nn.Dense(3), nn.SimpleCell(4)]),
        ValueError,
        r"with its input alone.*stack\(module\.layers\[0\], module\.layers\[1\]\)",
    ),
    "attributes": (
        Attributes(nn.RNN(nn.GRUCell(4)), (nn.Dense(2),)),
        ValueError,
        r"RNN at module\.rnn.*stack\(module\.rnn\.cell, module\.heads\[0\]\).*params_from_linen",
    ),
    "leaky": (Leaky(), TypeError, r"\(carry, x\) and is no nn\.RNNCellBase"),
    "flag": (Noisy(), TypeError, "called with train too"),
    "flag_of_a_cell": (NoisyCell(), TypeError, "called with deterministic too"),
    "bound": (nn.Dense(3).bind(nn.Dense(3).init(KEY, XS[0])), TypeError, r"bound Dense.*module\.unbind\(\)"),
}
IN_THE_CALL = {
    "compact": (Compact(), r"calls RNN.*stack\(nn\.GRUCell\(features=4\), nn\.Dense\(features=2\)\)"),
    "setup": (Setup(), r"stack\(nn\.SimpleCell\(features=4, activation_fn=nn\.relu\), nn\.Dense\(features=2\)\)"),
    "nested": (Nested(), r"stack\(nn\.Dense\(features=3\), nn\.SimpleCell.*, nn\.Dense\(features=2\)\).*not be seen"),
    "sequential": (SequentialInside(), r"with its input alone.*stack\(nn\.Dense\(features=3\), nn\.SimpleCell\("),
}
NNX = {
    "rnn": (simple(), ValueError, r"stack\(module\.cell\)"),
    "bidirectional": (nnx.Bidirectional(simple(), simple()), ValueError, r"forward_rnn\.cell\).*needs the future"),
    "sequential": (
        nnx.Sequential(nnx.Linear(INPUTS, 3, rngs=rngs()), nnx.relu, nnx.GRUCell(3, 4, rngs=rngs())),
        ValueError,
        r"with its input alone.*stack\(module\.layers\[0\], module\.layers\[1\], module\.layers\[2\]\)",
    ),
    "model": (
        NnxModel(rngs()),
        ValueError,
        r"RNN at module\.rnn.*stack\(module\.low\[0\], module\.rnn\.cell, module\.head\).*params_to_nnx",
    ),
    "leaky": (NnxLeaky(rngs()), TypeError, r"\(carry, x\) and is no nnx\.RNNCellBase"),
    "flag": (NnxNoisy(rngs()), TypeError, "called with train too"),
    "flag_of_a_cell": (NnxNoisyCell(INPUTS, 4, dtype=None, rngs=rngs()), TypeError, "called with train too"),
}


def gives_an_output(message, **names):
    """The suggested lines make a network that can be initialised and applied."""
    network = stack(network_of(message, **names))
    params, carry = network.init(KEY, XS[0])
    return jax.eval_shape(jax.vmap(network.apply, in_axes=(None, 0, 0)), params, carry, XS[0])


@pytest.mark.parametrize(("module", "kind", "message"), [*LINEN.values(), *NNX.values()], ids=[*LINEN, *NNX])
def test_refused_where_it_is_given(module, kind, message):
    make = linen_cell if isinstance(module, nn.Module) else nnx_cell
    for where in (make, deep_eprop, stack, lambda m: graph({"a": (m, "input")}, outputs="a")):
        text = refused(lambda where=where: where(module), kind, message)
    gives_an_output(text, module=module, n=4)


@pytest.mark.parametrize(("module", "message"), IN_THE_CALL.values(), ids=IN_THE_CALL)
def test_refused_where_it_is_called(module, message):
    """A module that makes its parts when it is called is refused at init, and where it comes with its own params."""
    cell = deep_eprop(module).network
    text = refused(lambda: cell.init(KEY, XS[0]), ValueError, message)
    gives_an_output(text)
    refused(lambda: jax.eval_shape(cell.init, KEY, XS[0]), ValueError, message)
    refused(lambda: stack(module).init(KEY, XS[0]), ValueError, f"Node '0'.*{message}")
    if module is IN_THE_CALL["compact"][0]:
        params = module.init(KEY, XS.swapaxes(0, 1).astype(jnp.float32))
        refused(lambda: deep_eprop(module).init(params, (), XS[0]), ValueError, message)


@pytest.mark.parametrize("name", ["attributes", "leaky", "flag_of_a_cell"])
def test_the_lines_for_linen_give_the_gradient(name):
    module, kind, message = LINEN[name]
    check_exact(network_of(refused(lambda: stack(module), kind, message), module=module, n=4))


@pytest.mark.parametrize("name", ["model", "leaky", "flag_of_a_cell"])
def test_the_lines_for_nnx_give_the_gradient(name):
    module, kind, message = NNX[name]
    check_exact(network_of(refused(lambda: stack(module), kind, message), module=module, n=4))


def test_a_factory_of_a_whole_model_is_refused():
    refused(lambda: nnx_cell(NnxModel), TypeError, "class NnxModel")
    refused(lambda: nnx_cell(lambda rngs: NnxModel(rngs)), ValueError, "RNN at module.rnn")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoCall(), "NoCall has no __call__"),
        (Two(), r"Two is called with \(x, y, z\); needed \(x\)"),
        (WithLengths(), r"called with \(tokens, lengths\).*\n.*whole sequences.*stack\(embedding.*seq_lengths="),
        (nnx.Module(), "Module has no __call__"),
        (nnx.GRUCell, r"class GRUCell.*rngs=nnx.Rngs\(0\)"),
        (nnx.bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)), "ToNNX; give the Linen module"),
    ],
    ids=["no call", "three inputs", "lengths", "nnx no call", "nnx class", "bridge"],
)
def test_other_modules_are_refused(module, message):
    refused(lambda: deep_eprop(module), TypeError, message)


def test_an_rnn_inside_one_step_is_a_cell_by_hand():
    """A module that encodes a sequence within each step, as the refusal says to write it."""
    encoder = Compact()
    frames = jax.random.normal(KEY, (2, 3, 4, INPUTS), jnp.float32)  # time, batch, frames, features
    refused(lambda: deep_eprop(encoder).network.init(KEY, frames[0]), ValueError, r"inside one step's x.*by hand")
    cell = Cell(lambda key, x: (encoder.init(key, x[0]), ()), lambda params, carry, x: ((), encoder.apply(params, x)))
    network = stack(cell, lambda ys: ys[-1], nn.SimpleCell(3))
    params, carry = network.init(KEY, frames[0])
    _, y = jax.eval_shape(jax.vmap(network.apply, in_axes=(None, 0, 0)), params, carry, frames[0])
    assert y.shape == (3, 3)


# Equinox and Haiku are no dependencies; these are like them in all that is looked at.


class Equinox:
    """As equinox.Module: a pytree that is called as ``cell(x, carry) -> carry``, or as ``layer(x)``."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.hidden_size = kernel.shape[1]


class GRUCell(Equinox):
    def __call__(self, x, carry, *, key=None):
        return jnp.tanh(x @ self.kernel + 0.5 * carry)


class LSTMCell(Equinox):
    def __call__(self, x, carry, *, key=None):
        return jnp.tanh(x @ self.kernel + 0.5 * carry[1]), 0.9 * carry[1] + 0.1 * carry[0]


class Linear(Equinox):
    def __call__(self, x, *, key=None):
        return x @ self.kernel


class Pairs(Equinox):
    def __call__(self, carry, x):
        carry = jnp.tanh(x @ self.kernel + 0.5 * carry)
        return carry, carry**2


Equinox.__module__ = "equinox._module"
KERNEL = jax.random.normal(KEY, (INPUTS, 4), jnp.float64)
for kind in (GRUCell, LSTMCell, Linear, Pairs):
    jax.tree_util.register_pytree_node(
        kind, lambda m: ((m.kernel,), None), lambda _, leaves, kind=kind: _new(kind, leaves)
    )


def _new(kind, leaves):
    module = object.__new__(kind)
    module.kernel = leaves[0]
    return module


EQX = types.SimpleNamespace(
    partition=lambda module, _: (module, None), combine=lambda params, _: params, is_inexact_array=None
)


@pytest.mark.parametrize("kind", [GRUCell, LSTMCell, Linear, Pairs])
def test_equinox_modules_are_refused_with_lines_that_work(kind):
    module = kind(KERNEL)
    for where in (deep_eprop, stack, nnx_cell):
        text = refused(
            lambda where=where: where(module), TypeError, f"{kind.__name__}, an Equinox module.*eqx.partition"
        )
    network = network_of(text, module=module, eqx=EQX)
    if kind is LSTMCell:
        grads = check_exact(stack(network, nn.Dense(2)))
        assert float(jnp.linalg.norm(grads[0].kernel)) > 0
    else:
        gives_an_output(text, module=module, eqx=EQX)
    refused(lambda: stack(module.__call__), TypeError, "an Equinox module")
    refused(lambda: stack(kind), TypeError, f"class {kind.__name__} of Equinox")
    assert "equinox" not in sys.modules


def test_a_pair_of_init_and_apply_is_refused_with_lines_that_work():
    """As hk.transform makes it, with and without a key for apply."""

    def init(key, *given):
        return {"w": jax.random.normal(key, (given[-1].shape[-1], 4), jnp.float64)}

    def layer(params, x):
        return x @ params["w"]

    def cell(params, carry, x):
        carry = jnp.tanh(0.5 * carry + x @ params["w"])
        return carry, carry**2

    for function, part, output in ((layer, 0, (3, 4)), (cell, 1, (3, 4))):
        for apply in (function, lambda params, rng, *given, function=function: function(params, *given)):
            module = types.SimpleNamespace(init=init, apply=apply)
            text = refused(lambda module=module: stack(module), TypeError, "init and apply, as Haiku makes it")
            lines = text.split("or, for a function")[part]
            _, y = gives_an_output(lines, module=module, n=4)
            assert y.shape == output


def test_modules_of_other_libraries_are_named():
    other = type("Linear", (), {"__module__": "torch.nn.modules.linear", "__call__": lambda self, *x: x})
    refused(lambda: stack(other()), TypeError, "Linear of PyTorch.*Cell")
