"""The whole zoo in segments: any length, any mode. An hour of compilation: ``make sweep``."""

from __future__ import annotations

import pytest

from tests.segments.test_segment import STEPS, check_exact_inside, check_segments
from tests.zoo import cells, networks

pytestmark = pytest.mark.sweep

NETWORKS = list(networks())
FLAT = [*cells(), *NETWORKS]


@pytest.mark.parametrize("name", FLAT)
def test_segments_of_any_length_equal_the_oracle(name):
    check_segments(name, False, None, (1, 3, 8, STEPS))


@pytest.mark.parametrize("name", FLAT)
def test_exact_segments_equal_the_oracle(name):
    check_segments(name, True, None, (3,))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("exact", "hops"), [(False, 0), (False, 1), (True, 0)])
def test_segments_with_few_hops_equal_the_oracle(name, exact, hops):
    check_segments(name, exact, hops, (3,))


@pytest.mark.parametrize("name", FLAT)
def test_resets_and_valid_equal_the_oracle(name):
    check_segments(name, False, None, (3,), "random")


@pytest.mark.parametrize("name", FLAT)
def test_exact_inside_segments_equals_its_oracle(name):
    check_exact_inside(name, None, (1, 3, 8))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("hops", [0, 1])
def test_exact_inside_segments_with_few_hops_equals_its_oracle(name, hops):
    check_exact_inside(name, hops, (3,))
