"""Experiments: run from the root of a clone, e.g. ``python -m experiments.demo``.

A room may import from those before it: ``program``, ``tasks``, ``training``, then ``sweeps`` and ``studies``; beside
these two, on their own, ``benchmarks`` and ``demo``.
"""
