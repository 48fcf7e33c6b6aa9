"""Training over several processes, of one machine or of a cluster: ``python -m experiments.distributed``."""
