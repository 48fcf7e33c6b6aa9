"""Train over several processes that talk by jax.distributed, and compare their gradient with that of one process.

    python -m experiments.distributed --processes 2

starts two processes on this machine, each with a CPU device of its own (more with --devices), which train deep e-prop
on XOR-count: every process draws its own examples, runs them on its devices, and loss and gradient are summed in one
all-reduce an update. At the end the gradient is compared with that of one process on all examples, in float64. The
exit status is 0 only if they differ by less than 1e-12.

On a cluster the same program is started once on every host, with the address of one of them:

    python -m experiments.distributed --coordinator host0:1234 --processes 16 --process-id 0      # on host0
    python -m experiments.distributed --coordinator host0:1234 --processes 16 --process-id 1      # and so on

Every host then uses all of its accelerators. Under SLURM --process-id is "$SLURM_PROCID". See docs/devices.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from experiments.distributed.processes import free_port, reach, run_together
from experiments.program.command import Parser
from experiments.program.refusal import Refused

PyTree = Any
SAME = 1e-12
"""How far the gradient of several processes may be from that of one, relative to its norm: rounding in float64."""


def parser() -> Parser:
    """The arguments."""
    found = Parser("experiments.distributed", __doc__ or "")
    found.add_argument("--processes", type=int, default=2, help="how many, all together")
    found.add_argument("--devices", type=int, default=1, help="CPU devices of each process on this machine")
    found.add_argument("--updates", type=int, default=300, help="of the parameters")
    found.add_argument("--batch", type=int, default=64, help="examples of an update, of all processes together")
    found.add_argument("--port", type=int, help="of this machine, for its own processes; none: a free one")
    found.add_argument("--coordinator", help="host:port of the process 0, on a cluster")
    found.add_argument("--process-id", type=int, help="number of this process, on a cluster")
    found.add_argument("--timeout", type=int, default=60, help="seconds to wait for the other processes")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Start the processes, or be one of them."""
    parse = parser()
    options = parse.parse_args(arguments)
    try:
        _check(options)
        if options.coordinator is not None:
            return train(options)
        port = free_port(options.port)
    except Refused as error:
        parse.error(str(error))
    print(f"{options.processes} processes of this machine with {options.devices} CPU devices each", flush=True)
    own = [sys.executable, "-m", "experiments.distributed", f"--coordinator=127.0.0.1:{port}"]
    own += [f"--{name}={getattr(options, name)}" for name in ("processes", "devices", "updates", "batch", "timeout")]
    commands = [[*own, f"--process-id={number}"] for number in range(options.processes)]
    return run_together(commands, os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)})


def _check(options: argparse.Namespace) -> None:
    for name in ("processes", "devices", "updates", "batch", "timeout"):
        if getattr(options, name) < 1:
            raise Refused(f"--{name} must be at least 1; seen {getattr(options, name)}.")
    if (options.coordinator is None) != (options.process_id is None):
        raise Refused(
            "--coordinator and --process-id belong together: both on a cluster, neither on this machine alone."
        )
    if options.coordinator is not None:
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise Refused(f"--coordinator must be host:port; seen {options.coordinator!r}.")
        if not 0 <= options.process_id < options.processes:
            raise Refused(f"--process-id must be 0 to {options.processes - 1}; seen {options.process_id}.")
    devices = options.processes * (options.devices if options.coordinator is None else 1)
    if options.batch % devices:
        beside = f" with --devices={options.devices}" if devices > options.processes else ""
        raise Refused(
            f"--batch={options.batch} examples do not divide over --processes={options.processes}{beside}; give a "
            f"multiple of {devices}."
        )


def train(options: argparse.Namespace) -> int:
    """Be one process; the first one tells how it goes."""
    import jax

    jax.config.update("jax_enable_x64", True)
    if hasattr(jax.config, "jax_cpu_collectives_implementation"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    waits = f"process {options.process_id} waits up to {options.timeout} seconds for {options.processes - 1} others"
    try:
        if options.process_id > 0:  # JAX itself would end without a word of what to do
            reach(options.coordinator, options.timeout)
        elif options.processes > 1:
            print(f"{waits} at {options.coordinator}", flush=True)
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process_id, initialization_timeout=options.timeout
        )
    except Exception as error:
        print(
            f"error: {waits.replace('waits up to', 'waited')}: {str(error).splitlines()[0]}\nStart all processes, with "
            f"the same --coordinator and --processes, each with its own --process-id; the port must be open.",
            file=sys.stderr,
            flush=True,
        )
        return 1
    from experiments.distributed.one_update import Training

    training = Training(options.batch)
    is_first = jax.process_index() == 0
    if is_first:
        print(f"{jax.device_count()} devices, {options.batch} examples an update", flush=True)
    start = time.perf_counter()
    shown = {*range(0, options.updates, max(options.updates // 10, 1)), options.updates - 1}
    for number in range(options.updates):
        loss = training.update(number)
        if is_first and number in shown:
            print(f"update {number + 1:4d} of {options.updates}: loss {loss:.4f}", flush=True)
    difference = training.difference(options.updates)
    if is_first:
        print(f"{options.updates} updates in {time.perf_counter() - start:.1f} s with compiling", flush=True)
        print(f"gradient beside that of one process: relative difference {difference:.1e}, needed < {SAME}", flush=True)
    jax.distributed.shutdown()
    return 0 if difference < SAME else 1
