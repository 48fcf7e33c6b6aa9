"""The sweeps by name: which task, under which rules or settings, with which seeds."""

from __future__ import annotations

from experiments.grid import Sweep
from experiments.sweeps.one_rule import ONE_RULE
from experiments.sweeps.rates import RATES_OF_RULES
from experiments.sweeps.tasks import TASKS

SWEEPS: dict[str, Sweep] = {**TASKS, **RATES_OF_RULES, **ONE_RULE}
