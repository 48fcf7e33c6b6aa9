"""The projected carry is BPTT whose cotangents pass boundaries between segments along few directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepeprop_jax import deep_eprop, with_basis
from deepeprop_jax.network.cell import Cell, PyTree, assemble, select
from deepeprop_jax.reference import bptt, projected_bptt
from deepeprop_jax.traces.plan import Plan
from deepeprop_jax.traces.products import own_columns
from deepeprop_jax.traces.state import split_slots
from tests.gradients import SAME, assert_same_gradient
from tests.segments.test_segment import STEPS, flags_of
from tests.zoo import Problem, cells, networks, problem, start


class Basis:
    """Any two arrays."""

    def __init__(self, directions, lift):
        self.directions, self.lift = jnp.asarray(directions), jnp.asarray(lift)


def random_basis(rank: int, numbers: int, seed: int = 0) -> Basis:
    """Not biorthogonal: nothing may rely on it."""
    return Basis(*np.random.default_rng(seed).normal(size=(2, rank, numbers)) / np.sqrt(max(numbers, 1)))


def like_carry(plan: Plan, carry: PyTree, rows: jax.Array) -> PyTree:
    """Rows (R, N) as a pytree like the carry, with R in place of the batch."""
    parts = []
    for v, (node, vertex) in enumerate(zip(plan.nodes, plan.graph.nodes, strict=True)):
        lead = (len(rows), *(() if vertex.depth is None else (vertex.depth,)))
        own = plan.projection.of_node(v, rows).reshape(*lead, node.carry.size)
        view, given = node.carry, node.carry.split(select(carry, vertex.path)).other
        other = [jnp.broadcast_to(jnp.zeros_like(leaf[:1]), (len(rows), *leaf.shape[1:])) for leaf in given]
        parts.append(view.join(view.unflatten(own) if view.size else [], other))
    return assemble(plan.graph, parts)


def setup(p: Problem, rank: int | None, **options):
    """A learner with R directions (None: all N of them) and a state with a random basis (the unit vectors)."""
    plan = deep_eprop(p.network, carry_rank=0).plan(p.params, p.carry, p.xs[0])
    numbers = plan.projection.numbers
    basis = Basis(np.eye(numbers), np.eye(numbers)) if rank is None else random_basis(min(rank, numbers), numbers)
    learner = deep_eprop(p.network, carry_rank=len(basis.directions), **options)
    return plan, learner, basis, with_basis(start(learner, p), basis)


def oracle(p: Problem, plan: Plan, basis: Basis, length: int, network: Cell | None = None):
    """``projected_bptt`` along the same directions."""
    sides = {name: like_carry(plan, p.carry, getattr(basis, name)) for name in ("directions", "lift")}
    return projected_bptt(network or p.network, p.loss_fn, segment_length=length, **sides)


def check(name: str, rank: int | None, lengths: tuple[int, ...], kind: str = "none", network=None) -> None:
    p, flags = problem(name, steps=STEPS), flags_of(kind)
    plan, learner, basis, state = setup(p, rank)
    network = network(p.network) if network else p.network
    for length in lengths:
        run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length))
        (loss, new), grads = run(p.params, state, p.xs, p.targets, *flags)
        needed = bptt(network, p.loss_fn) if rank is None else oracle(p, plan, basis, length, network)
        (needed_loss, carry), right = jax.jit(needed)(p.params, p.carry, p.xs, p.targets, *flags)
        where = f"{name}, R={rank}, C={length}, {kind}"
        assert jnp.allclose(loss, needed_loss, rtol=SAME), where
        assert_same_gradient(grads, right, SAME, where)
        assert_same_gradient(new.carry, carry, SAME, where)


@pytest.mark.parametrize(
    ("name", "rank", "kind"),
    [
        ("linen_lstm", 3, "random"),
        ("graph_skip", 3, "random"),
        ("deep_below_deep", 3, "random"),
        ("complex_dense", 1, "none"),
        ("stack_3", 0, "none"),
        ("alif_refractory", None, "random"),
    ],
)
def test_it_equals_its_oracle(name, rank, kind):
    check(name, rank, (3,), kind)


def test_segments_of_one_and_of_a_length_that_does_not_divide():
    check("linen_gru", 2, (1, 8))


def derived_again(network: Cell) -> Cell:
    """The zoo's cell with leaves that follow from others, which take no cotangent of their own at a boundary."""

    def apply(params: PyTree, carry: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        s = jnp.tanh(carry["v"])
        followed = {"s": s, "a": s * jnp.sin(carry["v"]) + 0.5}
        kept = {name: z + jax.lax.stop_gradient(carry[name] - z) for name, z in followed.items()}
        return network.apply(params, carry | kept, x)

    return Cell(network.init, apply)


def test_leaves_that_follow_from_others_are_no_directions():
    check("derived_leaves", 2, (3,), network=derived_again)


def by_steps(p: Problem, learner, state, resets=None):
    """The sum of the gradients of all steps, each by ``step`` and ``gradient``; resets by ``reset``."""

    @jax.jit
    def one(params, state, x, target, reset):
        state, y = learner.step(params, learner.reset(state, reset), x)
        return state, learner.gradient(params, state, jax.grad(p.loss_fn)(y, target))

    total = jax.tree.map(jnp.zeros_like, p.params)
    for t in range(len(p.xs)):
        x, target = jax.tree.map(lambda leaf, t=t: leaf[t], (p.xs, p.targets))
        reset = jnp.zeros(p.xs.shape[1], bool) if resets is None else resets[t]
        state, grads = one(p.params, state, x, target, reset)
        total = jax.tree.map(jnp.add, total, grads)
    return total, state


# --- with own traces --------------------------------------------------------------------------------------------------


def own_traces_at(p: Problem, length: int) -> list[list[jax.Array]]:
    """Per boundary and real parameter leaf E, (batch, N, ...), zero outside the leaf's node, from a hops=0 learner."""
    learner = deep_eprop(p.network, hops=0)
    plan, state = learner.plan(p.params, p.carry, p.xs[0]), start(learner, p)
    run, found = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=1)), []
    starts = np.cumsum([0, *(node.carry.size for node in plan.nodes)])
    for t in range(0, len(p.xs), length):
        here = []
        for k, node in enumerate(plan.nodes):
            leaves, split = plan.trained[k], split_slots(plan, state.traces)
            rows = jnp.broadcast_to(jnp.eye(node.carry.size), (len(p.xs[0]), *(node.carry.size,) * 2))
            columns = own_columns(plan, k, leaves, rows, split) if leaves else rows[..., :0]
            wide = jnp.zeros((len(rows), starts[-1], columns.shape[-1])).at[:, starts[k] : starts[k + 1]].set(columns)
            cuts = np.cumsum([node.params.sizes[i] for i in leaves])[:-1]
            parts = jnp.split(wide, cuts, axis=-1) if leaves else []
            pairs = zip(parts, leaves, strict=True)
            here += [part.reshape(*part.shape[:2], *node.params.shapes[i]) for part, i in pairs]
        found.append(here)
        piece = jax.tree.map(lambda leaf, t=t: leaf[t : t + length], (p.xs, p.targets))
        (_, state), _ = run(p.params, state, *piece)
    return found


def with_own_traces(p: Problem, basis: Basis, length: int):
    """BPTT whose boundaries pass U Aᵀ k to the carry before, and (k - U Aᵀ k) · E to the parameters."""
    traces = own_traces_at(p, length)

    @jax.custom_vjp
    def through(numbers: jax.Array, theta: list[jax.Array], own: list[jax.Array]) -> jax.Array:
        return numbers

    def back(own, k):
        passed = k @ basis.lift.T @ basis.directions
        return passed, [jnp.einsum("bn,bn...->...", k - passed, e) for e in own], jax.tree.map(jnp.zeros_like, own)

    through.defvjp(lambda numbers, theta, own: (numbers, own), back)
    segment = jax.vmap(p.network.apply, (None, 0, 0))

    def loss(params):
        carry, total = p.carry, 0.0
        for t in range(len(p.xs)):
            if t and t % length == 0:
                leaves, tree = jax.tree.flatten(carry)
                numbers = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=-1)
                numbers = through(numbers, jax.tree.leaves(params), traces[t // length])
                parts = jnp.split(numbers, np.cumsum([leaf[0].size for leaf in leaves])[:-1], axis=-1)
                carry = tree.unflatten([a.reshape(b.shape) for a, b in zip(parts, leaves, strict=True)])
            carry, y = segment(params, carry, p.xs[t])
            total += p.loss_fn(y, jax.tree.map(lambda leaf, t=t: leaf[t], p.targets))
        return total

    return jax.grad(loss)


@pytest.mark.parametrize(("name", "length"), [("stack_2", 2), ("linen_lstm", 1), ("einsum_shared_heads", 2)])
def test_with_own_traces_it_equals_its_oracle(name, length):
    p = problem(name, steps=5)
    _, learner, basis, state = setup(p, 2, own_traces=True, project_every=length)
    right = jax.jit(with_own_traces(p, basis, length))(p.params)
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length))
    assert_same_gradient(run(p.params, state, p.xs, p.targets)[1], right, SAME)
    assert_same_gradient(by_steps(p, learner, state)[0], right, SAME)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [*cells(), *networks()])
def test_the_whole_zoo(name):
    derived = {node for node in cells() if "lif" in node or "spike" in node}
    spiking = name in derived or "spik" in name or "lif" in name
    if name != "derived_leaves" and not spiking:
        check(name, 1, (1, 3))
        check(name, 3, (3, 8), "random")
    check(name, 0, (3,))
    check(name, None, (3,), "random")


# --- other ways in ----------------------------------------------------------------------------------------------------


def changing_bases(p: Problem, plan: Plan, bases: list[Basis], length: int):
    """BPTT in which boundary number i passes U Aᵀ of ``bases[i]``."""

    @jax.custom_vjp
    def through(numbers: jax.Array, directions: jax.Array, lift: jax.Array) -> jax.Array:
        return numbers

    through.defvjp(
        lambda numbers, directions, lift: (numbers, (directions, lift)),
        lambda kept, k: (k @ kept[1].T @ kept[0], jnp.zeros_like(kept[0]), jnp.zeros_like(kept[1])),
    )

    def loss(params):
        carry, total = p.carry, 0.0
        apply = jax.vmap(p.network.apply, (None, 0, 0))
        for t in range(len(p.xs)):
            if t % length == 0 and t:
                basis = bases[t // length - 1]
                leaves, tree = jax.tree.flatten(carry)
                numbers = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=-1)
                numbers = through(numbers, basis.directions, basis.lift)
                cuts = np.cumsum([leaf[0].size for leaf in leaves])[:-1]
                parts = jnp.split(numbers, cuts, axis=-1)
                carry = tree.unflatten([a.reshape(b.shape) for a, b in zip(parts, leaves, strict=True)])
            carry, y = apply(params, carry, p.xs[t])
            total += p.loss_fn(y, jax.tree.map(lambda leaf, t=t: leaf[t], p.targets))
        return total

    return jax.grad(loss)


@pytest.mark.parametrize("stepwise", [False, True])
def test_what_is_held_keeps_its_lift_when_the_basis_changes(stepwise):
    p = problem("stack_2", steps=6)
    plan, learner, _, state = setup(p, 2, project_every=1)
    length = 1 if stepwise else 2
    bases = [random_basis(2, plan.projection.numbers, seed) for seed in range(6 // length)]
    right = jax.jit(changing_bases(p, plan, bases, length))(p.params)
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=length))
    total = jax.tree.map(jnp.zeros_like, p.params)
    for i, start_step in enumerate(range(0, 6, length)):
        # bases[i] is that of the boundary at the segment's end.
        xs, targets = jax.tree.map(lambda leaf, a=start_step: leaf[a : a + length], (p.xs, p.targets))
        if stepwise:
            state, y = learner.step(p.params, state, xs[0])
            dy = jax.grad(p.loss_fn)(y, jax.tree.map(lambda leaf: leaf[0], targets))
            grads = learner.gradient(p.params, state, dy)
            state = with_basis(state, bases[i])
        else:
            (_, state), grads = run(p.params, with_basis(state, bases[i]), xs, targets)
        total = jax.tree.map(jnp.add, total, grads)
    assert_same_gradient(total, right, SAME)


def test_seeds_under_vmap_and_a_donated_state():
    p = problem("linen_gru", steps=6)
    _, learner, basis, state = setup(p, 2)
    run = learner.value_and_grad(p.loss_fn, segment_length=2)
    _, right = jax.jit(run)(p.params, state, p.xs, p.targets)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), p.params)
    states = jax.vmap(lambda params: with_basis(learner.init(params, p.carry, p.xs[0]), basis))(params)
    donated = jax.jit(jax.vmap(run, (0, 0, None, None)), donate_argnums=1)
    (_, states), grads = donated(params, states, p.xs, p.targets)
    assert_same_gradient(jax.tree.map(lambda leaf: leaf[0], grads), right, SAME)
    donated(params, states, p.xs, p.targets)


def test_memory_does_not_grow_with_the_length():
    p = problem("stack_2", steps=16)
    _, learner, _, state = setup(p, 2)
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=4))

    def temporary(times: int) -> int:
        xs, targets = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times), (p.xs, p.targets))
        return run.lower(p.params, state, xs, targets).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) <= 1.01 * temporary(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carry_rank": -1}, "carry_rank must be"),
        ({"carry_rank": 2.0}, "carry_rank must be"),
        ({"carry_rank": 2, "hops": 0}, "in place of all other traces"),
        ({"carry_rank": 2, "exact": True}, "in place of all other traces"),
        ({"carry_rank": 2, "rank": 1}, "in place of all other traces"),
        ({"carry_rank": 2, "project_every": 0}, "project_every must be"),
        ({"carry_rank": 2, "project_every": None}, "project_every must be"),
        ({"carry_rank": 2, "own_traces": 1}, "own_traces must be"),
        ({"carry_rank": 2, "carry_factor": 0}, "carry_factor must be"),
        ({"carry_rank": 2, "carry_factor": 2, "own_traces": True}, "leave one of them out"),
        ({"carry_factor": 4}, "to a projected carry"),
        ({"project_every": 4}, "to a projected carry"),
        ({"own_traces": True}, "to a projected carry"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        deep_eprop(problem("linen_gru").network, **options)


def test_more_directions_than_numbers_are_refused():
    p = problem("linen_gru")
    with pytest.raises(ValueError, match="more than the 3 real numbers"):
        start(deep_eprop(p.network, carry_rank=4), p)


def test_own_traces_of_a_node_with_depth_are_refused():
    p = problem("depth_4")
    with pytest.raises(ValueError, match="Write its layers out"):
        start(deep_eprop(p.network, carry_rank=1, own_traces=True), p)


def test_a_basis_of_another_shape_or_another_state_is_refused():
    p = problem("linen_gru")
    _, _, basis, state = setup(p, 2)
    with pytest.raises(ValueError, match="directions must have shape"):
        with_basis(state, random_basis(1, 3))
    with pytest.raises(ValueError, match="no projected carry"):
        with_basis(start(deep_eprop(p.network), p), basis)


def test_what_is_no_state_and_no_basis_is_refused_by_name():
    p = problem("linen_gru")
    _, _, basis, state = setup(p, 2)
    with pytest.raises(TypeError, match="takes a learner's state"):
        with_basis((1,), basis)
    with pytest.raises(TypeError, match="has directions and lift"):
        with_basis(state, (1,))


def test_a_state_may_be_donated_and_a_basis_used_again():
    p = problem("linen_gru", steps=4)
    learner = deep_eprop(p.network, carry_rank=2)
    run = jax.jit(learner.value_and_grad(p.loss_fn, segment_length=2), donate_argnums=1)
    run(p.params, learner.init(p.params, p.carry, p.xs[0]), p.xs, p.targets)
    basis = random_basis(2, 3)
    for _ in range(2):
        run(p.params, with_basis(learner.init(p.params, p.carry, p.xs[0]), basis), p.xs, p.targets)
