"""Random networks of random cells: every mode equals its oracle. ``python -m tests.fuzz`` runs hundreds."""

from __future__ import annotations

import chex
import pytest

from tests.fuzz.problems import candidate, check, modes, random_problem, reference
from tests.gradients import FLOAT64, relative_errors

pytestmark = pytest.mark.mixed_promotion  # Random functions mix dtypes as they come.

LEFT_FOR_LATER = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(1008, 1020)]


@pytest.mark.parametrize("seed", [*range(1000, 1008), *LEFT_FOR_LATER])
def test_random_networks_equal_their_oracles(seed):
    # Small: compilation is what this costs.
    nodes = (1, 2, 1, 2, 1, 2, 1, 2, 1, 3)[seed % 10]
    problem = random_problem(seed, nodes=nodes, fuel=int(nodes == 1 and seed % 4 == 0))
    for exact, hops in modes(seed)[:3]:  # the others belong to the long run
        error = check(problem, exact, hops)
        assert error < FLOAT64, f"exact={exact}, hops={hops}: error {error:.1e} in\n{problem.description}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1020))
def test_random_networks_of_any_size_equal_their_oracles(seed):
    problem = random_problem(seed)
    for exact, hops in modes(seed):
        error = check(problem, exact, hops)
        assert error < FLOAT64, f"exact={exact}, hops={hops}: error {error:.1e} in\n{problem.description}"


def test_a_wrong_mode_is_seen():
    """The check must fail where the library computes something else than the oracle: here the other mode's gradient."""
    problem = random_problem(1001, nodes=3)
    _, approximate = candidate(problem, False, None)
    _, wanted = reference(problem, True, None)
    assert max(relative_errors(approximate, wanted).values()) > 1e-3


def test_a_seed_gives_the_same_problem():
    first, second = random_problem(7), random_problem(7)
    assert first.description == second.description
    chex.assert_trees_all_equal(first.params, second.params)
    assert first.description != random_problem(8).description
