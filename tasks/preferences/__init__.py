"""Learning from preferences and from rewards: losses, policies beside a reference, roll-outs."""
