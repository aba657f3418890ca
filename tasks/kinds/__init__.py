"""One module a kind of task: a function of the module's name."""
