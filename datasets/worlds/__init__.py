"""Worlds to act in: what a client holds are the parameters of its own."""
