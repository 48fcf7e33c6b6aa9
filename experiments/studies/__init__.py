"""What is measured beside training: gradients beside BPTT's, and what all sweeps together say."""
