"""What is found and what it costs, for people to read."""
