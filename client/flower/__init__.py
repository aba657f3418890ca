"""Flower's side of the client: the one package of it that imports flwr."""
