"""Learning from a stream without an end: what stands between a learner's gradient and the update of the parameters."""
