"""A carry projected along R directions beside BPTT, and beside the rules without credit across segments or layers."""

from __future__ import annotations

from experiments.sweeps.grid import Sweep
from experiments.sweeps.shared import DIGITS, SEEDS, XOR_20, XOR_30

RULES = ("BPTT", "R = 2", "R = 4", "exact in segments", "hops = 0")
"""All in segments of 8, exact inside but for hops = 0."""
IN_SEGMENTS_OF_8 = {rule: {"segment_length": 8} for rule in RULES[1:]}

PROJECTED: dict[str, Sweep] = {
    "projected_text_recall": Sweep(
        "Recall over 32 characters of text, 300 batches, a projected carry",
        "configs/text_recall.py",
        {"text_recall.gap": 32, "batches": 300, "evaluate_every": 50, "checkpoint_every": 300},
        {"rule": RULES, "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_xor_count_30": Sweep(
        "XOR-count, silent delay of 30 steps, a projected carry",
        "configs/xor_count.py",
        XOR_30,
        {"rule": RULES, "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_mixing": Sweep(
        "XOR-count, a memory whose units mix at angle 0.5, 3000 batches, a projected carry",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.angle": 0.5, "batches": 3000, "checkpoint_every": 1500},
        {"rule": RULES, "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_motifs": Sweep(
        "Classify three motifs, then count, a projected carry",
        "configs/motifs.py",
        {"evaluate_every": 20},
        {"rule": RULES, "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_digits_blank_32": Sweep(
        "Digits by rows, then 32 blank steps, 2000 batches, a projected carry",
        "configs/digits.py",
        DIGITS | {"digits.blank": 32, "batches": 2000, "checkpoint_every": 1000},
        {"rule": RULES, "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_relays": Sweep(
        "XOR-count through three dense relays, a projected carry",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.depth": 5},
        {"rule": ("BPTT", "R = 4"), "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_digits_pixels": Sweep(
        "Digits pixel by pixel, 64 steps, a projected carry",
        "configs/digits.py",
        DIGITS | {"digits.pixels_per_step": 1, "digits.blank": 0},
        {"rule": ("BPTT", "R = 4"), "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
}
