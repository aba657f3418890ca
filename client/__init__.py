"""Floor 4: the client runtime: local training on data that stays where it is."""
