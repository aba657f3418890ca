"""One module a data set: a function of the module's name that reads local files."""
