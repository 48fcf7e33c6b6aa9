"""Data sets and task generators: pure, seeded, jit-able."""
