"""One module a split: a function of the module's name that says who holds what."""
