"""Scripts that print the tables of the documentation; each runs by itself with ``python -m``."""
