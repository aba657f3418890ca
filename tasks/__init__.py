"""Floor 3: what is learned. Models, per-example losses and metrics."""
