"""One module a model: a function of the module's name that builds it."""
