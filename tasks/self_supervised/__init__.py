"""Learning from examples without labels: views, networks, losses, and what an encoder is worth."""
