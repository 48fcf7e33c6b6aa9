"""What is kept of the past: the kinds of traces, their few operations, and the plan of which are kept."""
