"""What an administrator sees: pages, an API and figures, in a process of its own."""
