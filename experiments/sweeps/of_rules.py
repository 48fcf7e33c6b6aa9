"""The rules of ``deepeprop_jax.rules`` beside BPTT and deep e-prop, in small batches: most of them cost much.

SnAp is not among them: its order 1 is hops = 0, and its order 2, in networks of dense layers, exact RTRL, whose
gradient at the end of a sequence is that of BPTT (``tests/rules/test_oracles.py``).
"""

from __future__ import annotations

from experiments.sweeps.grid import Sweep
from experiments.sweeps.shared import IN_SEGMENTS, SEEDS, XOR_20, XOR_30

NEIGHBOURS = ("BPTT", "deep e-prop", "hops = 0", "RFLO", "OK", "KF-RTRL", "UORO", "immediate only")
BY_RULE = {**IN_SEGMENTS, "immediate only": {"optimiser": "rmsprop"}}
"""Immediate credit has RMSprop, as in its paper (Merin 2026); all others have Adam."""
SMALL_XOR = {"xor_count.batch": 32, "batches": 1500, "checkpoint_every": 500}

RULES: dict[str, Sweep] = {
    "rules_xor_count": Sweep(
        "XOR-count, silent delay of 30 steps, batches of 32, rules beside deep e-prop",
        "configs/xor_count.py",
        XOR_30 | SMALL_XOR,
        {"rule": NEIGHBOURS, "seed": SEEDS[:3]},
        by_rule=BY_RULE,
    ),
    "rules_relays": Sweep(
        "XOR-count through one dense relay, batches of 32, rules beside deep e-prop",
        "configs/xor_count.py",
        XOR_20 | SMALL_XOR | {"xor_count.depth": 3},
        {"rule": NEIGHBOURS, "seed": SEEDS[:3]},
        by_rule=BY_RULE,
    ),
    "rules_motifs": Sweep(
        "Classify three motifs, then count, 16 units a layer, rules beside deep e-prop",
        "configs/motifs.py",
        {"motifs.features": 16, "motifs.batch": 32, "batches": 1200},
        {"rule": NEIGHBOURS, "seed": SEEDS[:3]},
        by_rule=BY_RULE,
    ),
    "rules_mixing": Sweep(
        "XOR-count, a memory whose units mix at angle 0.5, batches of 32, rules beside deep e-prop",
        "configs/xor_count.py",
        XOR_20 | SMALL_XOR | {"xor_count.angle": 0.5, "batches": 3000, "checkpoint_every": 1500},
        {"rule": NEIGHBOURS, "seed": SEEDS[:3]},
        by_rule=BY_RULE,
    ),
}
