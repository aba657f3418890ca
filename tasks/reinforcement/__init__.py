"""Learning by acting: experience, what it is worth, and what is learned from it."""
