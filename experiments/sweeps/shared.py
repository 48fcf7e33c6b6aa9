"""What several sweeps share: rules side by side, seeds, and the fields of a task."""

from __future__ import annotations

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
# Of text a segment is then a whole batch, whose traces come from the batches before it and go on to the next.
IN_SEGMENTS_OF_32 = {rule: {"segment_length": 32} for rule in IN_SEGMENTS}
SPIKING_RULES = ("BPTT", "e-prop in segments", "immediate only", "lower frozen")
