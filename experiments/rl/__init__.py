"""Online reinforcement learning: streaming actor-critic(λ), one step of the environment, one update."""
