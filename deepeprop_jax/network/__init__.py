"""Networks of cells: what a cell is, how a network is built, and the adapters of Flax modules."""
