"""What one device of several holds and sends: bytes of traces and of working memory, collectives, time to compile.

    python -m experiments.distributed.cost [--cell GRUCell] [--units 32] [--batch 8] [--hops 0]

Two layers of a cell by name below a linear readout, on eight virtual CPU devices: one device alone, the batch over
eight, 2 x 4 (batch x traces), 1 x 8. Bytes are those of one device, as XLA tells them of the compiled program.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import Any, NamedTuple

from experiments.program.command import Parser
from experiments.program.refusal import Refused, check_name

PyTree = Any
DEVICES, STEPS, SEGMENT, INPUTS, OUTPUTS = 8, 16, 4, 16, 8
COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


class Cost(NamedTuple):
    """Of one layout.

    Attributes:
      traces, working: bytes of one device.
      outside, inside: collectives outside of loops, and in them.
      seconds: to trace and to compile.
    """

    traces: int
    working: int
    outside: int
    inside: int
    seconds: tuple[float, float]


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parse = Parser("experiments.distributed.cost", __doc__ or "")
    parse.add_argument("--cell", default="GRUCell", help="a cell by name")
    parse.add_argument("--units", type=int, default=32, help="of each layer; a multiple of 8")
    parse.add_argument("--batch", type=int, default=8, help="examples; a multiple of 8")
    parse.add_argument("--hops", type=int, help="how far traces go up; none: all the way")
    options = parse.parse_args(arguments)
    try:
        found = measure(options)
    except Refused as error:
        parse.error(str(error))
    heads = f"{'trace bytes':>13}{'working bytes':>15}{'collectives':>13}{'in loops':>10}{'trace, compile':>16}"
    print(f"{'layout':28}{heads}")
    for name, cost in found.items():
        seconds = "{:.1f}, {:.1f} s".format(*cost.seconds)
        print(f"{name:28}{cost.traces:13,}{cost.working:15,}{cost.outside:13}{cost.inside:10}{seconds:>16}", flush=True)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Cost]:
    """The cost of every layout."""
    import jax

    from experiments.tasks.cells import CELLS

    check_name("cell", options.cell, CELLS)
    for name in ("units", "batch"):
        if getattr(options, name) < 1 or getattr(options, name) % DEVICES:
            raise Refused(f"--{name} must be a multiple of {DEVICES}; seen {getattr(options, name)}.")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    import flax.linen as nn

    from deepeprop_jax import data_parallel, deep_eprop, stack

    network = stack(CELLS[options.cell](options.units), CELLS[options.cell](options.units), nn.Dense(OUTPUTS))
    learner = deep_eprop(network, hops=options.hops)
    xs = jax.random.normal(jax.random.key(0), (STEPS, options.batch, INPUTS))
    params, carry = network.init(jax.random.key(1), xs[0])
    layouts = {"one device": learner, "8, the batch": data_parallel(learner, jax.make_mesh((8,), ("data",)))}
    for shape in ((2, 4), (1, 8)):
        mesh = jax.make_mesh(shape, ("data", "unit"))
        layouts["{} x {}, batch x traces".format(*shape)] = data_parallel(learner, mesh, unit="unit")
    return {name: cost(made, params, carry, xs) for name, made in layouts.items()}


def cost(learner: Any, params: PyTree, carry: PyTree, xs: Any) -> Cost:
    """Of a call of ``value_and_grad``, whose state is given up."""
    import jax
    import jax.numpy as jnp

    state = jax.jit(learner.init)(params, carry, xs[0])
    run = learner.value_and_grad(lambda y, target: target * (y**2).sum(axis=-1), segment_length=SEGMENT)
    start = time.perf_counter()
    lowered = jax.jit(run, donate_argnums=1).lower(params, state, xs, jnp.ones(STEPS))
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    inside, outside = 0, 0
    entry = False
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            entry = line.startswith("ENTRY")
        if COLLECTIVE.search(line):
            inside, outside = inside + (not entry), outside + entry
    traces = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.traces))
    working = compiled.memory_analysis().temp_size_in_bytes
    return Cost(traces, working, outside, inside, (middle - start, end - middle))


if __name__ == "__main__":
    sys.exit(main())
