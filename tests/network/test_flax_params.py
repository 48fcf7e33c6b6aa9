"""Parameters of Flax models: an NNX instance brings its own, and whole models' parameters come and go."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from deepeprop_jax import (
    deep_eprop,
    graph,
    linen_cell,
    nnx_cell,
    params_from_linen,
    params_from_nnx,
    params_to_linen,
    params_to_nnx,
    stack,
)
from tests.advice import BATCH, INPUTS, KEY, XS, check_exact, in_float64, refused
from tests.gradients import FLOAT64

SEQUENCES = XS.swapaxes(0, 1)  # (batch, time, features), as Flax's models take them


class NnxModel(nnx.Module):
    """Runs over whole sequences; its parts are the steps."""

    def __init__(self, rngs):
        self.low = nnx.Linear(INPUTS, 3, param_dtype=jnp.float64, rngs=rngs)
        cell = nnx.GRUCell(3, 4, param_dtype=jnp.float64, rngs=rngs)
        self.rnn = nnx.RNN(cell, rngs=rngs)
        self.head = nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, xs):
        carry = jnp.zeros((*xs.shape[:-2], 4))
        return self.head(nnx.relu(self.rnn(nnx.tanh(self.low(xs)), initial_carry=carry)))


class LinenModel(nn.Module):
    """Of two GRUs of one shape, a head, and what is no part of the network."""

    @nn.compact
    def __call__(self, xs):
        dtypes = {"param_dtype": jnp.float64, "dtype": jnp.float64}
        first = nn.RNN(nn.GRUCell(2, **dtypes, name="below"), name="rnn")(xs)
        second = nn.RNN(nn.GRUCell(2, **dtypes), name="top")(nn.relu(first))
        self.param("scale", nn.initializers.ones, (3,))
        return nn.Dense(3, **dtypes)(second)


def outputs(network, params, carry):
    """What a network says of the sequences: (batch, time, ...)."""
    step = jax.vmap(network.apply, in_axes=(None, 0, 0))
    run = jax.jit(lambda params, carry: jax.lax.scan(lambda h, x: step(params, h, x), carry, XS)[1])
    return run(params, carry).swapaxes(0, 1)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def nnx_network():
    model = NnxModel(nnx.Rngs(0))
    return model, stack(model.low, nnx.tanh, model.rnn.cell, nnx.relu, model.head)


def test_an_nnx_instance_brings_its_own_parameters():
    module = nnx.GRUCell(INPUTS, 4, rngs=nnx.Rngs(0))
    own = jax.tree.map(lambda leaf: np.array(leaf), nnx.state(module, nnx.Param))
    for cell in (nnx_cell(module), deep_eprop(module).network, stack(module)):
        for key in (KEY, jax.random.key(7)):
            params, carry = cell.init(key, XS[0])
            params, carry = (params, carry) if cell.graph is None else (params[0], carry[0])
            assert isinstance(params, nnx.State)
            same(own, params)
            assert carry.shape == (BATCH, 4)
    same(own, jax.jit(nnx_cell(module).init)(KEY, XS[0])[0])


def test_an_instance_and_a_cell_do_not_share_buffers():
    """Training with donated params, or changing the module, leaves the other side as it is."""
    module = nnx.Linear(INPUTS, 4, rngs=nnx.Rngs(0))
    own = np.array(module.kernel[...])
    cell = nnx_cell(module)
    params, _ = cell.init(KEY, XS[0])
    jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)(params)
    np.testing.assert_array_equal(module.kernel[...], own)
    np.testing.assert_array_equal(cell.init(KEY, XS[0])[0]["kernel"][...], own)
    module.kernel[...] = module.kernel[...] + 1
    np.testing.assert_array_equal(cell.init(KEY, XS[0])[0]["kernel"][...], own)
    network = stack(module)
    params, _ = network.init(KEY, XS[0])
    params_to_nnx(network, params)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    np.testing.assert_array_equal(module.kernel[...], own + 1)


@pytest.mark.mixed_promotion
def test_a_network_of_instances_is_the_model_and_trains_it():
    """Forward, gradient, one update of optax, and the model itself runs with the new parameters; then back again."""
    model, network = nnx_network()
    params, carry = network.init(KEY, XS[0])
    np.testing.assert_allclose(outputs(network, params, carry), model(SEQUENCES), rtol=FLOAT64)
    grads = check_exact(network)
    optimiser = optax.adam(1e-2)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    new = optax.apply_updates(params, updates)
    params_to_nnx(deep_eprop(network), new)
    np.testing.assert_allclose(model(SEQUENCES), outputs(network, new, carry), rtol=FLOAT64)
    assert float(jnp.abs(model(SEQUENCES) - outputs(network, params, carry)).max()) > 1e-3
    same(params_from_nnx(network, params), new)
    same(network.init(KEY, XS[0])[0], params)  # a network keeps what it was built with
    model.head.bias[...] = model.head.bias[...] + 1
    read = params_from_nnx(network, new)
    np.testing.assert_allclose(outputs(network, read, carry), model(SEQUENCES), rtol=FLOAT64)


@pytest.mark.mixed_promotion
def test_nnx_instances_in_a_nested_graph_beside_linen():
    low, high = nnx.Linear(INPUTS, 3, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1))
    inner = stack(low, nn.Dense(4))
    network = graph({"a": (inner, "input"), "b": (nnx.tanh, "a"), "c": (high, ("a", "b"))}, outputs="c")
    params, _ = network.init(KEY, XS[0])
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    params_to_nnx(network, changed)
    np.testing.assert_array_equal(low.kernel[...], changed["a"][0]["kernel"][...])
    np.testing.assert_array_equal(high.bias[...], changed["c"]["bias"][...])
    read = params_from_nnx(network, params)
    same(read["c"], changed["c"])
    same(read["a"][1], params["a"][1])  # Linen's stay those of params
    assert jax.tree.structure(read) == jax.tree.structure(params)


def test_what_nnx_instances_cannot_do_is_refused():
    module = nnx.GRUCell(INPUTS, INPUTS, rngs=nnx.Rngs(0))
    refused(lambda: stack(module, depth=3), ValueError, r"L layers.*nnx_cell\(lambda rngs: GRUCell")
    refused(lambda: stack(module, nn.relu, module), ValueError, "'0' and '2' hold the same nnx.Param.*nnx.clone")
    refused(lambda: stack(module, stack(nnx_cell(module))), ValueError, "'0' and '1/0' hold the same")
    refused(
        lambda: graph({"a": (module, "input"), "b": (module.dense_i, "a")}, outputs="b"),
        ValueError,
        "the same nnx.Param",
    )
    stack(module, nnx.clone(module))
    network = stack(module)
    params, _ = network.init(KEY, XS[0])
    refused(lambda: params_to_nnx(network, (params[0]["dense_i"],)), ValueError, "node '0' are not those of.*GRUCell")
    refused(lambda: jax.jit(lambda p: params_to_nnx(network, p))(params), ValueError, "outside")
    factory = stack(nnx_cell(lambda rngs: nnx.Linear(2, 2, rngs=rngs)))
    refused(lambda: params_to_nnx(factory, params), ValueError, "no instance")
    refused(lambda: params_from_nnx(stack(nn.Dense(2)), params), ValueError, "no instance")
    abstract = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    refused(lambda: stack(abstract), ValueError, "Linear without values")
    with_dropout = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    refused(lambda: stack(with_dropout), ValueError, "active nnx.Dropout at layers/1")


def linen_network():
    model = LinenModel()
    variables = model.init(KEY, SEQUENCES)
    dtypes = {"param_dtype": jnp.float64}
    network = stack(nn.GRUCell(2, **dtypes), nn.relu, nn.GRUCell(2, **dtypes), nn.Dense(3, **dtypes))
    return model, variables, network


PATHS = {"0": "below", "2": "GRUCell_0"}


@pytest.mark.parametrize("form", ["variables", "params", "frozen"])
def test_a_linen_models_parameters_come_and_go(form):
    model, variables, network = linen_network()
    given = {"variables": variables, "params": variables["params"], "frozen": freeze(variables)}[form]
    params, carry = in_float64(network.init(jax.random.key(5), XS[0]))
    loaded = params_from_linen(network, params, given, PATHS)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    back = params_to_linen(network, loaded, given, PATHS)
    same(back, given)
    if form == "variables":
        np.testing.assert_allclose(outputs(network, loaded, carry), model.apply(variables, SEQUENCES), rtol=FLOAT64)
    new = jax.tree.map(lambda leaf: 0.9 * leaf, loaded)
    changed = params_to_linen(deep_eprop(network), new, given, PATHS)
    assert type(changed) is type(given)
    if form == "variables":
        ran = jax.jit(model.apply)(changed, SEQUENCES)
        np.testing.assert_allclose(ran, outputs(network, new, carry), rtol=FLOAT64)
        same(changed["params"]["scale"], variables["params"]["scale"])
        compiled = jax.jit(lambda p, v: params_to_linen(network, params_from_linen(network, p, v, PATHS), v, PATHS))
        same(compiled(params, variables), variables)
    same(params_from_linen(network, params, changed, PATHS), new)


@pytest.mark.mixed_promotion
def test_parts_are_found_by_their_shapes():
    """As the users' models are: nn.RNN of a cell and a Dense, made in any of Flax's ways."""
    model = nn.Sequential([nn.Dense(4), nn.RNN(nn.GRUCell(4)), nn.Dense(2)])
    variables = model.init(KEY, SEQUENCES.astype(jnp.float32))
    network = stack(nn.Dense(4), graph({"rnn": (nn.GRUCell(4), "input")}, outputs="rnn"), nn.relu, nn.Dense(2))
    params, _ = network.init(jax.random.key(3), XS[0])
    loaded = params_from_linen(network, params, variables)
    same(loaded[0]["params"], variables["params"]["layers_0"])
    same(loaded[1]["rnn"]["params"], variables["params"]["layers_1"]["cell"])
    same(loaded[3]["params"], variables["params"]["layers_2"])
    # The cell's inner Dense has the head's shape here, and is taken with its cell.
    model = nn.Sequential([nn.RNN(nn.GRUCell(4)), nn.Dense(4)])
    variables = model.init(KEY, SEQUENCES.astype(jnp.float32))
    network = stack(nn.GRUCell(4), nn.Dense(4))
    loaded = params_from_linen(network, network.init(KEY, XS[0])[0], variables)
    same(loaded[1]["params"], variables["params"]["layers_1"])
    # A single cell, and a network that is not the whole model.
    alone = linen_cell(nn.GRUCell(4))
    params, _ = alone.init(jax.random.key(4), XS[0])
    same(params_from_linen(alone, params, variables)["params"], variables["params"]["layers_0"]["cell"])
    back = params_to_linen(alone, params, variables)
    same(back["params"]["layers_1"], variables["params"]["layers_1"])
    same(back["params"]["layers_0"]["cell"], params["params"])


@pytest.mark.mixed_promotion
def test_layers_of_one_depth_have_a_path_each():
    variables = LinenModel().init(KEY, SEQUENCES)
    network = stack(nn.GRUCell(2), depth=2)
    params, _ = network.init(KEY, XS[0])
    paths = {"layers": ("below", "GRUCell_0")}
    loaded = params_from_linen(network, params, variables, paths)
    same(jax.tree.map(lambda leaf: leaf[1], loaded["params"]), variables["params"]["GRUCell_0"])
    same(params_to_linen(network, loaded, variables, paths), variables)
    refused(lambda: params_from_linen(network, params, variables), ValueError, r"'layers': \('below', 'GRUCell_0'\)")
    refused(lambda: params_from_linen(network, params, variables, {"layers": "below"}), ValueError, "2 layers, and 1")


@pytest.mark.mixed_promotion
def test_parts_that_are_not_clear_are_refused():
    _, variables, network = linen_network()
    params, _ = network.init(KEY, XS[0])

    def refuse(message, paths=None, model=variables, params=params, network=network):
        for function in (params_from_linen, params_to_linen):
            refused(lambda function=function: function(network, params, model, paths), ValueError, message)

    refuse(r"Node '0' fits several parts.*'below', 'GRUCell_0'.*paths=\{'0': 'below'\}")
    refuse("no parameters at 'RNN_0/cell'; it has.*'below'", {"0": "RNN_0/cell"})
    refuse(r"Node '0' needs parameters .*hn/bias.*at 'Dense_0', \{'bias'", {"0": "Dense_0"})
    refuse("Two nodes are given the same part of the model, 'below'", {"0": "below", "2": "below"})
    refuse(r"paths names \['7'\].*\['0', '2', '3'\]", {"7": "below"})
    refuse("seen list", PATHS, model=[variables])
    wide = stack(nn.GRUCell(2), nn.relu, nn.GRUCell(2), nn.Dense(5))
    refuse(r"Node '3' needs.*\(2, 5\).*no part", PATHS, params=wide.init(KEY, XS[0])[0], network=wide)
    plain = stack(nn.relu)
    refuse("Linen nodes with parameters are \\[\\]", params=((),), network=plain)
