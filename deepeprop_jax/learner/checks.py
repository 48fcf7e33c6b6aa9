"""What a user can get wrong in a call, told at trace time: what was seen, what is needed, what to do."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from deepeprop_jax.learner.contract import LearnerState, OnlineLearner
from deepeprop_jax.network.arguments import batch_size, check_nesting, check_same, leaf_avals, path_name, strong
from deepeprop_jax.network.cell import Graph, PyTree
from deepeprop_jax.traces import projected
from deepeprop_jax.traces.plan import Mode

STATE_REMEDY = "Make the state with this learner's init, for these params and this batch size."


def next_state(new: PyTree, old: PyTree) -> PyTree:
    """A stream's next state, typed as the one before: a promise of ours, so its breach is an ``AssertionError``."""
    new = jax.tree.map(strong, new)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
    return new


def check_step_input(x: PyTree, needed: PyTree) -> None:
    """One step's input must be shaped as the one that the state was made for."""
    remedy = "One step's input must be shaped as the x given to learner.init."
    if jax.tree.structure(x) == jax.tree.structure(needed):
        pairs = [(a.shape, b.shape) for (_, a), (_, b) in zip(leaf_avals(x), leaf_avals(needed), strict=True)]
        if all(a == b[1:] for a, b in pairs):
            remedy += " Was that a whole sequence? network.init and learner.init take ONE step, xs[0]."
        elif all(a[1:] == b for a, b in pairs):
            remedy += " Is this a whole sequence? learner.step takes ONE step, xs[t]; learner.value_and_grad takes xs."
        elif all(a[1:] == b[1:] for a, b in pairs):
            remedy += " Time is the first axis of xs, (time, batch, ...); with the batch first pass time_major=False."
    check_same(x, needed, "x", remedy)


def check_state(graph: Graph, state: LearnerState) -> None:
    """What can be seen of a state without params: its nesting, the names of its traces, its parts beside each other.

    Not a fingerprint: the state of another learner with the same names, shapes and dtypes passes.
    """
    if not isinstance(state, LearnerState):
        raise TypeError(f"state must be what learner.init or learner.step returned; seen {type(state).__name__}.")
    check_nesting(graph, state.carry, "carry")
    for what, carry in (("carry", state.carry), ("pending carry", state.pending.carry)):
        check_same(carry, state.initial_carry, f"the state's {what}", STATE_REMEDY)
    names = {f"{v.name} <- {k.name}" for v in graph.nodes for k in graph.nodes}
    names.add(projected.NAME)
    strange = [name for name in state.traces if name.removesuffix(", low rank") not in names]
    if strange:
        raise ValueError(
            f"the state's traces have the names {sorted(state.traces)}; {strange[0]!r} is none of this network, whose "
            f"nodes are {[v.name for v in graph.nodes]}. {STATE_REMEDY}"
        )
    check_flags(state.pending.active, (batch_size(state.carry, state.pending.x),), "the state's pending.active")


def sequence_length(xs: PyTree, targets: PyTree) -> int:
    """The leading time axis that all leaves of xs and targets share."""
    inputs = leaf_avals(xs)
    if not inputs:
        raise ValueError("xs has no arrays; it needs shape (time, batch, ...).")
    for path, aval in inputs:
        if len(aval.shape) < 2:
            raise ValueError(
                f"xs at '{path_name(path)}' has shape {aval.shape}; needed (time, batch, ...). For a single step use "
                f"learner.step, or xs[None]."
            )
    length = inputs[0][1].shape[0]
    if length == 0:
        raise ValueError("xs is an empty sequence (time axis of length 0); at least one step is needed.")
    wanted = leaf_avals(targets)
    if not wanted:
        raise ValueError("targets has no arrays; loss_fn gets one target a step. If it uses none, pass jnp.zeros(T).")
    for what, leaves in (("xs", inputs), ("targets", wanted)):
        for path, aval in leaves:
            if aval.shape[:1] != (length,):
                raise ValueError(
                    f"{what} at '{path_name(path)}' has shape {aval.shape}, but xs has {length} steps. Time is the "
                    f"first axis of xs and targets; mask steps without a loss by weights in targets."
                )
    return length


def check_flags(flags: jax.Array, shape: tuple[int, ...], what: str) -> jax.Array:
    """A boolean array of a given shape."""
    needed = f"{what} must be a boolean array of shape {shape}"
    if not hasattr(flags, "shape") or not hasattr(flags, "dtype"):
        raise TypeError(f"{needed}; seen {type(flags).__name__}.")
    if flags.dtype != jnp.bool_ or flags.shape != shape:
        raise ValueError(f"{needed}; seen {flags.dtype} of shape {flags.shape}.")
    return jnp.asarray(flags)


def check_options(mode: Mode) -> None:
    """The options of ``deep_eprop``."""
    check_flag("exact", mode.exact)
    hops = "None (all) or an integer >= 0, the recurrent layers a trace is carried upward"
    _check_count("hops", mode.hops, 0, hops)
    _check_count("rank", mode.rank, 1, "None (whole traces) or an integer >= 1, the directions that a trace keeps")
    carry_rank = "None or an integer >= 0, the directions of the carry along which influences are kept"
    _check_count("carry_rank", mode.carry_rank, 0, carry_rank)
    check_count("project_every", mode.project_every, 1, "an integer >= 1, how many single steps go into a projection")
    check_flag("own_traces", mode.own_traces)
    others = [name for name in ("hops", "rank") if getattr(mode, name) is not None] + ["exact"] * mode.exact
    if mode.carry_rank is not None and others:
        raise ValueError(
            f"carry_rank stands in place of all other traces, so {' and '.join(others)} must not be given beside it."
        )
    factor = "None (whole) or an integer >= 1, the rank of the product that a node's weights are kept as"
    _check_count("carry_factor", mode.carry_factor, 1, factor)
    if mode.own_traces and mode.carry_factor is not None:
        raise ValueError("own_traces are not kept beside a projected carry with a carry_factor; leave one of them out.")
    others = [
        name for name in ("own_traces", "project_every", "carry_factor") if getattr(mode, name) != getattr(Mode(), name)
    ]
    if mode.carry_rank is None and others:
        verb = "belong" if len(others) > 1 else "belongs"
        raise ValueError(f"{' and '.join(others)} {verb} to a projected carry; give carry_rank=R too.")


def check_loss_and_learner(learner: object, loss_fn: object) -> None:
    """What stands beside a learner takes both."""
    if not isinstance(learner, OnlineLearner):
        raise TypeError(f"learner must be what deep_eprop returned; seen {type(learner).__name__}.")
    check_sequence_options(loss_fn)


def check_flag(name: str, value: object) -> None:
    """An option that is on or off, known before anything runs."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; seen {value!r}.")


def check_count(name: str, value: object, least: int, needed: str) -> None:
    """An integer that must be given."""
    if value is None:
        raise TypeError(f"{name} must be {needed}; seen None.")
    _check_count(name, value, least, needed)


def _check_count(name: str, value: object, least: int, needed: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be {needed}; seen {value!r}.")
    if value is not None and value < least:
        raise ValueError(f"{name} must be {needed}; seen {value}.")


def check_sequence_options(
    loss_fn: object, segment_length: object = None, within_segment: object = "eprop", window: object = None
) -> None:
    """What ``value_and_grad`` takes."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function (y_t, target_t) -> scalar; seen {type(loss_fn).__name__}.")
    _check_count("segment_length", segment_length, 1, "None or an integer, the steps of a segment, at least 1")
    _check_count("window", window, 1, "None or an integer, how many steps loss_fn sees together, at least 1")
    if window is not None and segment_length not in (None, window):
        raise ValueError(
            f"A window is a segment: seen window={window} and segment_length={segment_length}. Leave out the latter."
        )
    if within_segment not in ("eprop", "exact"):
        raise ValueError(f'within_segment must be "eprop" or "exact"; seen {within_segment!r}.')
    if within_segment == "exact" and segment_length is None and window is None:
        raise ValueError(
            "within_segment='exact' needs a segment_length, because the gradient depends on it: longer segments come "
            "closer to BPTT."
        )


def loss_dtype(loss: PyTree, has_aux: bool, lead: tuple[int, ...]) -> np.dtype:
    """The dtype of what ``loss_fn`` returned, given as shapes, which must be a loss.

    Args:
      lead: of its outputs, (batch,), or (steps, batch) of a window.
    """
    aux = None
    if has_aux:
        if not isinstance(loss, tuple) or len(loss) != 2:
            raise ValueError(f"With has_aux=True loss_fn must return (loss, aux); seen {type(loss).__name__}.")
        loss, aux = loss
    if not hasattr(loss, "shape"):
        hint = " For (loss, aux) pass has_aux=True." if isinstance(loss, tuple) else ""
        raise ValueError(f"loss_fn must return one array; seen {type(loss).__name__}.{hint}")
    if loss.shape not in ((), lead) or not jnp.issubdtype(loss.dtype, jnp.floating):
        of = "one step's batched output" if len(lead) == 1 else "a window's outputs"
        each = "per example" if len(lead) == 1 else "per step and example"
        raise ValueError(
            f"loss_fn must return a real scalar for {of}, or one loss {each}, of shape {lead}, which are summed; seen "
            f"{loss.dtype}{list(loss.shape)}. Sum or average other axes inside it."
        )
    for path, leaf in leaf_avals(aux) if len(lead) > 1 else []:
        if leaf.shape[:1] != lead[:1]:
            raise ValueError(
                f"aux at '{path_name(path)}' has shape {leaf.shape}; of a window of {lead[0]} steps it needs one row "
                f"per step, (steps, ...): they come out one after the other, (time, ...)."
            )
    return loss.dtype


def check_cotangent(dy: PyTree, y: PyTree) -> PyTree:
    """A cotangent shaped as the output y, cast to its dtypes; what belongs to integer outputs is not looked at."""
    if jax.tree.structure(dy) != jax.tree.structure(y):
        raise ValueError(
            f"dy = dL_t/dy_t must have the structure of the output y_t: seen {jax.tree.structure(dy)}, needed "
            f"{jax.tree.structure(y)}."
        )

    def check(path: tuple, d: jax.Array, leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        d = jnp.asarray(d)
        if d.shape != leaf.shape or (jnp.iscomplexobj(d) and not jnp.iscomplexobj(leaf)):
            raise ValueError(
                f"dy at '{path_name(path)}': seen {d.dtype}{list(d.shape)}, needed {leaf.dtype}{list(leaf.shape)}, the "
                f"batched output of the last step."
            )
        return d.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(check, dy, y)
