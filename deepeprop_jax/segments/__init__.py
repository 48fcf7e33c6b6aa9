"""The recursion over C steps at once: forward, back, the gradient, and the traces from start to end."""
