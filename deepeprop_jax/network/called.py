"""How functions and modules are called, and the lines of code that make a cell of what is called in another way.

A Flax module is called with (carry, x) if it is a recurrent cell, else with x. Modules of other libraries are told by
what they look like, without importing them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from chex import ArrayTree
from flax import nnx

FlaxModule: TypeAlias = nn.Module | nnx.Module
RECURRENT = (nn.RNNCellBase, nnx.RNNCellBase)

PURE_REMEDY = (
    "The output of a cell must be a function of (params, carry, x) alone, or its traces would belong to another "
    "sample. Build the module with rate=0 or deterministic=True, or draw the mask outside and feed it in as part of x."
)
MUTABLE_REMEDY = (
    "A cell has parameters and a carry, and nothing else that changes. Replace BatchNorm by LayerNorm or GroupNorm, "
    "keep other state in the carry, and constants in a closure or as NumPy arrays in the module's attributes."
)

FLAGS = {"deterministic": True, "use_running_average": True, "train": False, "training": False, "is_training": False}
"""Arguments that tell a layer whether it is trained, and the value that makes its output a function of its input."""

CELL = {
    "nn": """
    def init(key, x):
        carry = jnp.zeros((x.shape[0], n))
        return module.init(key, carry[0], x[0]), carry
    network = Cell(init, module.apply)
or let its class inherit from nn.RNNCellBase, with an initialize_carry(rng, input_shape).""",
    "nnx": """
    graphdef, params = nnx.split(module)
    def step(params, carry, x):
        return nnx.merge(graphdef, params)(carry, x)
    network = Cell(lambda key, x: (params, jnp.zeros((x.shape[0], n))), step)
or let its class inherit from nnx.RNNCellBase, with an initialize_carry(input_shape, rngs).""",
}
STEP = """
    class Step({flax}.{base}):{held}
        def __call__(self, {inputs}):
            return self.module({inputs}, {given}){start}
    network = stack(Step(module))"""
HELD = {
    "nn": """
        module: nn.Module""",
    "nnx": """
        def __init__(self, module):
            self.module = module""",
}
START = {
    "nn": """
        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return self.module.initialize_carry(rng, input_shape)""",
    "nnx": """
        def initialize_carry(self, input_shape, rngs):
            return self.module.initialize_carry(input_shape, rngs)""",
}

OTHERS = {"torch": "PyTorch", "keras": "Keras", "tensorflow": "TensorFlow", "haiku": "Haiku", "penzai": "Penzai"}
EQUINOX_LAYER = """    params, static = eqx.partition(module, eqx.is_inexact_array)
    def step(params, carry, x):
        return (), eqx.combine(params, static)(x)
    network = Cell(lambda key, x: (params, ()), step)
"""
EQUINOX_CELL = """    params, static = eqx.partition(module, eqx.is_inexact_array)
    def step(params, carry, x):{step}
    def init(key, x):
        carry = jnp.zeros((x.shape[0], {size}))
        return params, {carry}
    network = Cell(init, step)
"""
PAIR = """write, for a layer without memory, called with x:
    network = Cell(
        init=lambda key, x: (module.init(key, x[0]), ()),
        apply=lambda params, carry, x: ((), module.apply(params, {random}x)),
    )
or, for a function (carry, x) -> (carry, y) whose carry has n numbers:
    network = Cell(
        init=lambda key, x: (module.init(key, jnp.zeros(n), x[0]), jnp.zeros((x.shape[0], n))),
        apply=lambda params, carry, x: module.apply(params, {random}carry, x),
    )
"""


class Arguments(NamedTuple):
    """What a function takes.

    Attributes:
      required: names of the positional arguments without a default.
      most: how many positional arguments it takes at most; None where it says ``*args``, any number.
      keywords: names of the arguments that must be given by keyword.
    """

    required: tuple[str, ...]
    most: int | None
    keywords: tuple[str, ...]


def arguments_of(function: Callable) -> Arguments | None:
    """The arguments of a function; None where Python cannot tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return Arguments(
        tuple(p.name for p in positional if p.default is p.empty),
        None if any_number else len(positional),
        tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty),
    )


def kind_of(thing: object) -> type:
    """A class, or the class of what is none."""
    return thing if inspect.isclass(thing) else type(thing)


DENSE = {"nn": "nn.Dense(n)", "nnx": "nnx.Linear(m, n, rngs=rngs)"}
"""A readout."""
WHOLE = (
    "If it runs over whole sequences, as a model with {flax}.RNN does, build the network of its steps: "
    "stack(embedding, cell, cell, {dense}). Lengths of sequences go into run(..., seq_lengths=)."
)


def check_call(module: FlaxModule) -> None:
    """Raise a ``TypeError``, with the lines to write, unless an ``RNNCellBase`` is called with (carry, x) and any other
    module with x alone."""
    kind, name, flax = type(module), type(module).__name__, "nn" if isinstance(module, nn.Module) else "nnx"
    recurrent = isinstance(module, RECURRENT)
    inputs = "carry, x" if recurrent else "x"
    if not any("__call__" in vars(base) for base in kind.__mro__):
        raise TypeError(f"{name} has no __call__; needed one that takes ({inputs}).")
    taken = arguments_of(kind.__call__)
    if taken is None:
        return
    count, required = (2 if recurrent else 1), taken.required[1:]  # without self
    more = (*required[count:], *taken.keywords)
    if more and all(argument in FLAGS for argument in more):
        lines = STEP.format(
            flax=flax,
            base="RNNCellBase" if recurrent else "Module",
            held=HELD[flax],
            inputs=inputs,
            given=", ".join(f"{flag}={FLAGS[flag]}" for flag in more),
            start=START[flax] if recurrent else "",
        )
        raise TypeError(f"{name} is called with {', '.join(more)} too. Fix it, with the module as module:{lines}")
    if not more and (taken.most is None or taken.most > count):
        return
    seen = ", ".join((*required, *(f"{keyword}=" for keyword in taken.keywords)))
    if not recurrent and len(required) == 2 and not taken.keywords:
        raise TypeError(
            f"{name} is called with ({seen}) and is no {flax}.RNNCellBase, so the shape of its carry is not known. If "
            f"it is (carry, x) -> (carry, y), with n the size of its carry and it as module, write:{CELL[flax]}\n"
            f"{WHOLE.format(flax=flax, dense=DENSE[flax])}"
        )
    raise TypeError(
        f"{name} is called with ({seen}); needed ({inputs}). Make what is constant an attribute of the module, and "
        f"pass several inputs as one pytree x. {WHOLE.format(flax=flax, dense=DENSE[flax])}"
    )


def first_carry(name: str, initialise: Callable[[ArrayTree], ArrayTree], x: ArrayTree) -> ArrayTree:
    """The carry that a module gives for a batch x, by the shapes of x; it must have the batch axis in front."""
    shape = jax.tree.map(jnp.shape, x)
    carry = initialise(shape)
    batch = jax.tree.leaves(x)[0].shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != batch:
            raise ValueError(
                f"{name}.initialize_carry gave a carry{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)} for an "
                f"input of shape {shape}; its leading axis must be the batch, of size {batch}."
            )
    return carry


def check_carry(name: str, initialise: Callable[[ArrayTree], ArrayTree], carry: ArrayTree, x: ArrayTree) -> None:
    """One example's carry without the leading axis too many that broadcasting would hide: that of a whole sequence.
    What the module's own carry for an input of that shape cannot tell is not checked."""
    shape = jax.tree.map(lambda leaf: (1, *jnp.shape(leaf)), x)
    try:
        needed = jax.eval_shape(lambda: initialise(shape))
    except Exception:  # of a module that wants something else, and is free to
        return
    if not jax.tree.leaves(carry) or jax.tree.structure(carry) != jax.tree.structure(needed):
        return
    seen, wanted = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (carry, needed))
    if all(len(a) == len(b) and a[1:] == b[1:] for a, b in zip(seen, wanted, strict=True)):
        raise ValueError(
            f"{name} was given, for one example, a carry of shape {list(seen[0])} and x of shapes "
            f"{jax.tree.map(lambda leaf: list(jnp.shape(leaf)), x)}; for such an x its carry is {list(wanted[0][1:])}. "
            f"Was the network initialised on a whole sequence? network.init takes ONE step of a batch, xs[0]."
        )


def refuse_other_libraries(network: object) -> None:
    """Raise a ``TypeError`` with the lines to write, if ``network`` is an Equinox module, a pair ``init, apply`` as
    Haiku transforms a function to, or a module of another library."""
    name = kind_of(network).__name__
    libraries = [str(getattr(base, "__module__", "")).partition(".")[0] for base in kind_of(network).__mro__]
    if "equinox" in libraries:
        if inspect.isclass(network):
            raise TypeError(f"Seen the class {name} of Equinox; give an instance, whose error has the lines of a Cell.")
        raise TypeError(
            f"Seen {name}, an Equinox module, which owns its parameters; a cell takes them as an argument. With it as "
            f"module, write:\n{_equinox_lines(network)}"
        )
    init, apply = (getattr(network, field, None) for field in ("init", "apply"))
    if not inspect.isclass(network) and callable(init) and callable(apply):
        taken = arguments_of(apply)
        random = "None, " if taken is not None and "rng" in (*taken.required, *taken.keywords) else ""
        raise TypeError(
            f"Seen an object of type {name} with init and apply, as Haiku makes it; needed a Cell. With it as module, "
            + PAIR.format(random=random)
        )
    for library in libraries:
        if library in OTHERS:
            raise TypeError(
                f"Seen {name} of {OTHERS[library]}; needed a Flax module, a Cell(init, apply), or a function "
                f"(params, carry, x) -> (carry, y) of JAX arrays."
            )


def _equinox_lines(module: object) -> str:
    """Equinox's own cells are called as ``cell(x, carry) -> carry``, an LSTM's carry being (h, c); a user's cell whose
    first argument is its carry is taken to give (carry, y)."""
    taken = arguments_of(module) if callable(module) else None
    required = () if taken is None else taken.required
    if len(required) == 1:
        return EQUINOX_LAYER
    pair = "LSTM" in type(module).__name__
    step = f"""
        carry = eqx.combine(params, static)(x, carry)
        return carry, carry{"[0]" if pair else ""}"""
    if required[:1] in (("carry",), ("state",), ("hidden",), ("h",)):
        step = """
        return eqx.combine(params, static)(carry, x)"""
    size = "module.hidden_size" if hasattr(module, "hidden_size") else "n"
    return EQUINOX_CELL.format(step=step, size=size, carry="(carry, carry)" if pair else "carry")
