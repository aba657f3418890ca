"""Floor 4: the round loop, the update gate, the run store."""
