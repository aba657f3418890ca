"""One module a kind of adapter: a function of the module's name that puts it into a model."""
