"""Training: rules, optimisers, one loop, and the program ``python -m experiments.training`` with its folders."""
