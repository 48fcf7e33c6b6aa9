"""The recursion as it is printed, one step at a time: influences go up from layer to layer, and right in time."""
