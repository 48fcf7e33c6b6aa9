"""The sweeps by name: which task, under which rules or settings, with which seeds."""

from __future__ import annotations

from experiments.sweeps.grid import Sweep
from experiments.sweeps.of_one_rule import ONE_RULE
from experiments.sweeps.of_projected import PROJECTED
from experiments.sweeps.of_rates import RATES_OF_RULES
from experiments.sweeps.of_rules import RULES
from experiments.sweeps.of_tasks import TASKS

SWEEPS: dict[str, Sweep] = {**TASKS, **RATES_OF_RULES, **ONE_RULE, **PROJECTED, **RULES}
