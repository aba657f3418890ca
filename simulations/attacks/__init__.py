"""One module an attack: a function of the module's name that makes it."""
