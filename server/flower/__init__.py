"""Flower's side of the server: the one package of it that imports flwr."""
