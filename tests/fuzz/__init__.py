"""Random networks of random cells, and the check of the library against its oracles on each."""
