"""The zoo's odd cells: everything that could mislead an analysis of the recurrence, each written as its pair (F, g)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import sigmoid, softmax

from deepeprop_jax.cells import triangular_spike
from deepeprop_jax.network.cell import Cell, PyTree
from deepeprop_jax.reference import Pair
from tests.zoo_cells import ZooCell, local, second, whole

Shapes = Mapping[str, tuple[int, ...]]


def _odd(
    name: str,
    shapes: Shapes,
    carry: PyTree,
    step: Callable,
    output: Callable = whole,
    *,
    complex_params: bool = False,
    **properties,
) -> ZooCell:
    """A cell with normal parameters of the given shapes, and a carry of zeros of the given shapes."""
    pair = Pair(step, output)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params = {}
        for (leaf, shape), leaf_key in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
            scale = max(shape[0], 1) ** -0.5 if len(shape) > 1 else 0.5
            params[leaf] = scale * jax.random.normal(leaf_key, shape, jnp.complex64 if complex_params else x.dtype)
        batch = x.shape[0]
        return params, jax.tree.map(lambda shape: _start(batch, shape, x), carry, is_leaf=_is_shape)

    return ZooCell(name, lambda: Cell(init, pair.apply), pair, **properties)


def _is_shape(leaf: PyTree) -> bool:
    return isinstance(leaf, str) or (isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf))


def _start(batch: int, shape: tuple[int, ...] | str, x: jax.Array) -> jax.Array:
    if shape == "key":
        return jax.random.split(jax.random.key(7), batch)
    if shape == "counter":
        return jnp.zeros((batch,), jnp.int32)
    if shape == "complex":
        return jnp.zeros((batch, 3), jnp.complex64)
    return jnp.zeros((batch, *shape), x.dtype)


@jax.custom_vjp
def arctan_spike(distance: jax.Array) -> jax.Array:
    """Heaviside with a fast-sigmoid derivative that only reverse mode knows."""
    return (distance > 0).astype(distance.dtype)


arctan_spike.defvjp(
    lambda distance: (arctan_spike(distance), distance),
    lambda distance, cotangent: (cotangent / (1 + (2 * distance) ** 2),),
)


def _spiking(name: str, spike: Callable, **properties) -> ZooCell:
    def step(p, carry, x):
        v, z = carry
        v_t = 0.8 * v + x @ p["W"] + z @ p["U"] - z + p["b"]
        return v_t, spike(v_t - 1)

    shapes = {"W": (2, 3), "U": (3, 3), "b": (3,)}
    return _odd(name, shapes, ((3,), (3,)), step, second, distance=lambda carry: carry[0] - 1, **properties)


def _tanh_cells() -> list[ZooCell]:
    """One carry leaf h, h_t = tanh(drive), with the recurrent weight used in every which way."""
    plain: Shapes = {"W": (2, 3), "U": (3, 3), "b": (3,)}

    def tanh(name: str, drive: Callable, shapes: Shapes = plain, output: Callable = whole, **properties) -> ZooCell:
        def step(p, h, x):
            return jnp.tanh(x @ p["W"] + p["b"] + drive(p, h, x))

        return _odd(name, shapes, (3,), step, output, **properties)

    def localised(drive: Callable) -> Callable:
        def twin(p, h, x):
            h_t = jnp.tanh(x @ p["W"] + p["b"] + drive(p, h, x))
            return h_t, h_t

        return twin

    def normed(p):
        return p["scale"][None] * p["U"] / jnp.sqrt(jnp.sum(p["U"] ** 2, axis=0, keepdims=True))

    def conditional(p, h, x):
        return lax.cond(x[0] > 0, lambda h: h @ p["U"], lambda h: 0.5 * h @ p["V"] + p["b"], h)

    def scanned(p, h, x):
        """Accumulates h_i U_i over rows: units stay local."""
        total, _ = lax.scan(lambda total, row: (total + row[0] * row[1], None), jnp.zeros_like(h), (h, p["U"]))
        return total

    def iterated(p, h, x):
        """Two inner steps: a parameter reaches other units within one outer step."""
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["U"] + x @ p["W"]), None), h, None, length=2)[0]

    def convolved(p, h, x):
        return jnp.convolve(h, p["k"], mode="same")

    def layer_norm(p, h, x):
        z = x @ p["W"] + h @ p["U"]
        return p["scale"] * (z - z.mean()) / jnp.sqrt(z.var() + 1e-3)

    def attention(p, h, x):
        return softmax(h @ p["U"]) * h.sum()

    @jax.checkpoint
    def remat(p, h, x):
        return sigmoid(h @ p["U"]) * h

    def direct(p, h_t, h_tm1, x):
        return jnp.tanh(h_t @ p["V"] + h_tm1 @ p["R"]) + x @ p["S"]

    mask = jnp.array([[1, 0, 1], [1, 1, 0], [0, 1, 0]])
    return [
        tanh("weight_twice", lambda p, h, x: h @ p["U"] + 0.3 * sigmoid(h @ p["U"])),
        tanh("weight_tied_transpose", lambda p, h, x: h @ p["U"] + 0.3 * (h @ p["U"].T)),
        tanh(
            "weight_norm",
            lambda p, h, x: h @ normed(p),
            {**plain, "scale": (3,)},
            twin=localised(lambda p, h, x: local(h, normed(p))),
        ),
        tanh(
            "weight_masked",
            lambda p, h, x: h @ (p["U"] * mask.astype(h.dtype)),
            twin=localised(lambda p, h, x: local(h, p["U"] * mask.astype(h.dtype))),
        ),
        tanh("inside_cond", conditional, {**plain, "V": (3, 3)}),
        tanh("inside_scan", scanned, twin=localised(lambda p, h, x: local(h, p["U"]))),
        tanh("iterated_scan", iterated),
        tanh("convolution", convolved, {"W": (2, 3), "b": (3,), "k": (3,)}),
        tanh("checkpoint", remat, twin=localised(lambda p, h, x: sigmoid(local(h, p["U"])) * h)),
        tanh("layer_norm", layer_norm, {**plain, "scale": (3,)}),
        tanh("softmax", attention),
        tanh(
            "scaled_before",
            lambda p, h, x: (p["s"] * h) @ p["U"],
            {**plain, "s": (3,)},
        ),
        tanh("output_direct", lambda p, h, x: h @ p["U"], {**plain, "V": (3, 2), "R": (3, 2), "S": (2, 2)}, direct),
        tanh("output_of_one", lambda p, h, x: h @ p["U"], output=lambda p, h_t, h_tm1, x: h_t[1:2] * p["b"][0]),
    ]


def _reset_before(p, h, x):
    r = sigmoid(x @ p["Wr"] + h @ p["Ur"] + p["br"])
    z = sigmoid(x @ p["Wz"] + h @ p["Uz"] + p["bz"])
    return (1 - z) * jnp.tanh(x @ p["Wn"] + (r * h) @ p["Un"]) + z * h


def _lstm(gates: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    i, f, g, o = jnp.split(gates, 4)
    c_t = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    return c_t, sigmoid(o) * jnp.tanh(c_t)


def _projected_lstm(p, carry, x):
    c, h = carry
    c_t, h_t = _lstm(x @ p["W"] + h @ p["U"] + p["b"], c)
    return c_t, h_t @ p["P"]


def _peephole_lstm(p, carry, x):
    c, h = carry
    i, f, g, o = jnp.split(x @ p["W"] + h @ p["U"] + p["b"], 4)
    c_t = sigmoid(f + p["pf"] * c) * c + sigmoid(i + p["pi"] * c) * jnp.tanh(g)
    return c_t, sigmoid(o + p["po"] * c_t) * jnp.tanh(c_t)


def _packed_lstm(p, packed, x):
    return jnp.concatenate(_lstm(x @ p["W"] + packed[3:] @ p["U"] + p["b"], packed[:3]))


def _stacked_lstm(p, carry, x):
    return jnp.stack(_lstm(x @ p["W"] + carry[1] @ p["U"] + p["b"], carry[0]))


def _heads(p, h, x):
    return jnp.tanh(jnp.einsum("i,ihj->hj", x, p["W"]) + jnp.einsum("hi,hij->hj", h, p["U"]) + p["b"])


def _shared_heads(p, h, x):
    return jnp.tanh(jnp.einsum("i,ihj->hj", x, p["W"]) + jnp.einsum("hi,ij->hj", h, p["U"]))


def _interleaved(p, h, x):
    """Gates z, n of one unit stand side by side: (z_0, n_0, z_1, n_1, ...)."""
    gates = (x @ p["W"] + h @ p["U"] + p["b"]).reshape(3, 2)
    z = sigmoid(gates[:, 0])
    return z * h + (1 - z) * jnp.tanh(gates[:, 1])


def _reversed(p, h, x):
    """Unit i is written where unit n - 1 - i was read."""
    return jnp.tanh(x @ p["W"] + (h @ p["U"])[::-1] + p["b"])


def _counter_and_key(p, carry, x):
    h, count, key = carry
    key_t, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (3,), h.dtype)
    h_t = jnp.tanh(x @ p["W"] + h @ p["U"] * (1 + 0.2 * jnp.cos(count.astype(h.dtype))) + 0.1 * noise * p["b"])
    return h_t, count + 1, key_t


def _derived_leaves(p, carry, x):
    """a is a function of s and v, s of v; back is one of v, but of another unit's."""
    drive = x @ p["W"] + carry["a"] @ p["U"] + 0.3 * carry["back"] * p["b"]
    v = 0.7 * carry["v"] - 0.2 * carry["s"] + drive
    s = jnp.tanh(v)
    return {"a": s * jnp.sin(v) + 0.5, "back": 0.5 * v[::-1], "s": s, "v": v}


def _derived_output(p, h_t, h_tm1, x):
    return h_t["a"] * h_t["s"] + h_t["back"] + 0.1 * h_tm1["a"]


def _complex_diagonal(p, h, x):
    return 0.7 * p["a"] / (1 + jnp.abs(p["a"])).astype(h.dtype) * h + x.astype(h.dtype) @ p["W"] + p["b"]


def _complex_dense(p, h, x):
    z = h @ p["U"] + x.astype(h.dtype) @ p["W"]
    return z / (1 + jnp.abs(z)).astype(h.dtype)


def _real_and_imaginary(p, h_t, h_tm1, x):
    return jnp.concatenate([jnp.real(h_t), jnp.imag(h_t)])


def _two_sizes(p, carry, x):
    """Two populations of different sizes that drive each other."""
    a, b = carry["a"], carry["b"]
    return {"a": jnp.tanh(x @ p["W"] + a @ p["Uaa"] + b @ p["Uba"]), "b": jnp.tanh(a @ p["Uab"] + b @ p["Ubb"])}


def _cond_of_two(p, h, x):
    z = x @ p["W"] + h @ p["U"]
    return jax.lax.cond(x[0] > 0, lambda z: (jnp.tanh(z), jnp.sin(z)), lambda z: (jnp.tanh(2 * z), jnp.cos(z)), z)


def _two_results_carry(p, h, x):
    return _cond_of_two(p, h, x)[0]


def _two_results_output(p, h_t, h_tm1, x):
    """One result of the cond is the carry, the other an exact function of the old carry."""
    return h_t**2 + _cond_of_two(p, h_tm1, x)[1]


def _two_results() -> Cell:
    """One ``cond`` gives both results, so that the equation that makes the carry is needed for the output as well."""

    def init(key, x):
        draw = jax.random.split(key)
        shapes = {"W": (2, 3), "U": (3, 3)}
        params = {
            name: 0.6 * jax.random.normal(k, s, x.dtype) for k, (name, s) in zip(draw, shapes.items(), strict=True)
        }
        return params, jnp.zeros((len(x), 3), x.dtype)

    def apply(p, h, x):
        h_t, other = _cond_of_two(p, h, x)
        return h_t, h_t**2 + other

    return Cell(init, apply)


def odd() -> list[ZooCell]:
    """Every odd cell, on inputs of size 2."""
    wide: Shapes = {"W": (2, 12), "U": (3, 12), "b": (12,)}
    gru_shapes = {f"{kind}{gate}": shape for gate in "rzn" for kind, shape in (("W", (2, 3)), ("U", (3, 3)))}
    peephole = {**wide, "pi": (3,), "pf": (3,), "po": (3,)}
    populations = {"W": (2, 3), "Uaa": (3, 3), "Uba": (2, 3), "Uab": (3, 2), "Ubb": (2, 2)}

    def flat(p, h_t, h_tm1, x):
        return h_t.reshape(-1)

    return [
        _spiking("custom_jvp_spike", triangular_spike),
        _spiking("custom_vjp_spike", arctan_spike, forward_mode=False),
        *_tanh_cells(),
        _odd("gru_reset_before", {**gru_shapes, "br": (3,), "bz": (3,)}, (3,), _reset_before),
        _odd(
            "lstm_projection",
            {"W": (2, 12), "U": (2, 12), "b": (12,), "P": (3, 2)},
            ((3,), (2,)),
            _projected_lstm,
            second,
        ),
        _odd("lstm_peephole", peephole, ((3,), (3,)), _peephole_lstm, second),
        _odd("lstm_packed", wide, (6,), _packed_lstm, lambda p, h_t, h_tm1, x: h_t[3:]),
        _odd("lstm_stacked", wide, (2, 3), _stacked_lstm, lambda p, h_t, h_tm1, x: h_t[1]),
        _odd("einsum_heads", {"W": (2, 2, 3), "U": (2, 3, 3), "b": (2, 3)}, (2, 3), _heads, flat),
        _odd("einsum_shared_heads", {"W": (2, 2, 3), "U": (3, 3)}, (2, 3), _shared_heads, flat),
        _odd("interleaved_gates", {"W": (2, 6), "U": (3, 6), "b": (6,)}, (3,), _interleaved),
        _odd("reversed_units", {"W": (2, 3), "U": (3, 3), "b": (3,)}, (3,), _reversed),
        _odd(
            "counter_and_key",
            {"W": (2, 3), "U": (3, 3), "b": (3,)},
            ((3,), "counter", "key"),
            _counter_and_key,
            lambda p, carry_t, carry_tm1, x: carry_t[0],
        ),
        _odd(
            "derived_leaves",
            {"W": (2, 3), "U": (3, 3), "b": (3,)},
            dict.fromkeys(("a", "back", "s", "v"), (3,)),
            _derived_leaves,
            _derived_output,
        ),
        _odd(
            "complex_diagonal",
            {"a": (3,), "W": (2, 3), "b": (3,)},
            "complex",
            _complex_diagonal,
            _real_and_imaginary,
            complex_params=True,
            elementwise=True,
        ),
        _odd(
            "complex_dense",
            {"U": (3, 3), "W": (2, 3)},
            "complex",
            _complex_dense,
            _real_and_imaginary,
            complex_params=True,
        ),
        _odd("two_sizes", populations, {"a": (3,), "b": (2,)}, _two_sizes, lambda p, h_t, h_tm1, x: h_t["b"]),
        ZooCell("two_results_of_a_cond", _two_results, Pair(_two_results_carry, _two_results_output)),
        _odd(
            "one_unit",
            {"W": (2, 1), "U": (1, 1), "b": (1,)},
            (1,),
            lambda p, h, x: jnp.tanh(x @ p["W"] + h @ p["U"] + p["b"]),
            elementwise=True,
        ),
    ]
