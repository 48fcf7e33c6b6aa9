"""The whole zoo in segments: any length, any mode. An hour of compilation: ``make sweep``."""

from __future__ import annotations

import pytest

from tests.test_segment import STEPS, check_equals_lattice, check_exact_inside
from tests.zoo import cells, networks

pytestmark = pytest.mark.sweep

NETWORKS = list(networks())
FLAT = [*cells(), *NETWORKS]


@pytest.mark.parametrize("name", FLAT)
def test_segments_of_any_length_equal_the_lattice(name):
    check_equals_lattice(name, False, None, (1, 3, 8, STEPS))


@pytest.mark.parametrize("name", FLAT)
def test_exact_segments_equal_the_lattice(name):
    check_equals_lattice(name, True, None, (3,))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("exact", "hops"), [(False, 0), (False, 1), (True, 0)])
def test_segments_with_few_hops_equal_the_lattice(name, exact, hops):
    check_equals_lattice(name, exact, hops, (3,))


@pytest.mark.parametrize("name", FLAT)
def test_resets_and_valid_equal_the_lattice(name):
    check_equals_lattice(name, False, None, (3,), "random")


@pytest.mark.parametrize("name", FLAT)
def test_exact_inside_segments_equals_its_oracle(name):
    check_exact_inside(name, None, (1, 3, 8))


# A node with depth is refused with one hop (tests/test_segment.py).
@pytest.mark.parametrize(
    ("name", "hops"), [(name, hops) for name in NETWORKS for hops in (0, 1) if not (hops and name.startswith("depth"))]
)
def test_exact_inside_segments_with_few_hops_equals_its_oracle(name, hops):
    check_exact_inside(name, hops, (3,))
