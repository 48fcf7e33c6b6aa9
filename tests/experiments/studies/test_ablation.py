"""Which layer keeps what is recalled: an ablation by hand, and the page's table."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp

from deepeprop_jax import Cell, stack
from experiments.studies import ablation
from experiments.tasks.catalogue import Task
from experiments.tasks.targets import at_last_step


def sum_so_far() -> Cell:
    """h_t = h_{t−1} + x_t, y_t = h_t."""
    return Cell(lambda key, x: ((), jnp.zeros_like(x)), lambda params, h, x: (h + x, h + x))


def last_input() -> Cell:
    """h_t = x_t, y_t = h_t: a carry that nothing needs."""
    return Cell(lambda key, x: ((), jnp.zeros_like(x)), lambda params, h, x: (x, x))


def test_an_answer_is_lost_with_the_carry_that_holds_it():
    label = jnp.array([0, 1, 2, 2])
    xs = jnp.zeros((4, 4, 3)).at[1].set(jax.nn.one_hot(label, 3))  # shown at step 1, asked for at step 3
    task = Task(stack(last_input(), sum_so_far()), lambda key, index: None, lambda: (xs, at_last_step(label, 4)))
    params, _ = task.network.init(jax.random.key(0), xs[0])
    assert ablation.accuracy(task, params) == 1
    assert [ablation.accuracy(task, params, layer=0, step=step) for step in range(4)] == [1, 1, 1, 1]
    # Without it the largest of three zeros is the first, right for one of four.
    assert [ablation.accuracy(task, params, layer=1, step=step) for step in range(4)] == [1, 1, 0.25, 0.25]


def test_the_table_by_hand():
    runs = [
        {"rule": "BPTT", "seed": seed, "whole": 1.0, "zeroed": {"GRU": [value], "memory": [1.0]}}
        for seed, value in enumerate((0.2, 0.4))
    ]
    lines = ablation.markdown({"commit": "0", "steps": [3], "runs": runs}).splitlines()
    assert lines[2:] == [
        "| rule | set to zero | before step 3 | never |",
        "|---|---|---:|---:|",
        "| BPTT | GRU | 0.30 | 1.00 |",
        "| BPTT | memory | 1.00 | 1.00 |",
    ]


def test_runs_that_are_not_there_are_named(tmp_path, capsys):
    assert ablation.main(["--results", str(tmp_path)]) == 2
    commands = "python -m experiments.sweeps text_recall_grid && python -m experiments.sweeps text_recall_segments"
    assert commands in capsys.readouterr().err


def test_the_page_holds_the_stored_result():
    page, stored = ablation.PAGE.read_text(), json.loads(ablation.STORED.read_text())
    assert ablation.fill(page, stored) == page
    assert [(run["rule"], run["seed"]) for run in stored["runs"]] == [
        (rule, fields["seed"]) for rule, _, fields in ablation.cases()
    ]
