"""Floor 3: federated algorithms, pure. One module an algorithm."""
