"""Handwritten digits, learned by a Flower app whose server runs FedAdam of Umbel."""
