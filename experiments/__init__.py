"""Experiments: run from the root of a clone, e.g. ``python -m experiments.demo``."""
