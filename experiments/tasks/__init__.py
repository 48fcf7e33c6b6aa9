"""What is to be learnt: data and task generators, networks, and the catalogue that puts them together."""
