"""The learner: its contract, and the pure functions that keep it."""
