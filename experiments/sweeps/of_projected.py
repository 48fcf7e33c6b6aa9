"""A carry projected along R directions beside BPTT, and beside rules without credit across segments or layers.

Updates come at the end of every sequence, or inside it, of such a length that 8 divides it.
"""

from __future__ import annotations

from experiments.sweeps.grid import Sweep
from experiments.sweeps.shared import DIGITS, SEEDS, TEXT, XOR_20, XOR_30

RULES = ("BPTT", "R = 1", "R = 2", "R = 4", "R = 8", "R = 4, q = 8", "exact in segments", "hops = 0")
"""All in segments of 8, exact inside but for hops = 0."""

STEPWISE = (*RULES, "R = 4, step by step")
IN_SEGMENTS_OF_8 = {rule: {"segment_length": 8} for rule in STEPWISE[1:]}
OWN = tuple(f"R = {rank}{own}" for rank in (1, 2, 4, 8) for own in ("", ", own traces"))
INSIDE = ("BPTT", "R = 4", "hops = 0")
"""Of these BPTT alone has its gradient at the end of a sequence, and its update there."""
EVERY_8 = {rule: {"segment_length": 8, "update_every": 8} for rule in INSIDE[1:]}

PROJECTED: dict[str, Sweep] = {
    "projected_text_recall": Sweep(
        "Recall over 32 characters of text, 300 batches, a projected carry",
        "configs/text_recall.py",
        {"text_recall.gap": 32, "batches": 300, "evaluate_every": 50, "checkpoint_every": 300},
        {"rule": STEPWISE, "seed": SEEDS},
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
        {"rule": STEPWISE, "seed": SEEDS},
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
    "projected_text": Sweep(
        "The next character of Python's documentation, two layers of 16 GRU units, segments of 4, a projected carry",
        "configs/text.py",
        TEXT,
        {"rule": ("BPTT", "R = 4", "exact in segments", "hops = 0"), "seed": SEEDS},
        threshold=3.5,
        measure="bits per character",
        by_rule={rule: {"segment_length": 4} for rule in RULES[1:]},
    ),
    "projected_mixing_209": Sweep(
        "XOR-count, silent delay of 209 steps, a memory whose units mix at angle 0.1, a projected carry",
        "configs/xor_count.py",
        XOR_30 | {"xor_count.angle": 0.1, "xor_count.delay": 209, "batches": 1500, "checkpoint_every": 500},
        {"rule": ("BPTT", "R = 4", "R = 8"), "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_mixing_509": Sweep(
        "XOR-count, silent delay of 509 steps, a memory whose units mix at angle 0.1, a projected carry",
        "configs/xor_count.py",
        XOR_30 | {"xor_count.angle": 0.1, "xor_count.delay": 509, "batches": 1500, "checkpoint_every": 500},
        {"rule": ("BPTT", "R = 4", "R = 8"), "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "projected_own_traces": Sweep(
        "Recall over 32 characters of text, 300 batches, a projected carry with and without own traces",
        "configs/text_recall.py",
        {"text_recall.gap": 32, "batches": 300, "evaluate_every": 50, "checkpoint_every": 300},
        {"segment_length": (1, 8, 32), "rule": OWN, "seed": SEEDS[:2]},
    ),
    "projected_batch_1": Sweep(
        "XOR-count, silent delay of 30 steps, one sequence a batch, 30,000 of them, a projected carry",
        "configs/xor_count.py",
        XOR_30
        | {
            "xor_count.batch": 1,
            "learning_rate": 3e-3,
            "batches": 30000,
            "evaluate_every": 1500,
            "checkpoint_every": 15000,
        },
        {"rule": ("BPTT", "R = 4", "R = 4, q = 8", "hops = 0"), "seed": SEEDS},
        by_rule=IN_SEGMENTS_OF_8,
    ),
    "inside_text_recall": Sweep(
        "Recall over 35 characters of text, updates every 8 steps",
        "configs/text_recall.py",
        {"text_recall.gap": 35, "batches": 300, "evaluate_every": 50, "checkpoint_every": 300},
        {"rule": INSIDE, "seed": SEEDS},
        by_rule=EVERY_8,
    ),
    "inside_xor_count_33": Sweep(
        "XOR-count, silent delay of 33 steps, updates every 8 steps",
        "configs/xor_count.py",
        XOR_30 | {"xor_count.delay": 33},
        {"rule": INSIDE, "seed": SEEDS},
        by_rule=EVERY_8,
    ),
    "inside_mixing": Sweep(
        "XOR-count, delay of 23 steps, a memory whose units mix at angle 0.5, 3000 batches, updates every 8 steps",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.delay": 23, "xor_count.angle": 0.5, "batches": 3000, "checkpoint_every": 1500},
        {"rule": INSIDE, "seed": SEEDS},
        by_rule=EVERY_8,
    ),
    "inside_motifs": Sweep(
        "Classify three motifs, then count, delay of 17 steps, updates every 8 steps",
        "configs/motifs.py",
        {"motifs.delay": 17, "evaluate_every": 20},
        {"rule": INSIDE, "seed": SEEDS},
        by_rule=EVERY_8,
    ),
    "inside_digits_blank_32": Sweep(
        "Digits by rows, then 32 blank steps, 2000 batches, updates every 8 steps",
        "configs/digits.py",
        DIGITS | {"digits.blank": 32, "batches": 2000, "checkpoint_every": 1000},
        {"rule": INSIDE, "seed": SEEDS},
        by_rule=EVERY_8,
    ),
    "inside_digits_pixels": Sweep(
        "Digits pixel by pixel, 64 steps, updates every 8 steps",
        "configs/digits.py",
        DIGITS | {"digits.pixels_per_step": 1, "digits.blank": 0},
        {"rule": INSIDE, "seed": SEEDS},
        by_rule=EVERY_8,
    ),
    "inside_relays": Sweep(
        "XOR-count through three dense relays, delay of 23 steps, updates every 8 steps",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.delay": 23, "xor_count.depth": 5},
        {"rule": INSIDE, "seed": SEEDS},
        by_rule=EVERY_8,
    ),
}
