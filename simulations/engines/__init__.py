"""One module an engine: a function of the module's name that makes a federation."""
