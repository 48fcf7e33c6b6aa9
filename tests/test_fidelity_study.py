"""T0: element-wise cells at cosine 1 at any depth; the page's tables are those of the stored figures."""

from __future__ import annotations

import json

import pytest

from experiments import fidelity_study as study


def test_the_page_shows_the_stored_figures():
    page, stored = study.PAGE.read_text(), json.loads((study.PAGE.parent / study.STORED).read_text())
    assert study.fill(page, stored) == page
    assert [(row["dial"], row["setting"]) for row in stored["rows"]] == [
        (dial, setting._asdict()) for dial, setting in study.settings()
    ]


def test_stored_cosines_are_one_where_units_see_their_own_past_alone():
    stored = json.loads((study.PAGE.parent / study.STORED).read_text())
    rows = [row for row in stored["rows"] if row["setting"]["cell"] in ("LRU", "IndRNN", "LIF")]
    cosines = [layer["cosine"] for row in rows for layer in row["layers"]["deep e-prop"]]
    assert len(cosines) == 3 * study.DEEP
    assert all(cosine > 1 - 1e-6 for cosine in cosines)


def test_a_measurement_sees_that_hops_are_missing():
    layers = study.measure(study.Setting(cell="IndRNN", depth=2, delay=3, width=4), seeds=1)
    assert [layer["cosine"] for layer in layers["deep e-prop"]] == pytest.approx([1, 1], abs=1e-6)
    assert layers["hops = 0"][0]["cosine"] < 0.999
    assert layers["hops = 0"][1]["cosine"] == pytest.approx(1, abs=1e-6)
