"""Other libraries that learn forward in time: their own cells and rules, and the same networks here."""
