"""One module a defence against forgetting: a function of the module's name that makes it."""
