"""The sweeps by name, one entry each in ``SWEEPS``: which task, under which rules or settings, with which seeds."""

from __future__ import annotations

from experiments.grid import Sweep

CONTROLS = ("BPTT", "deep e-prop", "hops = 0", "immediate only", "lower frozen")
FEW = ("BPTT", "deep e-prop", "hops = 0", "lower frozen")
MANY = (
    *("BPTT", "TBPTT(10)", "exact RTRL", "exact in segments", "deep e-prop", "hops = 0", "immediate only"),
    *("lower frozen", "readout only"),
)
LONG = (*MANY[:2], "TBPTT(50)", *MANY[2:])
"""For sequences of more than 50 steps."""

SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-3, 3e-3, 1e-2)
SGD = {"optimiser": "sgd", "clip": 1.0}
# Without a clip the updates of a sequence add up to that of its end, but for what changes on the way.
UNCLIPPED = {"optimiser": "sgd", "clip": 1e3}
SGD_RATES = (0.1, 0.3, 1.0)
# Detectors whose biases start at zero stay long on a plateau.
XOR_30 = {"xor_count.delay": 30, "xor_count.bias_scale": 0.5, "batches": 800, "checkpoint_every": 400}
XOR_20 = XOR_30 | {
    "xor_count.cues": 3,
    "xor_count.delay": 20,
    "xor_count.distractors": True,
    "learning_rate": 3e-3,
    "batches": 1500,
    "checkpoint_every": 500,
}
# Without from_rest the integrator adds up tanh(b) over the silence, many times what the votes leave.
XOR_300 = XOR_30 | {"xor_count.delay": 300, "xor_count.decay": 0.999, "xor_count.from_rest": True}
DIGITS = {"learning_rate": 1e-2, "batches": 1500, "evaluate_every": 50, "checkpoint_every": 750}
TEXT = {"text.features": 16, "batches": 1000, "evaluate_every": 100}
RECALL_10 = {
    **{"recall.bits": 2, "recall.length": 5, "recall.pad": 5, "learning_rate": 1e-2},
    **{"batches": 1500, "checkpoint_every": 1500},
}
# A memory that outlasts 512 characters, in a smaller network: the grid has 72 runs.
RECALL_GRID = {
    "text_recall.features": 16,
    "text_recall.batch": 32,
    "text_recall.decay": 0.998,
    "batches": 1000,
    "checkpoint_every": 1000,
}
# With 32 inputs, most of them noise, no relay finds the votes in what a random detector shows.
RELAYS = XOR_20 | {"xor_count.width": 32, "batches": 3000, "checkpoint_every": 1500}
# Enough of both to come below a table of two characters.
TEXT_24 = {"text.features": 24, "batches": 4000, "evaluate_every": 250, "checkpoint_every": 1000}
EVIDENCE = {"batches": 150, "evaluate_every": 25, "checkpoint_every": 150}
# In segments these rules have the gradient that they have step by step, much faster.
IN_SEGMENTS = {
    rule: {"segment_length": 16} for rule in ("exact RTRL", "deep e-prop", "hops = 1", "hops = 0", "lower frozen")
}
# A batch of text, whose traces come from the batches before it and go on to the next.
TEXT_IN_SEGMENTS = {rule: {"segment_length": 32} for rule in IN_SEGMENTS}
SPIKING_RULES = ("BPTT", "e-prop in segments", "immediate only", "lower frozen")
FROZEN_IN_SEGMENTS = {"lower frozen": {"segment_length": 32}}
SWEEPS: dict[str, Sweep] = {
    "xor_count_30": Sweep(
        "XOR-count, silent delay of 30 steps",
        "configs/xor_count.py",
        XOR_30,
        {"rule": CONTROLS, "seed": SEEDS},
    ),
    "xor_count_30_distractors": Sweep(
        "XOR-count, 30 steps of distractors",
        "configs/xor_count.py",
        XOR_30 | {"xor_count.distractors": True},
        {"rule": CONTROLS, "seed": SEEDS},
    ),
    "xor_count_300": Sweep(
        "XOR-count, silent delay of 300 steps, λ = 0.999",
        "configs/xor_count.py",
        XOR_300,
        {"rule": FEW, "seed": SEEDS[:3]},
    ),
    "xor_count_30_memory": Sweep(
        "XOR-count, silent delay of 30 steps, a detector that remembers",
        "configs/xor_count.py",
        XOR_30,
        {"xor_count.memory": (0.5, 0.9), "rule": FEW, "seed": SEEDS[:3]},
    ),
    "xor_count_30_sgd": Sweep(
        "XOR-count, silent delay of 30 steps, plain gradient descent",
        "configs/xor_count.py",
        XOR_30 | SGD | {"batches": 1600},
        {"learning_rate": SGD_RATES, "rule": FEW, "seed": SEEDS[:3]},
    ),
    "xor_count_30_rates": Sweep(
        "XOR-count, silent delay of 30 steps, three learning rates",
        "configs/xor_count.py",
        XOR_30,
        {"learning_rate": RATES, "rule": FEW, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "relay_ladder": Sweep(
        "XOR-count through dense relays",
        "configs/xor_count.py",
        XOR_20,
        {"xor_count.depth": (2, 3, 4), "rule": FEW, "seed": SEEDS[:3]},
    ),
    "relay_ladder_5": Sweep(
        "XOR-count through three dense relays",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.depth": 5},
        {"rule": (*FEW[:2], "hops = 1", *FEW[2:]), "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "relay_ladder_32": Sweep(
        "XOR-count with 32 inputs, through none to three dense relays",
        "configs/xor_count.py",
        RELAYS,
        {
            "xor_count.depth": (2, 3, 4, 5),
            "rule": (*CONTROLS[:2], "hops = 1", *CONTROLS[2:], "readout only"),
            "seed": SEEDS,
        },
        by_rule=IN_SEGMENTS,
    ),
    "relay_ladder_32_rates": Sweep(
        "XOR-count with 32 inputs, through two dense relays, three learning rates",
        "configs/xor_count.py",
        RELAYS | {"xor_count.depth": 4},
        {"learning_rate": RATES, "rule": FEW, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "mixing": Sweep(
        "XOR-count, a memory whose units mix",
        "configs/xor_count.py",
        XOR_20,
        {"xor_count.angle": (0.02, 0.1, 0.5), "rule": FEW, "seed": SEEDS[:3]},
    ),
    "mixing_exact": Sweep(
        "XOR-count, a memory whose units mix, by exact RTRL",
        "configs/xor_count.py",
        XOR_20 | {"rule": "exact RTRL"},
        {"xor_count.angle": (0.02, 0.1, 0.5), "seed": SEEDS[:3]},
        compared="xor_count.angle",
    ),
    "mixing_segments": Sweep(
        "XOR-count, a memory whose units mix at angle 0.5, exact within segments",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.angle": 0.5, "rule": "exact in segments"},
        {"segment_length": (2, 8, 16, 29), "seed": SEEDS[:3]},
        compared="segment_length",
    ),
    "mixing_rates": Sweep(
        "XOR-count, a memory whose units mix at angle 0.5, three learning rates and twice the batches",
        "configs/xor_count.py",
        XOR_20 | {"xor_count.angle": 0.5, "batches": 3000},
        {"learning_rate": RATES, "rule": ("BPTT", "deep e-prop"), "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "motifs": Sweep(
        "Classify three motifs, then count, delay of 12 steps",
        "configs/motifs.py",
        {"evaluate_every": 10},
        {"rule": CONTROLS, "seed": SEEDS},
        by_rule=IN_SEGMENTS,
    ),
    "motifs_delays": Sweep(
        "Classify three motifs, then count",
        "configs/motifs.py",
        {"evaluate_every": 10},
        {"motifs.delay": (6, 20), "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "motifs_rates": Sweep(
        "Classify three motifs, then count, three learning rates",
        "configs/motifs.py",
        {},
        {"learning_rate": RATES, "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "motifs_sgd": Sweep(
        "Classify three motifs, then count, plain gradient descent",
        "configs/motifs.py",
        SGD | {"batches": 2000, "evaluate_every": 100, "checkpoint_every": 1000},
        {"learning_rate": SGD_RATES, "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "digits_rows": Sweep(
        "Digits by rows, 8 steps",
        "configs/digits.py",
        DIGITS | {"digits.blank": 0},
        # A truncation after 10 steps and segments of 32 are the whole sequence here.
        {"rule": [rule for rule in MANY if rule not in ("TBPTT(10)", "exact in segments")], "seed": SEEDS},
    ),
    "digits_rows_sgd": Sweep(
        "Digits by rows, 8 steps, plain gradient descent",
        "configs/digits.py",
        DIGITS | SGD | {"digits.blank": 0},
        {"learning_rate": SGD_RATES, "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule={rule: {"segment_length": 4} for rule in IN_SEGMENTS},
    ),
    "digits_blank_32": Sweep(
        "Digits by rows, then 32 blank steps",
        "configs/digits.py",
        DIGITS | {"digits.blank": 32},
        {"rule": MANY, "seed": SEEDS},
        by_rule=IN_SEGMENTS,
    ),
    "digits_pixels": Sweep(
        "Digits pixel by pixel, 64 steps",
        "configs/digits.py",
        DIGITS | {"digits.pixels_per_step": 1, "digits.blank": 0},
        {"rule": LONG, "seed": SEEDS},
        by_rule=IN_SEGMENTS,
    ),
    "digits_pixels_rates": Sweep(
        "Digits pixel by pixel, three learning rates",
        "configs/digits.py",
        DIGITS | {"digits.pixels_per_step": 1, "digits.blank": 0},
        {"learning_rate": RATES, "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "digits_blank_32_rates": Sweep(
        "Digits by rows, then 32 blank steps, two smaller learning rates",
        "configs/digits.py",
        DIGITS | {"digits.blank": 32},
        {"learning_rate": RATES[:2], "rule": FEW, "seed": SEEDS},
        by_rule=IN_SEGMENTS,
    ),
    "japanese_vowels": Sweep(
        "Japanese vowels, nine speakers, answer at the last of 25 steps",
        "configs/series.py",
        {},
        {"rule": MANY, "seed": SEEDS},
        by_rule=IN_SEGMENTS,
    ),
    "japanese_vowels_rates": Sweep(
        "Japanese vowels, three learning rates",
        "configs/series.py",
        {},
        {"learning_rate": RATES, "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "japanese_vowels_sgd": Sweep(
        "Japanese vowels, plain gradient descent",
        "configs/series.py",
        SGD,
        {"learning_rate": SGD_RATES, "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "basic_motions": Sweep(
        "Basic motions, four activities, answer at the last of 100 steps",
        "configs/series.py",
        {"series.name": "BasicMotions", "batches": 300},
        {"rule": LONG, "seed": SEEDS},
        by_rule=IN_SEGMENTS,
    ),
    "recall": Sweep(
        "Delayed recall of 140 bits: a loss at 20 steps",
        "configs/recall.py",
        {},
        {"rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "recall_10": Sweep(
        "Delayed recall of 10 bits: a loss at 5 steps",
        "configs/recall.py",
        RECALL_10,
        {"rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "recall_10_rates": Sweep(
        "Delayed recall of 10 bits, three learning rates",
        "configs/recall.py",
        RECALL_10,
        {"learning_rate": RATES, "rule": CONTROLS, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "text": Sweep(
        "The next character of Python's documentation, one to three layers of 16 GRU units",
        "configs/text.py",
        TEXT,
        {"text.layers": (1, 2, 3), "rule": CONTROLS, "seed": SEEDS[:3]},
        threshold=3.5,
        measure="bits per character",
    ),
    "text_24": Sweep(
        "The next character, one to three layers of 24 GRU units, 4000 batches",
        "configs/text.py",
        TEXT_24,
        {
            "text.layers": (1, 2, 3),
            "rule": (
                *("BPTT", "TBPTT(10)", "exact in segments", "deep e-prop", "hops = 1", "hops = 0"),
                *("immediate only", "lower frozen", "readout only"),
            ),
            "seed": SEEDS[:3],
        },
        threshold=2.37,
        measure="bits per character",
        by_rule=TEXT_IN_SEGMENTS,
    ),
    "text_24_rates": Sweep(
        "The next character, two layers of 24 GRU units, three learning rates",
        "configs/text.py",
        TEXT_24,
        {"learning_rate": RATES, "rule": FEW, "seed": SEEDS[:3]},
        threshold=2.37,
        measure="bits per character",
        by_rule=TEXT_IN_SEGMENTS,
    ),
    "text_24_sgd": Sweep(
        "The next character, two layers of 24 GRU units, plain gradient descent",
        "configs/text.py",
        TEXT_24 | SGD,
        {"learning_rate": SGD_RATES, "rule": FEW, "seed": SEEDS[:3]},
        threshold=2.37,
        measure="bits per character",
        by_rule=TEXT_IN_SEGMENTS,
    ),
    "text_exact": Sweep(
        "The next character by exact RTRL, one to three layers of 16 GRU units",
        "configs/text.py",
        TEXT | {"rule": "exact RTRL", "segment_length": 32},
        {"text.layers": (1, 2, 3), "seed": SEEDS[:3]},
        threshold=3.5,
        measure="bits per character",
        compared="text.layers",
    ),
    "text_recall": Sweep(
        "Recall over 32 characters of text: a GRU layer below a linear memory",
        "configs/text_recall.py",
        {"batches": 500, "evaluate_every": 50},
        # In segments deep e-prop has the gradient that it has step by step, faster.
        {"rule": ("BPTT", "e-prop in segments", "hops = 0", "immediate only", "lower frozen"), "seed": SEEDS[:3]},
    ),
    "text_recall_grid": Sweep(
        "Recall of one of several values over a gap of text",
        "configs/text_recall.py",
        RECALL_GRID,
        {"text_recall.gap": (32, 128), "text_recall.pairs": (1, 2, 4), "rule": FEW, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "text_recall_rates": Sweep(
        "Recall over 32 characters of text, three learning rates",
        "configs/text_recall.py",
        RECALL_GRID | {"text_recall.gap": 32},
        {"learning_rate": RATES, "rule": FEW, "seed": SEEDS[:3]},
        by_rule=IN_SEGMENTS,
    ),
    "text_recall_512": Sweep(
        "Recall over 512 characters of text",
        "configs/text_recall.py",
        RECALL_GRID | {"text_recall.gap": 512},
        # Not even BPTT learns it: the controls would say no more.
        {"rule": ("BPTT", "deep e-prop"), "seed": SEEDS[:3]},
        by_rule={"deep e-prop": {"segment_length": 64}},
    ),
    "text_recall_512_pairs": Sweep(
        "Recall of one of several values over 512 characters of text",
        "configs/text_recall.py",
        RECALL_GRID | {"text_recall.gap": 512},
        {"text_recall.pairs": (2, 4), "rule": ("BPTT", "deep e-prop"), "seed": SEEDS[:3]},
        by_rule={"deep e-prop": {"segment_length": 64}},
    ),
    "text_recall_segments": Sweep(
        "Recall over 32 characters of text, exact within segments",
        "configs/text_recall.py",
        RECALL_GRID | {"text_recall.gap": 32, "text_recall.pairs": 1, "rule": "exact in segments"},
        {"segment_length": (2, 4, 8, 16, 32), "seed": SEEDS[:3]},
        compared="segment_length",
    ),
    "stale_traces_xor_count": Sweep(
        "XOR-count with a running label, silent delay of 30 steps, updates inside the sequence",
        "configs/xor_count.py",
        XOR_30 | {"xor_count.running": True, "rule": "deep e-prop"},
        {"learning_rate": (1e-3, 1e-2), "update_every": (1, 5, 15, 45), "seed": SEEDS[:3]},
        compared="update_every",
    ),
    "stale_traces_recall": Sweep(
        "Delayed recall of 10 bits, updates inside the sequence of 16 steps",
        "configs/recall.py",
        RECALL_10 | {"recall.features": 16, "rule": "deep e-prop"},
        {"learning_rate": (1e-3, 1e-2), "update_every": (1, 4, 16), "seed": SEEDS[:3]},
        compared="update_every",
    ),
    "stale_traces_text": Sweep(
        "The next character, one layer of 16 GRU units, updates inside the 32 steps of a batch",
        "configs/text.py",
        TEXT | {"text.layers": 1, "rule": "deep e-prop"},
        {"learning_rate": (1e-3, 1e-2), "update_every": (1, 4, 32), "seed": SEEDS[:3]},
        threshold=3.5,
        measure="bits per character",
        compared="update_every",
    ),
    "stale_traces_xor_count_sgd": Sweep(
        "XOR-count with a running label, updates inside the sequence by plain gradient descent",
        "configs/xor_count.py",
        XOR_30 | UNCLIPPED | {"xor_count.running": True, "batches": 1600, "rule": "deep e-prop"},
        {"learning_rate": (0.3, 1.0), "update_every": (1, 5, 15, 45), "seed": SEEDS[:3]},
        compared="update_every",
    ),
    "stale_traces_text_sgd": Sweep(
        "The next character, updates inside the 32 steps of a batch by plain gradient descent",
        "configs/text.py",
        TEXT | UNCLIPPED | {"text.layers": 1, "rule": "deep e-prop"},
        {"learning_rate": (1.0, 3.0), "update_every": (1, 4, 32), "seed": SEEDS[:3]},
        threshold=3.5,
        measure="bits per character",
        compared="update_every",
    ),
    "evidence": Sweep(
        "Evidence accumulation by adaptive spiking neurons",
        "configs/evidence.py",
        EVIDENCE,
        {"evidence.cells": ("ALIF", "ALIF, tanh"), "rule": SPIKING_RULES, "seed": SEEDS[:3]},
        by_rule=FROZEN_IN_SEGMENTS,
    ),
    "evidence_two_layers": Sweep(
        "Evidence accumulation, spiking neurons below adaptive ones",
        "configs/evidence.py",
        EVIDENCE | {"evidence.cells": "LIF, ALIF"},
        {"rule": SPIKING_RULES, "seed": SEEDS[:3]},
        by_rule=FROZEN_IN_SEGMENTS,
    ),
    "evidence_two_layers_rates": Sweep(
        "Evidence accumulation, spiking neurons below adaptive ones, three learning rates",
        "configs/evidence.py",
        EVIDENCE | {"evidence.cells": "LIF, ALIF"},
        {"learning_rate": RATES, "rule": ("BPTT", "deep e-prop", "lower frozen"), "seed": SEEDS[:3]},
        by_rule=TEXT_IN_SEGMENTS,
    ),
}
