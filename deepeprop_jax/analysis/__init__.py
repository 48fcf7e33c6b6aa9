"""What is true of a cell, found in its program: units, transition, VJP."""
