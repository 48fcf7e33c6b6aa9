"""The meter beside the truth, and the picture against R: what is shown is what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.program import pages
from experiments.studies import directions, meter
from experiments.sweeps import SWEEPS
from experiments.training import settings


def test_the_page_shows_the_stored_figures():
    page, stored = pages.EXPERIMENTS.read_text(), json.loads((pages.EXPERIMENTS.parent / meter.STORED).read_text())
    assert meter.fill(page, stored) == page
    assert tuple(stored["curves"]) == meter.TASKS
    curves = [one for by_probes in stored["curves"].values() for one in by_probes.values()]
    assert all(len(one["batch"]) == len(one["truth"]) for one in curves)


def test_with_sixteen_probes_every_reading_is_within_thirty_percent():
    """And docs/projected.md says how far the readings are."""
    curves = json.loads((pages.EXPERIMENTS.parent / meter.STORED).read_text())["curves"]
    far = {probes: [far for one in curves.values() for far in meter.deviations(one[probes])] for probes in ("1", "16")}
    assert max(far["16"]) <= 0.3
    page = " ".join((pages.EXPERIMENTS.parent / "projected.md").read_text().split())
    many = f"with `probes=16` and a horizon of {meter.HORIZONS[16]}"
    assert f"all {len(far['16'])} readings are within {100 * max(far['16']):.0f} % {many}" in page
    within = sum(one <= 0.3 for one in far["1"])
    assert f"with one, {within} of them are within 30 %, and the others up to {100 * max(far['1']):.0f} % away" in page


@pytest.mark.mixed_promotion
@pytest.mark.parametrize("probes", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_the_truth_is_what_the_meter_comes_to(probes):
    """Of so many probes of one short training that chance is small: the same running mean, exactly computed."""
    sweep = SWEEPS["projected_motifs"]
    arguments = sweep.arguments({"rule": meter.RULE, "seed": 0}, Path("unused"))
    arguments += ["--config.motifs.features=6", "--config.motifs.batch=4", "--config.learning_rate=1e-6"]
    config, _ = settings.read([argument for argument in arguments if "checkpoint" not in argument])
    found = meter.curve(settings.make(config), 300, 600, probes)
    assert found["batch"] == [300, 600]
    far, spread = abs(found["meter"][-1] - found["truth"][-1]), found["uncertainty"][-1]
    assert 0 < far < 4 * spread
    assert spread < 0.3 * found["truth"][-1]


def test_deviations_by_hand():
    one = {"batch": [1, 2], "meter": [0.3, 0.2], "uncertainty": [0.1, 0.1], "truth": [0.2, 0.2]}
    assert np.allclose(meter.deviations(one), [0.5, 0])
    result = {"commit": "0", "curves": {"motifs": {"16": one}}}
    assert meter.markdown(result).splitlines()[-1] == (
        "| motifs | 16 | 0.20, 0.30 ± 0.10 | 0.20, 0.20 ± 0.10 | 0.25 | 0.50 | 1 of 2 |"
    )


def test_every_task_with_all_ranks_is_in_the_picture(tmp_path):
    found = directions.results()
    assert set(found) == {"text_recall", "mixing", "digits_blank_32", "motifs", "xor_count_30"}
    assert directions.error_in_the_middle(found["mixing"]["R = 8"]) < directions.error_in_the_middle(
        found["mixing"]["R = 1"]
    )
    directions.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
