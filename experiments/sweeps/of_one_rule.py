"""One rule under several settings: segments of several lengths, updates inside a sequence, numbers of layers."""

from __future__ import annotations

from experiments.sweeps.grid import Sweep
from experiments.sweeps.shared import RECALL_10, RECALL_GRID, SEEDS, TEXT, TEXT_24, UNCLIPPED, XOR_20, XOR_30, XOR_300

ONE_RULE: dict[str, Sweep] = {
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
    "xor_count_300_plain": Sweep(
        "XOR-count, silent delay of 300 steps, a detector that is not silent in silence, by BPTT",
        "configs/xor_count.py",
        XOR_300 | {"xor_count.from_rest": False, "rule": "BPTT"},
        {"xor_count.decay": (0.997, 0.999), "seed": SEEDS[:3]},
        compared="xor_count.decay",
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
    "text_24_segments": Sweep(
        "The next character, two layers of 24 GRU units, exact within segments",
        "configs/text.py",
        TEXT_24 | {"text.layers": 2, "rule": "exact in segments"},
        {"segment_length": (4, 8, 16), "seed": SEEDS[:3]},
        threshold=2.37,
        measure="bits per character",
        compared="segment_length",
    ),
    "text_recall_segments": Sweep(
        "Recall over 32 characters of text, exact within segments",
        "configs/text_recall.py",
        RECALL_GRID | {"text_recall.gap": 32, "text_recall.pairs": 1, "rule": "exact in segments"},
        {"segment_length": (2, 4, 8, 16, 32), "seed": SEEDS[:3]},
        compared="segment_length",
    ),
    "text_recall_memory": Sweep(
        "Recall over 32 characters of text by BPTT, with a memory and without",
        "configs/text_recall.py",
        RECALL_GRID | {"text_recall.gap": 32, "rule": "BPTT"},
        {"text_recall.decay": (0.01, 0.998), "seed": SEEDS[:3]},
        compared="text_recall.decay",
    ),
    "text_recall_512_long": Sweep(
        "Recall over 512 characters of text by BPTT, 6000 batches",
        "configs/text_recall.py",
        RECALL_GRID | {"text_recall.gap": 512, "batches": 6000, "evaluate_every": 500, "checkpoint_every": 3000},
        {"rule": ("BPTT",), "seed": SEEDS[:1]},
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
    "stale_traces_recall_sgd": Sweep(
        "Delayed recall of 10 bits, updates inside the sequence of 16 steps by plain gradient descent",
        "configs/recall.py",
        RECALL_10 | UNCLIPPED | {"recall.features": 16, "rule": "deep e-prop"},
        {"learning_rate": (1.0, 3.0), "update_every": (1, 4, 16), "seed": SEEDS[:3]},
        compared="update_every",
    ),
}
