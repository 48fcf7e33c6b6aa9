"""Benchmarks: time, compile time, memory and gradient error of this library and its rivals, in one run.

Nothing here imports JAX: ``__main__`` fixes the number of threads first.
"""
