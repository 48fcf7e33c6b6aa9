"""Programs as data: traced, flattened, sliced, evaluated and rewritten."""
