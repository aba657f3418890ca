"""Ways to learn without labels, a module each, named by `method` of the task."""
